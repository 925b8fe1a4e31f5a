"""The inputs of the model `tensorrt_llm` as one of our requests: each is honoured, or refused by name."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from slipstream.api.requests import RequestMaker
from slipstream.errors import RequestError
from slipstream.schema.request import GenerateRequest
from slipstream.schema.sampling import SamplingParams
from slipstream.serve.triton.wire import Inputs
from slipstream.serve.triton.words import unpack_words

_NO_END = -1  # end_id of a text that nothing but its length ends

_PLAIN = {  # Triton's name: ours
    "repetition_penalty": "repetition_penalty",
    "min_length": "min_tokens",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "random_seed": "seed",
}
_NOT_HERE = ("return_context_logits", "return_generation_logits")


@dataclass(frozen=True)
class Ask:
    """One sequence to generate, and how its answer is wanted."""

    make: Callable[[str], GenerateRequest]  # from an id of ours
    name: str  # Triton's request id; a `stop` names it
    streaming: bool
    return_log_probs: bool
    pad_id: int


def read_ask(inputs: Inputs, maker: RequestMaker, *, max_beam_width: int, decoupled: bool) -> Ask:
    """Raises RequestError for what cannot be done."""
    inputs.refuse_parameters()
    for name in _NOT_HERE:
        if inputs.one(name):
            raise RequestError(f"{name} is true, but no logits are sent; use return_log_probs.")
    streaming = bool(inputs.one("streaming"))
    if streaming and not decoupled:
        raise RequestError(
            "stream is true, but the models were filled in with decoupled_mode:False; fill in True to stream."
        )
    beams = _beam_width(inputs, max_beam_width, streaming)
    token_ids = maker.encode(_token_ids(inputs))
    sampling = _sampling(inputs, maker, beams)
    end_id, pad_id = inputs.one("end_id"), inputs.one("pad_id")
    changes: dict[str, Any] = {"bad_words_ids": tuple(unpack_words(inputs.array("bad_words_list"), "bad_words_list"))}
    if end_id is not None:
        changes["eos_token_ids"] = frozenset() if end_id == _NO_END else frozenset(maker.encode([end_id]))
    for word in changes["bad_words_ids"]:
        maker.encode(word)  # refuses ids outside the vocabulary
    first_id = next(iter(maker.facts.eos_token_ids), 0)
    return Ask(
        make=lambda request_id: replace(maker.request(request_id, token_ids, sampling), **changes),
        name=inputs.request_id,
        streaming=streaming,
        return_log_probs=sampling.logprobs is not None,
        pad_id=first_id if pad_id is None else pad_id,
    )


def _beam_width(inputs: Inputs, most: int, streaming: bool) -> int:
    beams = inputs.one("beam_width")
    if beams is None:
        return 1
    if not 1 <= beams <= most:
        raise RequestError(f"beam_width is {beams}; it must be 1 to {most} (max_beam_width of tensorrt_llm).")
    if beams > 1 and streaming:
        raise RequestError(f"stream is true, but of {beams} beams the best are known at the end; leave one out.")
    return int(beams)


def _token_ids(inputs: Inputs) -> list[int]:
    given, length = inputs.array("input_ids"), inputs.one("input_lengths")
    token_ids = [] if given is None else given.reshape(-1).tolist()
    if not 0 <= length <= len(token_ids):
        raise RequestError(f"input_lengths is {length}, but input_ids holds {len(token_ids)}; give at most that.")
    return token_ids[:length]


def _sampling(inputs: Inputs, maker: RequestMaker, beams: int) -> SamplingParams:
    values = {ours: inputs.one(name) for name, ours in _PLAIN.items()}
    values = {name: value for name, value in values.items() if value is not None}
    values["max_tokens"] = inputs.one("request_output_len")
    values["stop"] = [_word(maker, ids) for ids in unpack_words(inputs.array("stop_words_list"), "stop_words_list")]
    values["logit_bias"] = _logit_bias(inputs.array("embedding_bias"))
    length_penalty = inputs.one("len_penalty")
    if beams > 1:
        values |= {"use_beam_search": True, "n": beams, "best_of": beams}
        if length_penalty is not None:
            values["length_penalty"] = length_penalty
    elif length_penalty not in (None, 1.0):
        raise RequestError(
            f"length_penalty is {length_penalty}, which means something only to a beam search; leave it out."
        )
    if inputs.one("return_log_probs"):
        values["logprobs"] = 0
    return SamplingParams(**values, **_choosing(inputs))


def _choosing(inputs: Inputs) -> dict[str, Any]:
    """TensorRT-LLM's defaults: with neither top_k nor top_p (0 is none) the likeliest token is taken."""
    top_k, top_p = inputs.one("runtime_top_k") or 0, inputs.one("runtime_top_p") or 0.0
    temperature = inputs.one("temperature")
    if top_k or top_p:
        return {"temperature": 1.0 if temperature is None else temperature, "top_k": top_k, "top_p": top_p or 1.0}
    if temperature not in (None, 0.0, 1.0):
        raise RequestError(
            f"temperature is {temperature}, but without top_k and top_p the likeliest token is always taken; add "
            "top_p 1.0 to draw from all tokens."
        )
    return {"temperature": 0.0}


def _word(maker: RequestMaker, token_ids: tuple[int, ...]) -> str:
    """A stop word is looked for in the text, however that is cut into tokens."""
    return maker.tokenizer.decode(maker.encode(token_ids), skip_special_tokens=False)


def _logit_bias(bias: np.ndarray | None) -> dict[int, float] | None:
    if bias is None or not bias.any():
        return None
    flat = bias.reshape(-1)
    return {int(token_id): float(flat[token_id]) for token_id in np.flatnonzero(flat)}
