"""Beam search, driven from above the engine: each round asks for one token of every live beam and keeps the best.

    round 0   prompt ──────────► top candidates ─┬─ end in a stop token ─► finished (the best `width` by score)
    round r   prompt + beam i ─► top candidates ─┘─ the others ──────────► the best `width` live beams of round r + 1

A round is `width` plain greedy requests of one token; prefix reuse in the KV cache makes all but the last token free.
The search is that of transformers' generate(num_beams=width, do_sample=False) (generation/utils.py: _beam_search):
score and length count the stop token, and a candidate may finish only where it is among the round's best `width`.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from slipstream.errors import RequestError
from slipstream.schema.request import FinishReason, GenerateRequest, TokenEvent, TokenLogprobs
from slipstream.schema.sampling import MAX_LOGPROBS, SamplingParams


@dataclass(frozen=True)
class Beam:
    """Output tokens with the logprob of all of them together. A stop token is the last of token_ids."""

    token_ids: tuple[int, ...] = ()
    cumulative_logprob: float = 0.0
    logprobs: tuple[TokenLogprobs, ...] = ()  # one a token; alternatives as far as SamplingParams.logprobs asks
    finish_reason: FinishReason | None = None  # None while live

    def score(self, length_penalty: float) -> float:
        """Orders beams as cumulative_logprob / length ** length_penalty does: minus the logarithm of its size.

        The quotient itself overflows for the penalties that SamplingParams lets through (4096 ** 100).
        """
        if self.cumulative_logprob == 0:
            return math.inf
        return length_penalty * math.log(len(self.token_ids)) - math.log(-self.cumulative_logprob)


class _Candidate(NamedTuple):
    """A live beam and one token that may follow it. Cheap: most of a round's candidates are dropped."""

    beam: Beam
    answer: TokenLogprobs
    token_id: int
    logprob: float
    cumulative_logprob: float


