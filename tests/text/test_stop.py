"""Stop strings are found as if the whole text were known."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slipstream.text.stop import StopMatcher


def naive(text: str, stops: list[str], include_stop: bool) -> tuple[str, str | None]:
    """The definition: of all occurrences the earliest, of those the longest."""
    found = [(text.index(stop), -len(stop), stop) for stop in stops if stop in text]
    if not found:
        return text, None
    start, _, stop = min(found)
    return text[:start] + (stop if include_stop else ""), stop


def run(pieces: list[str], stops: list[str], include_stop: bool = False) -> tuple[list[str], str | None]:
    matcher = StopMatcher(stops, include_stop)
    shown = [matcher.push(piece) for piece in pieces]
    shown.append(matcher.finish())
    return shown, matcher.matched


@settings(max_examples=500, deadline=None)
@given(
    text=st.text(alphabet="abc", max_size=40),
    stops=st.lists(st.text(alphabet="abc", min_size=1, max_size=6), max_size=4),
    cuts=st.lists(st.integers(0, 40), max_size=8),
    include_stop=st.booleans(),
)
def test_equals_the_definition(text: str, stops: list[str], cuts: list[int], include_stop: bool) -> None:
    borders = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[start:end] for start, end in pairwise(borders)]
    expected, stop = naive(text, stops, include_stop)
    shown, matched = run(pieces, stops, include_stop)
    assert ("".join(shown), matched) == (expected, stop)


@settings(max_examples=300, deadline=None)
@given(
    text=st.text(alphabet="ab", max_size=20), stops=st.lists(st.text(alphabet="ab", min_size=1, max_size=5), max_size=3)
)
def test_holds_back_no_more_than_it_must(text: str, stops: list[str]) -> None:
    """Until a match, what is held back begins a stop string, or is empty."""
    matcher = StopMatcher(stops)
    shown = ""
    for count, character in enumerate(text, 1):
        shown += matcher.push(character)
        if matcher.matched is None:
            held = text[len(shown) : count]
            assert not held or any(stop.startswith(held) or held.startswith(stop) for stop in stops)


@pytest.mark.parametrize(
    ("pieces", "stops", "shown", "matched"),
    [
        (["Hel", "lo\n", "\nUser", ":"], ["\n\nUser:"], ["Hel", "lo", "", "", ""], "\n\nUser:"),
        (["a", "b"], [], ["a", "b", ""], None),
        (["xEN", "Dy", "z"], ["END"], ["x", "", "", ""], "END"),
        (["xEN"], ["END"], ["x", "EN"], None),
        (["ab", "d"], ["abc", "bd"], ["", "a", ""], "bd"),
        (["ab"], ["abc", "b"], ["", "a"], "b"),
        (["ab", "c"], ["ab", "abc"], ["", "", ""], "abc"),
        (["aab"], ["ab", "ab"], ["a", ""], "ab"),
        (["停", "止了"], ["停止"], ["", "", ""], "停止"),
    ],
)
def test_examples(pieces: list[str], stops: list[str], shown: list[str], matched: str | None) -> None:
    assert run(pieces, stops) == (shown, matched)


def test_keeps_the_stop_string_if_asked() -> None:
    assert run(["one. tw", "o. three"], ["o. "], include_stop=True) == (["one. tw", "o. ", ""], "o. ")


def test_after_a_match_nothing_is_shown() -> None:
    matcher = StopMatcher(["."])
    assert (matcher.push("a.b"), matcher.push("c"), matcher.finish()) == ("a", "", "")


def test_time_is_linear_in_hostile_stop_strings() -> None:
    stop = "a" * 20_000 + "b"
    matcher = StopMatcher([stop])
    shown = "".join(matcher.push("a" * 5) for _ in range(10_000))
    assert len(shown + matcher.finish()) == 50_000
