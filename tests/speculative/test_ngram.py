"""Prompt lookup against a search through the whole text."""

import random
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slipstream.errors import UsageError
from slipstream.runtime.speculation import open_drafter
from slipstream.schema.speculative import Speculation
from slipstream.speculative.ngram.drafter import Automaton

ON_CPU = SimpleNamespace(device=torch.device("cpu"), max_seq_len=64)  # what is looked at of a Target before options


def search(text: list[int], min_ngram: int, num_tokens: int) -> list[int]:
    """What followed the first occurrence of the longest end that is there twice."""
    for size in range(len(text) - 1, min_ngram - 1, -1):
        tail = text[len(text) - size :]
        for start in range(len(text) - size):
            if text[start : start + size] == tail:
                found = list(text[start + size :])
                while len(found) < num_tokens:
                    found += text[start + size :]
                return found[:num_tokens]
    return []


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 3), max_size=40), st.integers(1, 4), st.integers(1, 9))
def test_the_automaton_finds_what_a_search_finds(text: list[int], min_ngram: int, num_tokens: int) -> None:
    grown = Automaton(text[: len(text) // 2])
    for token_id in text[len(text) // 2 :]:
        grown.extend([token_id])
    expected = search(text, min_ngram, num_tokens)
    assert grown.continuation(min_ngram, num_tokens) == expected
    assert Automaton(text).continuation(min_ngram, num_tokens) == expected


def test_a_text_that_repeats_itself_goes_on_doing_so() -> None:
    assert Automaton([9, 1, 2, 3, 1, 2, 3]).continuation(2, 7) == [1, 2, 3, 1, 2, 3, 1]


def test_memory_is_linear_in_the_text() -> None:
    rng = random.Random(0)
    text = [rng.randrange(50) for _ in range(5000)]
    automaton = Automaton(text)
    assert len(automaton._next) <= 2 * len(text) + 1
    assert sum(map(len, automaton._next)) <= 3 * len(text)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"method": "ngram", "min_ngram": 0}, "min_ngram 0; it must be a whole number of at least 1"),
        ({"method": "ngram", "min_ngram": True}, "min_ngram True; it must be a whole number"),
        ({"method": "ngram", "max_ngram": 3}, "'max_ngram', which ngram does not know; it takes max_draft_len, .*min_"),
        ({"method": "ngram", "max_draft_len": 0}, "max_draft_len 0; it must be a whole number from 1 to 256"),
        ({"method": "telepathy"}, "'telepathy', which is not there; there are: .*ngram"),
        ({"max_draft_len": 3}, "names no method"),
        ("{", "is no JSON"),
        ("[]", "names no method"),
    ],
)
def test_what_is_wrong_is_said(given: object, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        open_drafter(Speculation.read(given), ON_CPU)  # type: ignore[arg-type]
