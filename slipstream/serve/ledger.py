"""Ledger: the sequences of all fronts that the engine has and that have not ended, and what was measured of them."""

import time
from dataclasses import dataclass

from slipstream.schema.request import FinishReason, GenerateRequest, TokenEvent
from slipstream.serve.measures import Measures


@dataclass(slots=True)
class _Entry:
    front: bytes
    num_prompt: int
    sent: float  # these three are times of time.monotonic()
    first_token: float = 0.0
    last_token: float = 0.0
    num_generated: int = 0
    is_measured: bool = True


class Ledger:
    def __init__(self, most: int) -> None:
        """most: sequences that may run and wait at a time, over all fronts."""
        self._most = most
        self._entries: dict[str, _Entry] = {}  # by request id
        self.measures = Measures()

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def why_busy(self, num_new: int) -> str | None:
        """Why so many cannot be taken now; None where they can. What is larger than the limit may come alone."""
        num_here = len(self._entries)
        if not num_here or num_here + num_new <= self._most:
            return None
        return f"{num_here} sequences run or wait and {num_new} more would be above {self._most}; try again later."

    def open(self, request: GenerateRequest, front: bytes, sent: float, is_measured: bool = True) -> None:
        """is_measured: False for what is a part of a sequence, such as a later round of a beam search."""
        self._entries[request.request_id] = _Entry(front, len(request.prompt_token_ids), sent, is_measured=is_measured)

    def note(self, event: TokenEvent) -> None:
        """An event has come out of the engine."""
        entry = self._entries.get(event.request_id)
        if entry is None:  # aborted meanwhile
            return
        if event.token_ids and entry.is_measured:
            self._note_tokens(entry, event)
        if event.vector is not None:
            self._note_prefill(time.monotonic() - entry.sent, event)
        if event.finish_reason is not None:
            self.close(event.request_id, event.finish_reason)

    def close(self, request_id: str, reason: FinishReason) -> None:
        entry = self._entries.pop(request_id, None)
        if entry is None or not entry.is_measured:
            return
        measures = self.measures
        measures.request_success[reason] = measures.request_success.get(reason, 0) + 1
        measures.e2e_request_latency_seconds.add(time.monotonic() - entry.sent)
        measures.request_prompt_tokens.add(entry.num_prompt)
        measures.request_generation_tokens.add(entry.num_generated)
        if entry.num_generated:
            measures.request_decode_time_seconds.add(entry.last_token - entry.first_token)

    def of_front(self, front: bytes) -> list[str]:
        return [request_id for request_id, entry in self._entries.items() if entry.front == front]

    def _note_tokens(self, entry: _Entry, event: TokenEvent) -> None:
        now = time.monotonic()
        if not entry.num_generated:
            entry.first_token = now
            seconds = now - entry.sent
            self.measures.time_to_first_token_seconds.add(seconds)
            self._note_prefill(seconds, event)
        else:
            self.measures.inter_token_latency_seconds.add(now - entry.last_token)
        entry.last_token = now
        entry.num_generated += len(event.token_ids)

    def _note_prefill(self, seconds: float, event: TokenEvent) -> None:
        """seconds: from when it was sent to the first that came of it."""
        self.measures.request_queue_time_seconds.add(event.seconds_queued)
        self.measures.request_prefill_time_seconds.add(seconds - event.seconds_queued)