class BeamSearch:
    """One beam search. The caller moves requests and events between it and the engine:

        while not search.done:
            for request in search.requests():
                engine.add(request)
            search.observe(engine.step())
        search.results()

    Raises RequestError where the beams need more alternatives of a token than the engine reports.
    """

    def __init__(
        self,
        request_id: str,
        prompt_token_ids: tuple[int, ...],
        sampling: SamplingParams,
        eos_token_ids: frozenset[int],
        max_tokens: int,
        *,
        priority: int = 0,
        cache_salt: str = "",
    ) -> None:
        self._request_id = request_id
        self._prompt_token_ids = prompt_token_ids
        self._sampling = sampling
        self._stop_ids = eos_token_ids.union(sampling.stop_token_ids)
        self._max_tokens = max_tokens
        self._priority = priority
        self._cache_salt = cache_salt
        self._width = sampling.num_sequences
        # Of one beam's candidates, at most `width` live on and at most len(stop_ids) finish: more cannot matter.
        self._num_candidates = self._width + len(self._stop_ids)
        if self._num_candidates > MAX_LOGPROBS:
            raise RequestError(
                f"best_of is {self._width}, but beam search with {len(self._stop_ids)} stop tokens can keep at most "
                f"{max(0, MAX_LOGPROBS - len(self._stop_ids))} beams."
            )
        self._live: list[Beam] = [Beam()]
        self._finished: list[Beam] = []  # best first
        self._round = 0
        self._unsent = True  # this round's requests have not been handed out
        self._answers: dict[str, TokenLogprobs] = {}  # this round's, by request id
        self.failure: FinishReason | None = None  # ERROR or ABORT, where one of its requests ended so
        self.error: str | None = None  # what the engine said of an ERROR

    @property
    def done(self) -> bool:
        return self.failure is not None or not self._live

    def requests(self) -> list[GenerateRequest]:
        """What the engine must run next: each request once, none while a round is under way."""
        if self.done or not self._unsent:
            return []
        self._unsent = False
        sampling = SamplingParams(
            max_tokens=1,
            temperature=0.0,
            logprobs=max(self._num_candidates, self._sampling.logprobs or 0),
            prompt_logprobs=self._sampling.prompt_logprobs if self._round == 0 else None,
        )
        return [
            GenerateRequest(
                request_id=self._beam_request_id(index),
                prompt_token_ids=self._prompt_token_ids + beam.token_ids,
                sampling=sampling,
                seed=0,
                max_tokens=1,
                priority=self._priority,
                cache_salt=self._cache_salt,
            )
            for index, beam in enumerate(self._live)
        ]

    def observe(self, events: Iterable[TokenEvent]) -> None:
        """Take in what the engine did. Events of other requests are ignored."""
        awaited = {self._beam_request_id(index) for index in range(len(self._live))}
        for event in events:
            if event.request_id not in awaited:
                continue
            if event.finish_reason in (FinishReason.ERROR, FinishReason.ABORT):
                self.fail(event.finish_reason, event.error)
            elif event.logprobs:
                self._answers[event.request_id] = event.logprobs[0]
        if self.failure is None and len(self._answers) == len(self._live):
            self._advance()

    def fail(self, reason: FinishReason, error: str | None = None) -> None:
        """End the search without results. The first reason stays."""
        if self.failure is None:
            self.failure, self.error = reason, error

    def results(self) -> list[Beam]:
        """The best SamplingParams.n finished beams, best first (fewer only where the vocabulary has no more)."""
        return self._finished[: self._sampling.n]

    def _beam_request_id(self, index: int) -> str:
        return f"{self._request_id}/round{self._round}/beam{index}"

    def _advance(self) -> None:
        """End the round: the best candidates of all beams become finished and live beams."""
        ended: list[Beam] = []
        live: list[Beam] = []
        # Stable, so that of equal candidates the better beam's comes first.
        for place, candidate in enumerate(sorted(self._candidates(), key=lambda c: c.cumulative_logprob, reverse=True)):
            finish_reason = self._finish_reason(candidate)
            if finish_reason is None and len(live) < self._width:
                live.append(self._extend(candidate, None))
            elif finish_reason is not None and place < self._width:
                ended.append(self._extend(candidate, finish_reason))
        self._finished = sorted([*self._finished, *ended], key=self._score, reverse=True)[: self._width]
        self._live = live if self._can_improve(live) else []
        self._round += 1
        self._unsent = True
        self._answers = {}

    def _candidates(self) -> Iterator[_Candidate]:
        for index, beam in enumerate(self._live):
            answer = self._answers[self._beam_request_id(index)]
            for token_id, logprob in answer.top[: self._num_candidates]:
                if logprob > -math.inf:
                    yield _Candidate(beam, answer, token_id, logprob, beam.cumulative_logprob + logprob)

    def _finish_reason(self, candidate: _Candidate) -> FinishReason | None:
        if candidate.token_id in self._stop_ids:
            return FinishReason.STOP
        return FinishReason.LENGTH if len(candidate.beam.token_ids) + 1 == self._max_tokens else None

    def _extend(self, candidate: _Candidate, finish_reason: FinishReason | None) -> Beam:
        beam, top = candidate.beam, candidate.answer.top
        rank = 1 + sum(logprob > candidate.logprob for _, logprob in top)
        logprobs = TokenLogprobs(candidate.token_id, candidate.logprob, rank, top[: self._sampling.logprobs or 0])
        return Beam(
            token_ids=(*beam.token_ids, candidate.token_id),
            cumulative_logprob=candidate.cumulative_logprob,
            logprobs=(*beam.logprobs, logprobs),
            finish_reason=finish_reason,
        )

    def _score(self, beam: Beam) -> float:
        return beam.score(self._sampling.length_penalty)

    def _can_improve(self, live: list[Beam]) -> bool:
        """Whether the search goes on. As in transformers, a live beam is judged by its score at its present length."""
        if not live or len(self._finished) < self._width:
            return bool(live)
        return not self._sampling.early_stopping and self._score(live[0]) > self._score(self._finished[-1])
