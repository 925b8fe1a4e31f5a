"""Which recording a step runs in: its own size's, or a larger one's until that is worth recording. No GPU is needed."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slipstream.runtime.worker import recorded
from slipstream.runtime.worker.ending import CATCHING_UP, EndingPlan
from slipstream.runtime.worker.inputs import StepSizes
from slipstream.runtime.worker.recorded import WORTH_RECORDING, RecordedSteps, _Kind
from slipstream.runtime.worker.tables import BlockTables

FULL = EndingPlan(9, 8)
MOST_SEQUENCES, MOST_TOKENS = 64, 2048


class Unrecorded(RecordedSteps):
    """Recordings of nothing."""

    def _record(self, kind: _Kind) -> Any:
        return object()


def started(*endings: EndingPlan) -> Unrecorded:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
        tables = BlockTables(1, MOST_SEQUENCES, 16)
        steps = Unrecorded(lambda *_: None, tables, MOST_SEQUENCES, 9 * MOST_SEQUENCES, torch.device("cpu"), None)  # type: ignore[arg-type,return-value]
    steps.record_short(1, MOST_TOKENS, None, endings)
    return steps


def kind_of(steps: RecordedSteps, num_tokens: int, num_sequences: int, ending: EndingPlan | None, width: int) -> _Kind:
    kind = steps._kind(StepSizes(num_tokens, num_sequences, num_sequences, width, 1), ending)
    assert kind is not None
    return kind


@given(
    st.lists(st.tuples(st.integers(1, 64), st.integers(1, 9), st.sampled_from((None, FULL)), st.sampled_from((1, 80))))
)
def test_whatever_serves_a_step_has_room_for_it(asked: list[tuple[int, int, EndingPlan | None, int]]) -> None:
    steps = started(FULL)
    for num_sequences, rows_each, ending, width in asked:
        wanted = kind_of(steps, num_sequences * rows_each, num_sequences, ending, width)
        served = steps._serving(wanted)
        assert served is not None and steps._recordings[served] is not None
        assert served.ending == wanted.ending and wanted.sizes.fit_into(served.sizes)
        whole = 320 if ending else 0  # the size of 32 trees, all of whose nodes are there
        assert served.sizes.num_tokens <= max(recorded.FEW_TOKENS, 2 * wanted.sizes.num_tokens, 2 * whole)


def test_a_size_is_recorded_when_it_was_needed_often() -> None:
    steps = started(FULL)
    wanted, before = kind_of(steps, 200, 20, FULL, 1), steps.num_recordings
    for _ in range(WORTH_RECORDING - 1):
        assert steps._serving(wanted) != wanted
    assert steps.num_recordings == before
    assert steps._serving(wanted) == wanted and steps.num_recordings == before + 1


def test_a_size_that_nothing_serves_is_recorded_at_once() -> None:
    steps = started()
    wanted = kind_of(steps, 200, 40, FULL, 1)
    assert steps._serving(wanted) == wanted


def test_no_step_of_short_texts_waits_for_a_recording() -> None:
    """In none of a decoding batch, with drafts, without, or reading what a draft model has missed."""
    steps = started(FULL, CATCHING_UP)
    before = steps.num_recordings
    for num_sequences in range(1, MOST_SEQUENCES + 1):
        for num_tokens in range(num_sequences, 9 * num_sequences + 1):
            for ending in (FULL, CATCHING_UP):
                steps._serving(kind_of(steps, num_tokens, num_sequences, ending, 1))
            steps._num_needed.clear()
        steps._serving(kind_of(steps, num_sequences, num_sequences, None, 1))
    assert steps.num_recordings == before


def test_what_a_draft_model_missed_of_a_long_text_runs_from_python_at_first() -> None:
    steps = started(FULL, CATCHING_UP)
    wanted = kind_of(steps, 100, 3, CATCHING_UP, 80)
    assert [steps._serving(wanted) for _ in range(WORTH_RECORDING)] == [None] * (WORTH_RECORDING - 1) + [wanted]


def test_a_long_prompt_runs_in_a_recording_hardly_larger() -> None:
    steps = started()
    large = kind_of(steps, 2048, 1, None, 80)
    assert steps._serving(large) == large
    small = kind_of(steps, 1030, 1, None, 80)
    assert steps._serving(small) == small
