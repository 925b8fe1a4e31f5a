"""RequestMaker: what a caller gives (text, messages, sampling) becomes a GenerateRequest, checked once, here."""

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from numbers import Integral
from typing import Any

from slipstream.errors import ModelError, RequestError
from slipstream.schema.guided import has_lone_surrogate
from slipstream.schema.request import GenerateRequest, Pooling
from slipstream.schema.sampling import LARGEST_INTEGER, SamplingParams
from slipstream.text.chat import render_chat
from slipstream.text.tokenizer import Tokenizer

Prompt = str | Sequence[int]
Message = Mapping[str, Any]

_NOTHING_SAMPLED = SamplingParams(max_tokens=1)
_SAMPLING_NAMES = {field.name for field in fields(SamplingParams)}


@dataclass(frozen=True)
class ModelFacts:
    """What a request is checked against."""

    name: str
    vocab_size: int
    max_seq_len: int
    eos_token_ids: frozenset[int] = frozenset()
    generation: dict[str, Any] = field(default_factory=dict)  # generation_config.json
    hidden_size: int = 0  # of vectors; 0 where the engine has none to give


class RequestMaker:
    """Of one running engine. `chat_template` replaces the tokenizer's own."""

    def __init__(self, facts: ModelFacts, tokenizer: Tokenizer | None, chat_template: str | None = None) -> None:
        self.facts = facts
        self._tokenizer = tokenizer
        self.chat_template = chat_template
        if chat_template is None and tokenizer is not None:
            self.chat_template = tokenizer.chat_template

    @property
    def tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            raise ModelError(
                f"{self.facts.name} has no tokenizer; give one with --tokenizer_dir, or prompts as token ids."
            )
        return self._tokenizer

    @property
    def optional_tokenizer(self) -> Tokenizer | None:
        """None where prompts and answers are token ids only."""
        return self._tokenizer

    def encode(self, prompt: Prompt, add_special_tokens: bool = True) -> tuple[int, ...]:
        """Token ids of a prompt, which may be given as such. Raises RequestError for none and for unknown ones."""
        if not isinstance(prompt, Iterable) or isinstance(prompt, bytes | bytearray):
            raise RequestError(f"The prompt is {prompt!r}; it must be a string or a list of token ids.")
        token_ids = self.tokenizer.encode(prompt, add_special_tokens) if isinstance(prompt, str) else list(prompt)
        if not token_ids:
            raise RequestError("The prompt is empty; give at least one character or token id.")
        # Most are plain and fine, which is quicker to find out for all at once.
        if set(map(type, token_ids)) == {int} and min(token_ids) >= 0 and max(token_ids) < self.facts.vocab_size:
            return tuple(token_ids)
        return tuple(self._vocabulary_id("prompt token id", token_id) for token_id in token_ids)

    def chat_prompt(self, messages: Sequence[Message], /, **template_values: Any) -> list[int]:
        """A conversation as token ids, ending where the answer begins. Other names go to the chat template."""
        for name in template_values:
            if name in _SAMPLING_NAMES:
                raise RequestError(f"{name} is no value of a chat template; give it in SamplingParams({name}=…).")
        tokenizer = self.tokenizer
        text = render_chat(
            self.chat_template, messages,
            bos_token=_token(tokenizer, tokenizer.bos_token_id), eos_token=_token(tokenizer, tokenizer.eos_token_id),
            **template_values,
        )  # fmt: skip
        return tokenizer.encode(text, add_special_tokens=False)

    def request(
        self,
        request_id: str,
        token_ids: tuple[int, ...],
        sampling: SamplingParams,
        priority: int = 0,
        cache_salt: str = "",
    ) -> GenerateRequest:
        """Raises RequestError for a prompt that leaves no room, and for ids outside the vocabulary."""
        longest = self.facts.max_seq_len
        room = longest - len(token_ids)
        if room < 1:
            raise RequestError(
                f"The prompt has {len(token_ids)} tokens and a sequence holds {longest}; "
                f"shorten it to {longest - 1} or raise max_seq_len."
            )
        _check_priority_and_salt(priority, cache_salt)
        if sampling.stop:
            _ = self.tokenizer  # without one there is no text to find a stop string in: say so
        for token_id in sampling.stop_token_ids:
            self._vocabulary_id("stop_token_ids", token_id)
        for token_id in sampling.logit_bias or {}:
            self._vocabulary_id("logit_bias token id", token_id)
        bad_words = tuple(ids for word in sampling.bad_words for ids in self.tokenizer.bad_word_ids(word))
        return GenerateRequest(
            request_id=request_id,
            prompt_token_ids=token_ids,
            sampling=sampling,
            seed=random.getrandbits(63) if sampling.seed is None else sampling.seed,
            max_tokens=room if sampling.max_tokens is None else min(sampling.max_tokens, room),
            eos_token_ids=frozenset() if sampling.ignore_eos else self.facts.eos_token_ids,
            bad_words_ids=bad_words,
            priority=priority,
            cache_salt=cache_salt,
        )

    def pooling_request(
        self, request_id: str, token_ids: tuple[int, ...], pooling: Pooling, priority: int = 0, cache_salt: str = ""
    ) -> GenerateRequest:
        """One that ends with a vector, where check_embedding finds nothing wrong. Raises RequestError."""
        if len(token_ids) > self.facts.max_seq_len:
            raise RequestError(
                f"The text has {len(token_ids)} tokens and a sequence holds {self.facts.max_seq_len}; shorten it."
            )
        _check_priority_and_salt(priority, cache_salt)
        return GenerateRequest(
            request_id, token_ids, _NOTHING_SAMPLED, seed=0, max_tokens=1, priority=priority, cache_salt=cache_salt,
            pooling=pooling,
        )  # fmt: skip

    def check_embedding(self, dimensions: int | None) -> None:
        """Raises RequestError for more numbers than a vector has, or none, and where the engine gives no vectors."""
        largest = self.facts.hidden_size
        if not largest:
            raise RequestError(
                f"The engine of {self.facts.name} gives logits alone, and vectors are made of hidden states; build it "
                "again with this version."
            )
        if dimensions is not None and (type(dimensions) is not int or not 1 <= dimensions <= largest):
            raise RequestError(f"dimensions is {dimensions!r}; a vector of {self.facts.name} has 1 to {largest}.")

    def _vocabulary_id(self, what: str, token_id: Any) -> int:
        size = self.facts.vocab_size
        is_integer = isinstance(token_id, Integral) and not isinstance(token_id, bool)  # NumPy's, too
        if not is_integer or not 0 <= token_id < size:
            raise RequestError(f"{what} is {token_id!r}; the vocabulary of {self.facts.name} is 0 to {size - 1}.")
        return int(token_id)


