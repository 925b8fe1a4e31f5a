"""Lookahead's window: what its columns become is what the model says, its tree sees what the paper's mask shows."""

from pathlib import Path
from typing import Any

import pytest
import torch

from slipstream import LLM, SamplingParams
from slipstream.checkpoint.random import write_random_model
from slipstream.errors import UsageError
from slipstream.models import llama
from slipstream.runtime.speculation import open_drafter
from slipstream.schema.speculative import Speculation
from slipstream.speculative.drafter import Draft
from slipstream.speculative.lookahead.drafter import Options, Text
from slipstream.speculative.tree import ancestors, check_parents, depths, merged
from tests.speculative.test_lossless import LIMITS
from tests.speculative.test_ngram import ON_CPU

WINDOW, NGRAM, GUESSES = 3, 4, 5


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_model(tmp_path_factory.mktemp("model"), llama.TINY)


def way_to(draft: Draft, node: int) -> list[int]:
    assert draft.parents is not None
    way = list[int]()
    while node:
        way.append(draft.token_ids[node - 1])
        node = draft.parents[node - 1]
    return way[::-1]


def test_ways_that_begin_alike_are_one() -> None:
    tree = merged([[5, 6, 7], [5, 8], [], [5, 6], [9]])
    assert tree == ([5, 6, 7, 8, 9], [0, 1, 2, 1, 0], [3, 4, 0, 2, 5])


def test_the_window_sees_what_the_papers_mask_shows() -> None:
    """A row of level r and column c sees level 0 as far as c, and its column as far as r; its place is r + c."""
    text = Text(Options(WINDOW, NGRAM, GUESSES), [])
    draft = text.draft([100], [])
    columns = [[100 * c + r for r in range(NGRAM - 1)] for c in range(1, WINDOW + 1)]  # so that no two tokens are one
    text._columns = columns
    draft = text.draft([7], [50 + node for node in range(30)])  # each column goes on
    assert draft.parents is not None
    check_parents(draft.parents)
    columns = text._columns
    assert [column[0] for column in columns] == [7, 201, 301]
    parents_1M = torch.tensor([[0, *draft.parents]])
    tokens, depths_M = [7, *draft.token_ids], depths(parents_1M)[0].tolist()
    seen = ancestors(parents_1M)[0, :, 0].tolist()
    for c, column in enumerate(columns):
        for r, token_id in enumerate(column):
            node = tokens.index(token_id)
            visible = {tokens[bit] for bit in range(len(tokens)) if seen[node] >> bit & 1}
            assert visible == {each[0] for each in columns[: c + 1]} | set(column[: r + 1])
            assert depths_M[node] == r + c
    assert text._tips == [tokens.index(column[-1]) for column in columns]


def test_columns_and_ngrams_follow_what_the_model_says(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row's token is what the model says after the text and the way down to it; the window moves as the text."""
    seen: list[tuple[Text, list[int], list[int], list[list[int]], list[list[int]], list[int]]] = []
    draft = Text.draft
    drafts: dict[int, Draft] = {}

    def look(self: Text, token_ids: list[int], chosen: list[int]) -> Draft:
        known, before = list(self._token_ids), [list(column) for column in self._columns]
        ways = [way_to(drafts[id(self)], tip) for tip in self._tips]
        said = [chosen[tip] if tip < len(chosen) else -1 for tip in self._tips]
        made = drafts[id(self)] = draft(self, token_ids, chosen)
        if before and -1 not in said:
            seen.append((self, known, token_ids, before, ways, said))
            moved = [[*column[1:], last] for column, last in zip(before, said, strict=True)][len(token_ids) - 1 :]
            for old, new in zip(moved, self._columns, strict=False):
                assert new[1:] == old[1:]
            assert self._columns[0][0] == token_ids[-1]
            for column, last in zip(before, said, strict=True):
                assert [*column[1:], last] in self._followers[column[0]]
        return made

    monkeypatch.setattr(Text, "draft", look)
    options = {"method": "lookahead", "window": WINDOW, "ngram": NGRAM, "guesses": GUESSES, "adaptive": False}
    asked = [SamplingParams(max_tokens=20, temperature=0), SamplingParams(max_tokens=16, temperature=0)]
    with LLM(model, **LIMITS, speculative=options) as llm:
        assert llm.runtime_config.max_draft_len == (WINDOW - 1 + GUESSES) * (NGRAM - 1) + NGRAM - 2  # TensorRT-LLM's
        llm.generate([[5, 6, 7], [index % 50 for index in range(40)]], asked)
        assert sum(llm.stats.num_accepted_tokens) > 0
    assert len(seen) > 5
    ways = [[*known, *way] for _, known, _, _, ways, _ in seen for way in ways]
    with LLM(model, **LIMITS) as llm:
        outputs = llm.generate(ways, SamplingParams(max_tokens=1, temperature=0))
    expected = [token_id for *_, said in seen for token_id in said]
    assert [output.outputs[0].token_ids[0] for output in outputs] == expected


def test_ngrams_of_the_text_are_drafted_the_newest_first() -> None:
    text = Text(Options(1, 3, 2), [1, 2, 3, 1, 4, 5, 1, 6, 7, 1, 4, 5, 9])
    draft = text.draft([1], [])
    assert way_to(draft, 2) == [4, 5] and way_to(draft, 4) == [6, 7]
    assert [2, 3] not in [way_to(draft, node) for node in range(1, 1 + len(draft.token_ids))]


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"max_draft_len": 5}, "max_draft_len, which of lookahead follows from window, ngram and guesses; give these"),
        ({"ngram": 1}, "ngram 1; it must be at least 2"),
        ({"window": 0}, "window 0; it must be a whole number of at least 1"),
        ({"window": 60}, "= 267 drafts a step; lower them to at most 256, such as window 7"),
        ({"levels": 3}, "'levels', which lookahead does not know; it takes .*window, ngram, guesses"),
    ],
)
def test_what_is_wrong_is_said(given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        open_drafter(Speculation.read({"method": "lookahead", **given}), ON_CPU)  # type: ignore[arg-type]
