"""Handles: one caller's request, from what is sent to the engine to the outputs built from its events."""

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from slipstream.api.outputs import CompletionOutput, RequestOutput
from slipstream.errors import SlipstreamError
from slipstream.runtime.beam import BeamSearch
from slipstream.schema.request import FinishReason, GenerateRequest, TokenEvent, TokenLogprobs
from slipstream.text.completion import Completion
from slipstream.text.tokenizer import Tokenizer


class EngineDoor(Protocol):
    """Where requests go in: this process's loop (runtime/loop.py), or the way to another one (serve/connection.py)."""

    def submit(self, request: GenerateRequest, sink: Callable[[TokenEvent], None]) -> None: ...

    def abort(self, request_id: str) -> None: ...

    def stop(self, request_id: str) -> None:
        """As abort, where the text has come to a stop string."""


class Handle:
    """One caller's request: what was sent to the engine, and the completions built from what came back."""

    def __init__(
        self,
        engine: EngineDoor,
        tokenizer: Tokenizer | None,
        prompt: str | None,
        request: GenerateRequest,
        sink: Callable[[TokenEvent], None],
    ) -> None:
        self._engine, self._tokenizer, self._prompt = engine, tokenizer, prompt
        self._request, self._sampling, self._sink = request, request.sampling, sink
        self._running: set[str] = set()  # ids the engine knows
        self._prompt_logprobs: list[TokenLogprobs | None] | None = None
        self._num_cached_tokens: int | None = None
        self.has_news = False  # something to stream since the last output()

    def start(self) -> None:
        raise NotImplementedError

    def push(self, event: TokenEvent) -> None:
        raise NotImplementedError

    def output(self) -> RequestOutput:
        raise NotImplementedError

    @property
    def finished(self) -> bool:
        raise NotImplementedError

    def abort(self) -> None:
        """Stop whatever still runs; nothing to do once finished."""
        for request_id in self._running:
            self._engine.abort(request_id)
        self._running.clear()

    def _submit(self, request: GenerateRequest) -> None:
        self._running.add(request.request_id)
        self._engine.submit(request, self._sink)

    def _note(self, event: TokenEvent) -> None:
        if event.prompt_logprobs is not None:
            self._prompt_logprobs = list(event.prompt_logprobs)
        if self._num_cached_tokens is None:  # of the first sequence: the others find what that one computed
            self._num_cached_tokens = event.num_cached_tokens
        if event.finish_reason is not None:
            self._running.discard(event.request_id)

    def _describe(self, outputs: list[CompletionOutput], error: str | None) -> RequestOutput:
        return RequestOutput(
            request_id=self._request.request_id,
            prompt=self._prompt,
            prompt_token_ids=list(self._request.prompt_token_ids),
            outputs=outputs,
            prompt_logprobs=self._prompt_logprobs,
            finished=self.finished,
            num_cached_tokens=self._num_cached_tokens or 0,
            error=error,
        )


class SamplingHandle(Handle):
    """best_of sequences, each a request of its own; the first computes the prompt, the others share its blocks.

    Where best_of is above n there is nothing to stream: which of them are the best shows at the end.
    """

    def start(self) -> None:
        first = self._request
        self._ranks = self._sampling.num_sequences > self._sampling.n
        if self._ranks and self._sampling.logprobs is None:  # choosing the best of several needs their likelihood
            first = replace(first, sampling=replace(self._sampling, logprobs=0))
        self._completions: dict[str, Completion] = {}
        self._news: dict[str, str] = {}
        self._unchanged: dict[str, CompletionOutput] = {}  # since the last output(), by request id
        for index in range(self._sampling.num_sequences):
            request = first if index == 0 else _follower(first, index)
            self._completions[request.request_id] = Completion(
                self._tokenizer, request.prompt_token_ids, self._sampling
            )
            self._submit(request)

    def push(self, event: TokenEvent) -> None:
        self._note(event)
        completion = self._completions[event.request_id]
        new_text = completion.push(event)
        self._unchanged.pop(event.request_id, None)
        self._news[event.request_id] = self._news.get(event.request_id, "") + new_text
        self.has_news |= not self._ranks and bool(new_text or event.token_ids)
        if completion.stopped_by_text and event.request_id in self._running:
            self._running.discard(event.request_id)
            self._engine.stop(event.request_id)

    @property
    def finished(self) -> bool:
        return all(completion.finish_reason is not None for completion in self._completions.values())

    def output(self) -> RequestOutput:
        outputs = [
            self._unchanged.get(request_id) or self._built(index, request_id)
            for index, request_id in enumerate(self._completions)
        ]
        self.has_news = False
        if self.finished and self._ranks:
            best = sorted(outputs, key=_likelihood, reverse=True)
            outputs = [replace(output, index=index) for index, output in enumerate(best[: self._sampling.n])]
        errors = [completion.error for completion in self._completions.values() if completion.error]
        return self._describe(outputs, errors[0] if errors else None)

    def _built(self, index: int, request_id: str) -> CompletionOutput:
        completion = self._completions[request_id]
        built = CompletionOutput(
            index=index,
            text=completion.text,
            token_ids=list(completion.token_ids),
            cumulative_logprob=completion.cumulative_logprob,
            logprobs=None if self._sampling.logprobs is None else list(completion.logprobs),
            finish_reason=completion.finish_reason and str(completion.finish_reason),
            stop_reason=completion.stop_reason,
            text_diff=self._news.pop(request_id, ""),
        )
        self._unchanged[request_id] = replace(built, text_diff="")
        return built


