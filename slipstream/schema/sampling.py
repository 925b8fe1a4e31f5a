"""SamplingParams: how to choose the next token, validated once, here."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from slipstream.errors import RequestError
from slipstream.schema.guided import Guided, has_lone_surrogate

# Takes the token ids known so far (prompt and output) and the float32 logits [vocab_size]; returns logits.
LogitsProcessor = Callable[[list[int], Any], Any]

LARGEST_INTEGER = 2**63 - 1  # that crosses to another process
MAX_LOGPROBS = 100
MAX_SEQUENCES = 256
MIN_TEMPERATURE = 1e-5  # below this, logits divided by it would overflow, and only the largest could win: greedy

_SWITCHES = ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens", "use_beam_search", "early_stopping")

# A beam search compares whole sequences by the model's own logprobs: nothing edits, cuts or draws from them. Stop
# strings would need text; stop_token_ids work.
_NEUTRAL_FOR_BEAMS: dict[str, Any] = {
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "typical_p": 1.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "no_repeat_ngram_size": 0,
    "logit_bias": None,
    "bad_words": (),
    "stop": (),
    "min_tokens": 0,
    "logits_processors": (),
    "guided": None,
}


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one request samples. Names and meanings follow vLLM's and TensorRT-LLM's LLM API where those agree.

    Order of the filters: logit_bias, bad words, n-gram ban, penalties and min_tokens edit the logits; user
    processors see the result; what `guided` does not allow goes; then temperature, top_k, typical_p, top_p, min_p cut
    the distribution.
    Reported logprobs are those of the model itself, before any of this.
    """

    n: int = 1  # completions returned
    best_of: int | None = None  # completions made, of which the n most likely are returned; default n
    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # 0 keeps all
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0  # > 1 discourages tokens of prompt and output (CTRL, arXiv:1909.05858)
    presence_penalty: float = 0.0  # subtracted once from each token already in the output
    frequency_penalty: float = 0.0  # subtracted once per occurrence in the output
    no_repeat_ngram_size: int = 0  # no n-gram of this size occurs twice; 0 is off
    logit_bias: Mapping[int, float] | None = None
    bad_words: str | Sequence[str] = ()
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    max_tokens: int | None = 16  # None: until the sequence limit of the engine
    min_tokens: int = 0  # neither end-of-sequence nor a stop before this many tokens
    seed: int | None = None  # the same seed gives the same tokens whatever else is in the batch
    logprobs: int | None = None  # this many most likely alternatives beside each output token
    prompt_logprobs: int | None = None
    logits_processors: Sequence[LogitsProcessor] = ()
    guided: Guided | None = None  # the output as a whole matches a JSON schema, regex, choice or grammar
    skip_special_tokens: bool = True
    use_beam_search: bool = False  # best_of (or n) beams
    length_penalty: float = 1.0  # beam score = sum of logprobs / length ** length_penalty
    early_stopping: bool = False  # stop a beam search once best_of beams have ended

    def __post_init__(self) -> None:
        for name in ("stop", "bad_words", "stop_token_ids", "logits_processors"):
            object.__setattr__(self, name, _tuple(name, getattr(self, name)))
        if self.top_k == -1:  # vLLM's spelling of "keep all"
            object.__setattr__(self, "top_k", 0)
        if self.best_of is None:
            object.__setattr__(self, "best_of", self.n)
        self._check_numbers()
        self._check_lists()
        self._check_guided()
        self._check_combinations()

    @property
    def num_sequences(self) -> int:
        """Completions made (best_of, which is n unless given)."""
        return self.n if self.best_of is None else self.best_of

    @property
    def is_greedy(self) -> bool:
        return self.temperature < MIN_TEMPERATURE or self.top_k == 1

    def _check_numbers(self) -> None:
        _integer("n", self.n, 1, MAX_SEQUENCES)
        _integer("best_of", self.num_sequences, self.n, MAX_SEQUENCES)
        _real("temperature", self.temperature, 0.0, 100.0)
        _integer("top_k", self.top_k, 0, None)
        _real("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _real("min_p", self.min_p, 0.0, 1.0)
        _real("typical_p", self.typical_p, 0.0, 1.0, open_low=True)
        _real("repetition_penalty", self.repetition_penalty, 0.0, 100.0, open_low=True)
        _real("presence_penalty", self.presence_penalty, -100.0, 100.0)
        _real("frequency_penalty", self.frequency_penalty, -100.0, 100.0)
        _real("length_penalty", self.length_penalty, -100.0, 100.0)
        _integer("no_repeat_ngram_size", self.no_repeat_ngram_size, 0, None)
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, 1, None)
        _integer("min_tokens", self.min_tokens, 0, self.max_tokens)
        if self.seed is not None:
            _integer("seed", self.seed, 0, LARGEST_INTEGER)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _integer(name, getattr(self, name), 0, MAX_LOGPROBS)
        for name in _SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise RequestError(f"{name} is {getattr(self, name)!r}; it must be True or False.")

    def _check_lists(self) -> None:
        for name in ("stop", "bad_words"):
            for word in getattr(self, name):
                if not isinstance(word, str) or not word:
                    raise RequestError(f"{name} holds {word!r}; each entry must be a string that is not empty.")
                if has_lone_surrogate(word):
                    raise RequestError(f"{name} holds {word!r}, which no text can have; send valid Unicode.")
        for token_id in self.stop_token_ids:
            _integer("stop_token_ids", token_id, 0, None)
        if not isinstance(self.logit_bias, Mapping | None):
            raise RequestError(f"logit_bias is {self.logit_bias!r}; it must be a dict such as {{token_id: bias}}.")
        for token_id, bias in (self.logit_bias or {}).items():
            _integer("logit_bias token id", token_id, 0, None)
            _real(f"logit_bias[{token_id}]", bias, -1000.0, 1000.0)
        for processor in self.logits_processors:
            if not callable(processor):
                raise RequestError(f"logits_processors holds {processor!r}; each must be callable(token_ids, logits).")

    def _check_guided(self) -> None:
        if not isinstance(self.guided, Guided | None):
            raise RequestError(f"guided is {self.guided!r}; it must be Guided(...), such as Guided(regex='[0-9]+').")
        for name in ("ignore_eos", "min_tokens"):
            if self.guided is not None and getattr(self, name):
                raise RequestError(
                    f"{name} is {getattr(self, name)!r}, but with guided its grammar says where a text may end; "
                    f"leave {name} out."
                )

    def _check_combinations(self) -> None:
        if self.use_beam_search:
            if self.num_sequences == 1:
                raise RequestError(
                    "use_beam_search with one beam is greedy search; set best_of (the beams) to 2 or more."
                )
            for name, neutral in _NEUTRAL_FOR_BEAMS.items():
                value = getattr(self, name)
                if (
                    value and value != neutral
                ):  # what is falsy is neutral (an empty dict, temperature 0) or refused above
                    raise RequestError(
                        f"{name} is {value!r}, which has no meaning with use_beam_search; leave it at {neutral!r}."
                    )
        elif self.is_greedy and self.num_sequences > 1:
            raise RequestError(
                f"n={self.n}, best_of={self.num_sequences} with greedy sampling would return equal texts; "
                "set temperature above 0 or n and best_of to 1."
            )


def _tuple(name: str, value: Any) -> tuple[Any, ...]:
    """None is an empty list, and one word is a list of it, as in vLLM."""
    if value is None:
        return ()
    if isinstance(value, str) and name in ("stop", "bad_words"):
        return (value,)
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        raise RequestError(f"{name} is {value!r}; it must be a list.")
    return tuple(value)


def _integer(name: str, value: Any, low: int, high: int | None) -> None:
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    most = LARGEST_INTEGER if high is None else high
    if not is_integer or not low <= value <= most:
        upper = f" and at most {most}" if high is not None or (is_integer and value > most) else ""
        raise RequestError(f"{name} is {value!r}; it must be a whole number of at least {low}{upper}.")


def _real(name: str, value: Any, low: float, high: float, *, open_low: bool = False) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not low <= value <= high or (open_low and value == low):  # NaN is not between anything
        word = "above" if open_low else "at least"
        raise RequestError(f"{name} is {value!r}; it must be a number {word} {low:g} and at most {high:g}.")
