"""What goes into the engine and what comes out of it."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from enum import StrEnum
from itertools import zip_longest
from typing import NamedTuple

from slipstream.schema.sampling import SamplingParams


class FinishReason(StrEnum):
    STOP = "stop"  # end-of-sequence token, stop token id or stop string
    LENGTH = "length"  # max_tokens or the engine's sequence limit
    ABORT = "abort"  # the caller gave up
    ERROR = "error"  # this request failed; TokenEvent.error says why


class Pooling(StrEnum):
    """How the last layer's normed hidden states of a text become one vector."""

    MEAN = "mean"  # over all tokens
    LAST = "last"  # the last token's


@dataclass(frozen=True)
class GenerateRequest:
    """One sequence to generate: valid by construction, no text in it. n > 1 becomes n of these, one seed each.

    Or, with pooling, one to compute: it ends with a vector instead of tokens, its max_tokens is 1 and sampling says
    nothing.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    seed: int  # always set; drawn at random where the user gave none
    max_tokens: int  # resolved: never past the engine's sequence limit
    eos_token_ids: frozenset[int] = frozenset()  # empty where ignore_eos
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    priority: int = 0  # lower runs first
    cache_salt: str = ""  # requests share cached KV blocks only within one salt
    after: str | None = None  # wait until this request's prompt is computed, then share its blocks
    pooling: Pooling | None = None
    kv_to: str | None = None  # an empty file, which has the KV of the prompt when the first token comes
    kv_from: str | None = None  # such a file, of all the prompt but its last token


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities at one position, of the model itself (before temperature, penalties and filters)."""

    token_id: int
    logprob: float
    rank: int  # 1 is the most likely token
    top: tuple[tuple[int, float], ...] = ()  # (token id, logprob), most likely first


class TokenEvent(NamedTuple):
    """What one step did for one request."""

    request_id: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()  # one a token, where asked for
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None  # once, when the prompt is done; None for token 0
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None  # the token that ended it, where one did
    error: str | None = None
    num_cached_tokens: int = 0  # prompt tokens whose KV came from the prefix cache
    seconds_queued: float = 0.0  # with the first token or the vector: between its coming and the step that began it
    is_refused: bool = False  # with an error: the request itself was at fault, and would be again
    is_busy: bool = False  # with an error: too many wait, later there may be room
    vector: bytes | None = None  # with the end of one that pools: hidden_size numbers, little-endian float32


class RequestState(NamedTuple):
    """Of one that has not ended, for whoever looks for what is wrong."""

    request_id: str
    is_running: bool
    num_prompt: int
    num_computed: int
    num_generated: int

    def describe(self) -> str:
        state = "running" if self.is_running else "waiting"
        return (
            f"{self.request_id} {state}: {self.num_prompt} prompt tokens, {self.num_generated} generated, "
            f"{self.num_computed} computed"
        )


@dataclass(frozen=True)
class EngineStats:
    """A snapshot for progress lines and metrics."""

    num_running: int = 0
    num_waiting: int = 0
    num_blocks_used: int = 0  # held by requests (cached but idle blocks not counted)
    num_blocks_total: int = 0
    num_preemptions: int = 0
    num_steps: int = 0
    prompt_tokens: int = 0  # of sequences that started
    prompt_tokens_computed: int = 0
    prompt_tokens_cached: int = 0
    generated_tokens: int = 0
    num_drafts: int = 0  # steps of a sequence that verified drafts
    num_draft_tokens: int = 0  # that they verified
    num_accepted_tokens: tuple[int, ...] = ()  # by place in the draft, the first token's first; () without drafting
    num_drafts_asked: int = 0  # for the next step of the running sequences

    @classmethod
    def together(cls, stats: "Sequence[EngineStats]") -> "EngineStats":
        """The sums of several engines'."""
        by_place = zip_longest(*(each.num_accepted_tokens for each in stats), fillvalue=0)
        names = [field.name for field in fields(cls) if field.name != "num_accepted_tokens"]
        counts = {name: sum(getattr(each, name) for each in stats) for name in names}
        return cls(**counts, num_accepted_tokens=tuple(map(sum, by_place)))