def make_handle(
    engine: EngineDoor,
    tokenizer: Tokenizer | None,
    prompt: str | None,
    request: GenerateRequest,
    sink: Callable[[TokenEvent], None],
) -> Handle:
    """The handle of a request, not started yet. sink: gets each event, to be pushed into the handle by its owner."""
    kind: type[Handle] = BeamHandle if request.sampling.use_beam_search else SamplingHandle
    if request.pooling is not None:
        kind = PoolingHandle
    return kind(engine, tokenizer, prompt, request, sink)


def _likelihood(output: CompletionOutput) -> tuple[bool, float]:
    """Orders completions; those that failed or were aborted come after all that are whole."""
    is_whole = output.finish_reason in (FinishReason.STOP, FinishReason.LENGTH)
    return is_whole, output.cumulative_logprob or 0.0


def _follower(first: GenerateRequest, index: int) -> GenerateRequest:
    return replace(
        first,
        request_id=f"{first.request_id}.{index}",
        seed=(first.seed + index) % 2**63,
        after=first.request_id,
        kv_from=None,
        sampling=replace(first.sampling, prompt_logprobs=None),
    )


class PoolingHandle(Handle):
    """A text that becomes a vector: one request with one event."""

    _end: TokenEvent | None = None

    def start(self) -> None:
        self._submit(self._request)

    def push(self, event: TokenEvent) -> None:
        self._note(event)
        self._end = event

    @property
    def finished(self) -> bool:
        return self._end is not None

    def output(self) -> RequestOutput:
        assert self._end is not None, "there is nothing to stream"
        why = None if self._end.vector is not None else self._end.error or "The engine was closed before its vector."
        return replace(self._describe([], why), vector=self._end.vector)


class BeamHandle(Handle):
    """A beam search: rounds of one-token requests, which the prefix cache makes cheap."""

    def start(self) -> None:
        request = self._request
        self._search = BeamSearch(
            request.request_id, request.prompt_token_ids, self._sampling, request.eos_token_ids, request.max_tokens,
            priority=request.priority, cache_salt=request.cache_salt,
        )  # fmt: skip
        self._send_round()

    def _send_round(self) -> None:
        for request in self._search.requests():
            self._submit(request)

    def push(self, event: TokenEvent) -> None:
        self._note(event)
        self._search.observe([event])
        try:
            self._send_round()
        except SlipstreamError:  # the engine was closed between two rounds
            self._search.fail(FinishReason.ABORT)

    @property
    def finished(self) -> bool:
        return self._search.done

    def output(self) -> RequestOutput:
        if self._search.failure is not None:
            failed = CompletionOutput(0, "", [], finish_reason=str(self._search.failure))
            return self._describe([failed], self._search.error)
        outputs = []
        for index, beam in enumerate(self._search.results()):
            completion = Completion(self._tokenizer, self._request.prompt_token_ids, self._sampling)
            stopped = beam.finish_reason is FinishReason.STOP
            stop_id = beam.token_ids[-1] if stopped else None
            event = TokenEvent("", beam.token_ids, beam.logprobs, None, beam.finish_reason, stop_id)
            completion.push(event)
            outputs.append(
                CompletionOutput(
                    index=index,
                    text=completion.text,
                    token_ids=list(beam.token_ids),
                    cumulative_logprob=beam.cumulative_logprob,
                    logprobs=None if self._sampling.logprobs is None else list(beam.logprobs),
                    finish_reason=beam.finish_reason and str(beam.finish_reason),
                    stop_reason=stop_id,
                    text_diff=completion.text,
                )
            )
        return self._describe(outputs, None)