def default_sampling(generation: Mapping[str, Any]) -> SamplingParams:
    """SamplingParams from a generation_config.json, with Hugging Face's meaning of its keys."""
    names = {
        "temperature": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p", "typical_p": "typical_p",
        "repetition_penalty": "repetition_penalty", "no_repeat_ngram_size": "no_repeat_ngram_size",
        "max_new_tokens": "max_tokens",
    }  # fmt: skip
    values = {ours: generation[theirs] for theirs, ours in names.items() if generation.get(theirs) is not None}
    if not generation.get("do_sample", False):
        values["temperature"] = 0.0
        for filter_name in ("top_k", "top_p", "min_p", "typical_p"):
            values.pop(filter_name, None)
    return SamplingParams(**values)


def _check_priority_and_salt(priority: Any, cache_salt: Any) -> None:
    if type(priority) is not int or abs(priority) > LARGEST_INTEGER:
        raise RequestError(f"priority is {priority!r}; it must be a whole number of at most {LARGEST_INTEGER}.")
    if not isinstance(cache_salt, str) or has_lone_surrogate(cache_salt):
        raise RequestError(f"cache_salt is {cache_salt!r}; it must be a string of valid Unicode.")


def _token(tokenizer: Tokenizer, token_id: int | None) -> str | None:
    return None if token_id is None else tokenizer.token(token_id)
