from itertools import accumulate

from hypothesis import given
from hypothesis import strategies as st

from slipstream.schema.step import packed


@given(st.lists(st.integers(0, 40)), st.integers(1, 50))
def test_steps_are_full_and_have_all_tokens_in_their_order(lengths: list[int], budget: int) -> None:
    steps = list(packed(lengths, budget))
    assert [sum(end - start for _, start, end in step) for step in steps[:-1]] == [budget] * (len(steps) - 1)
    assert len(steps) == -(-sum(lengths) // budget)
    starts = [0, *accumulate(lengths)]
    tokens = [starts[index] + place for step in steps for index, start, end in step for place in range(start, end)]
    assert tokens == list(range(sum(lengths)))
    assert all(start < end <= lengths[index] for step in steps for index, start, end in step)
