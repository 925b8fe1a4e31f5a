"""Handles where something goes wrong: what failed comes last, and every failure looks alike."""

from typing import Any

import pytest

from slipstream.api.handles import BeamHandle, Handle, SamplingHandle
from slipstream.errors import SlipstreamError
from slipstream.schema.request import FinishReason, GenerateRequest, TokenEvent, TokenLogprobs
from slipstream.schema.sampling import SamplingParams


class FakeLoop:
    """Takes requests until it is closed; the test answers them."""

    def __init__(self) -> None:
        self.requests: list[GenerateRequest] = []
        self.is_closed = False

    def submit(self, request: GenerateRequest, sink: Any) -> None:
        if self.is_closed:
            raise SlipstreamError("The engine is closed; open it again to generate.")
        self.requests.append(request)

    def abort(self, request_id: str) -> None:
        pass


def started(kind: type[Handle], loop: Any, **fields: Any) -> Handle:
    sampling = SamplingParams(max_tokens=2, **fields)
    handle = kind(loop, None, None, GenerateRequest("r", (1, 2), sampling, seed=0, max_tokens=2), print)
    handle.start()
    return handle


def said(request: GenerateRequest, logprob: float) -> TokenEvent:
    top = ((4, logprob), (5, logprob - 1), (6, logprob - 2))
    return TokenEvent(
        request.request_id, (4,), (TokenLogprobs(4, logprob, 1, top),), finish_reason=FinishReason.LENGTH
    )  # fmt: skip


@pytest.mark.parametrize("reason", [FinishReason.ERROR, FinishReason.ABORT])
def test_the_best_are_those_that_did_not_fail(reason: FinishReason) -> None:
    loop = FakeLoop()
    handle = started(SamplingHandle, loop, n=2, best_of=3, temperature=1)
    failed, likely, unlikely = loop.requests
    handle.push(TokenEvent(failed.request_id, finish_reason=reason))
    handle.push(said(unlikely, -9.0))
    handle.push(said(likely, -0.5))
    assert [each.cumulative_logprob for each in handle.output().outputs] == [-0.5, -9.0]


@pytest.mark.parametrize("reason", [FinishReason.ERROR, FinishReason.ABORT])
@pytest.mark.parametrize("kind", [BeamHandle, SamplingHandle])
def test_a_failure_is_one_completion_that_says_so(kind: type[Handle], reason: FinishReason) -> None:
    loop = FakeLoop()
    handle = started(kind, loop, use_beam_search=kind is BeamHandle, best_of=2 if kind is BeamHandle else 1)
    error = "no" if reason is FinishReason.ERROR else None
    handle.push(TokenEvent(loop.requests[0].request_id, finish_reason=reason, error=error))
    output = handle.output()
    assert output.finished and output.error == error
    assert [(each.finish_reason, each.text, each.token_ids) for each in output.outputs] == [(str(reason), "", [])]


def test_a_beam_search_whose_engine_is_closed_between_rounds_ends_as_aborted() -> None:
    loop = FakeLoop()
    handle = started(BeamHandle, loop, use_beam_search=True, n=2)
    loop.is_closed = True
    handle.push(said(loop.requests[0], -0.5))
    output = handle.output()
    assert output.finished and output.error is None and output.outputs[0].finish_reason == "abort"


def test_a_beam_search_cannot_start_on_a_closed_engine() -> None:
    loop = FakeLoop()
    loop.is_closed = True
    with pytest.raises(SlipstreamError, match="closed"):
        started(BeamHandle, loop, use_beam_search=True, n=2)
