"""Admission: whether a request can ever run, what a waiting one need not compute, and whether it can start now.

Where running sequences are guaranteed to come to their end (all policies but MAX_UTILIZATION), each is promised the
blocks that it may still take, and another one starts only beside what is promised.
"""

from bisect import bisect_right
from collections.abc import Iterable
from typing import NamedTuple

from slipstream.errors import CapacityError, RequestError
from slipstream.runtime.kv import KVCacheManager, Match
from slipstream.runtime.sequence import Sequence
from slipstream.schema.build import CapacityPolicy, RuntimeConfig
from slipstream.schema.request import GenerateRequest


class Beginning(NamedTuple):
    """What of a sequence need not be computed."""

    match: Match  # from the prefix tree
    num_handed: int = 0  # tokens from another engine, those of `match` among them

    @property
    def num_tokens(self) -> int:
        return max(self.match.num_tokens, self.num_handed)


class Admission:
    """It asks the KV manager and changes nothing."""

    def __init__(self, config: RuntimeConfig, kv: KVCacheManager) -> None:
        self._config, self._kv = config, kv
        self._has_promises = config.capacity_policy is not CapacityPolicy.MAX_UTILIZATION

    # ------------------------------------------------------------------ ever

    def check_request(self, request: GenerateRequest) -> None:
        """RequestError or CapacityError if it could never run."""
        config, num_prompt = self._config, len(request.prompt_token_ids)
        if num_prompt == 0:
            raise RequestError("the prompt has 0 tokens; it needs at least 1.")
        self._check_length(request, num_prompt)
        if not config.enable_chunked_prefill and num_prompt > config.max_num_tokens:
            raise RequestError(
                f"the prompt has {num_prompt} tokens, but without chunked prefill it must fit in one step; "
                f"shorten it to at most {config.max_num_tokens} or set enable_chunked_prefill."
            )
        self._check_capacity(num_prompt, request.max_tokens)

    def _check_length(self, request: GenerateRequest, num_prompt: int) -> None:
        longest = self._config.max_seq_len
        if request.pooling is not None:
            if num_prompt > longest:
                raise RequestError(f"the text has {num_prompt} tokens; shorten it to max_seq_len {longest}.")
            return
        if num_prompt >= longest:
            raise RequestError(
                f"the prompt has {num_prompt} tokens, but prompt and output share max_seq_len {longest}; "
                f"shorten it to at most {longest - 1}."
            )
        room = longest - num_prompt
        if not 1 <= request.max_tokens <= room:
            raise RequestError(
                f"max_tokens is {request.max_tokens}; after {num_prompt} prompt tokens of max_seq_len "
                f"{longest} it must be at least 1 and at most {room}."
            )

    def _check_capacity(self, num_prompt: int, max_tokens: int) -> None:
        def num_needed(num_tokens: int) -> int:
            return self._kv.max_blocks(num_tokens, self._most_in_flight(min(num_prompt, num_tokens), num_tokens))

        if num_needed(num_prompt + max_tokens - 1) <= self._kv.num_total:
            return
        capacity = bisect_right(range(1, self._config.max_seq_len), self._kv.num_total, key=num_needed)
        advice = (
            f"lower max_tokens to {capacity - num_prompt + 1}"
            if num_prompt <= capacity
            else f"shorten the prompt to at most {capacity} tokens"
        )
        raise CapacityError(
            f"the request needs {num_needed(num_prompt + max_tokens - 1)} KV blocks but the pool has "
            f"{self._kv.num_total}; {advice} or raise the KV cache (kv_cache_max_tokens)."
        )

    def _most_in_flight(self, num_to_compute: int, max_computed: int) -> int:
        """Most tokens of a sequence that steps in flight compute from now on.

        Windows move when a step is committed. What was preempted computes all of its tokens again.
        """
        if not self._has_promises:
            num_to_compute = max_computed
        num_steps = max(2, self._config.num_stages)
        num_drafts = (1 + self._config.takes_late_steps) * self._config.max_draft_len
        most = min(num_steps * self._config.max_num_tokens, max(1, num_to_compute) + 1 + num_drafts)
        return most + self._config.tokens_ahead

    # ------------------------------------------------------------------ now

    def beginnings(self, sequence: Sequence) -> list[Beginning]:
        """Where it may begin, best first."""
        if sequence.needs_every_row:
            return [Beginning(Match())]
        matches = self._matches(sequence)
        found = [Beginning(match) for match in matches]
        if sequence.handed_kv is None:
            return found
        num_handed = sequence.num_prompt - 1 - self._config.recomputes_last_found
        if num_handed <= matches[0].num_tokens:
            return found
        return [Beginning(matches[-1].without_copy(), num_handed), *found]

    def _matches(self, sequence: Sequence) -> list[Match]:
        salt, token_ids = sequence.request.cache_salt, sequence.token_ids
        match = self._kv.match(salt, token_ids)
        if self._config.recomputes_last_found:
            match = self._kv.match(salt, token_ids[: match.num_tokens])
        # The source of a copy is one block more than the request itself needs: in a tight pool, go without it.
        return [match] if match.source is None else [match, match.without_copy()]

    def can_start(self, sequence: Sequence, match: Match, end: int, num_promised: int) -> bool:
        """Whether it can begin with `match` and compute up to `end`; num_promised: blocks that are others'."""
        if not self._has_promises:
            return self._kv.can_admit(match, end)
        chunk = self._most_in_flight(sequence.num_known - match.num_tokens, sequence.max_computed)
        num_reserved = num_promised - self._kv.num_in_windows
        return self._kv.can_promise(match, sequence.max_computed, chunk, num_reserved)

    def promised(self, running: Iterable[Sequence]) -> int:
        """Blocks that are these sequences', whatever they generate."""
        return sum(map(self._promised, running)) if self._has_promises else 0

    def _promised(self, sequence: Sequence) -> int:
        chunk = 1  # where there is a window, how far it may be behind
        if self._kv.has_windows:
            chunk = self._most_in_flight(sequence.num_known - sequence.num_computed, sequence.max_computed)
        return self._kv.promised(sequence.table, sequence.max_computed, chunk)

    def check(self, running: Iterable[Sequence]) -> None:
        """Prove that what was promised is there."""
        if self._has_promises:
            num_reserved = self.promised(running) - self._kv.num_in_windows
            assert 0 <= num_reserved <= self._kv.num_available, f"{num_reserved} blocks are promised, too many"
