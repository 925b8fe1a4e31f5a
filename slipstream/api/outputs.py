"""What a caller gets: plain values, no handles into the engine."""

from dataclasses import dataclass, field

from slipstream.schema.request import TokenLogprobs
from slipstream.text.tools import ToolCall


@dataclass(frozen=True)
class CompletionOutput:
    """One completion of a request, whole or so far."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: str | None = None  # stop, length, abort, error; None while it runs
    stop_reason: int | str | None = None  # the token id or string that stopped it
    text_diff: str = ""  # streaming: what is new since the last output
    content: str | None = None  # of chat(): the text without the two below
    reasoning: str | None = None
    tool_calls: list[ToolCall] = field(default_factory=list)


@dataclass(frozen=True)
class RequestOutput:
    """A request with its completions, best first where best_of or beams chose among them."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    finished: bool = False
    num_cached_tokens: int = 0  # prompt tokens that were not computed again
    error: str | None = None  # why this request failed, where others of its batch went on
    vector: bytes | None = None  # instead of outputs, of a request that pools: hidden_size numbers in float32


@dataclass(frozen=True)
class ScoreOutput:
    """How likely the model finds a given text: one logprob a token; the first token has no context, so none."""

    token_ids: list[int]
    logprobs: list[float | None] = field(default_factory=list)

    @property
    def total_logprob(self) -> float:
        return sum(logprob for logprob in self.logprobs if logprob is not None)
