"""N-grams by kernels: they find what a search finds, and draft as the automaton does, in steps launched ahead too."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from slipstream import LLM, SamplingParams
from slipstream.checkpoint.random import write_random_model
from slipstream.models import llama
from slipstream.runtime.worker.worker import Worker
from slipstream.speculative.ngram import drafter
from tests.speculative.test_lossless import LIMITS, NGRAM, REQUESTS, assert_same, prompts
from tests.speculative.test_ngram import search

kernels = pytest.importorskip("slipstream.kernels.triton.ngrams")

NUM_SLOTS = 3
PHASES = (Phase.explicit, Phase.generate)  # the interpreter is too slow to make a failure smaller


def found(
    texts: dict[int, list[int]], device: torch.device, longest: int, min_ngram: int, num_drafts: int
) -> list[list[int]]:
    """Of the text of each slot; its last token is given, and something else lies there and beyond."""
    texts_XL = kernels.new_texts(NUM_SLOTS, longest, device)
    texts_XL.fill_(1)
    numbers = [(slot, place, token) for slot, text in texts.items() for place, token in enumerate(text[:-1])]
    if numbers:
        kernels.write(texts_XL, *torch.tensor(numbers, device=device).T.contiguous())
    slots = torch.tensor([-1, *texts], device=device)
    last = torch.tensor([0, *(text[-1] for text in texts.values())], device=device)
    places = torch.tensor([0, *(len(text) - 1 for text in texts.values())], device=device)
    token_ids_SN, counts_S = kernels.find(texts_XL, slots, last, places, min_ngram, num_drafts)
    assert counts_S[0] == 0
    return [row[:count] for row, count in zip(token_ids_SN[1:].tolist(), counts_S[1:].tolist(), strict=True)]


@settings(max_examples=25, deadline=None, phases=PHASES)
@given(
    st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=30), min_size=1, max_size=NUM_SLOTS),
    st.integers(1, 4), st.integers(1, 9),
)  # fmt: skip
def test_they_find_what_a_search_finds(
    device: torch.device, texts: list[list[int]], min_ngram: int, num_drafts: int
) -> None:
    by_slot = dict(enumerate(texts))
    assert found(by_slot, device, 32, min_ngram, num_drafts) == [search(text, min_ngram, num_drafts) for text in texts]


def test_long_texts_are_searched_in_parts(device: torch.device) -> None:
    """What is there in two parts, of which the second has more of it; an end that is whole in no part; none."""
    generator = torch.Generator().manual_seed(0)
    other = torch.randint(100, 1000, (3 * kernels.PART,), generator=generator).tolist()
    end, part = [1, 2, 3, 4, 5, 6], kernels.PART
    twice = [*other[:50], *end[2:], 11, *other[50:part], *end, 12, *other[part : 2 * part], *end]
    across = [*other[: part - 3], *end, 13, *other[part:], *end]
    texts = {0: twice, 1: across, 2: [*range(2000, 2000 + 2 * part)]}
    assert found(texts, device, 4 * kernels.PART, 2, 3) == [
        [12, *other[part : part + 2]], [13, *other[part : part + 2]], []
    ]  # fmt: skip


def test_ends_are_compared_as_far_as_so_many_tokens(device: torch.device) -> None:
    """Where more than so many are alike, the first place is as good as a longer one."""
    end = [*range(10, 10 + kernels.MOST)]
    assert found({1: [5, *end, 7, 6, *end, 8, 6, *end]}, device, 256, 2, 1) == [[7]]


def test_what_lies_beyond_the_longest_text_is_left_out(device: torch.device) -> None:
    texts_XL = kernels.new_texts(NUM_SLOTS, 8, device)
    slots, places, tokens = torch.tensor([[0, 0, 1, -1], [7, 8, 100, 3], [4, 5, 6, 7]], device=device)
    kernels.write(texts_XL, slots, places, tokens)
    assert texts_XL.nonzero().tolist() == [[0, 7], [NUM_SLOTS, 3]]


@pytest.mark.parametrize("is_ahead", [False, True])
def test_an_engine_drafts_with_them(is_ahead: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts are those of plain decoding, and as many drafts are accepted as the automaton's; prompts that are found
    again, of which no step computes the beginning, are searched whole."""
    from slipstream.speculative.ngram import on_device

    model = write_random_model(tmp_path / "model", llama.TINY)
    with LLM(model) as llm:
        texts = prompts(llm.manifest.vocab_size)
    asked = [SamplingParams(**{"max_tokens": 24, **each}) for each in REQUESTS[:6]]
    again: list[Any] = [[*texts[7], *texts[7][:20]], SamplingParams(max_tokens=8, temperature=0)]

    def said(speculative: dict[str, Any] | None) -> tuple[list[Any], list[int]]:
        with LLM(model, **LIMITS, speculative=speculative) as llm:
            found = llm.generate(texts[:6], asked)
            found += [llm.generate(*again) for _ in range(2)]
            assert found[-1].num_cached_tokens > 0
            return found, [llm.stats.num_drafts, llm.stats.num_draft_tokens, *llm.stats.num_accepted_tokens]

    expected, _ = said(None)
    _, by_automaton = said(NGRAM)
    monkeypatch.setattr(drafter.Drafter, "class_for", classmethod(lambda *_: on_device.Drafter))
    monkeypatch.setattr(Worker, "computes_by_itself", is_ahead)
    found, counts = said(NGRAM)
    assert_same(found, expected)
    assert sum(counts[2:]) > 0
    assert is_ahead or counts == by_automaton
