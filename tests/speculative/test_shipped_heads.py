"""Heads that ship: each says where it is from, is small, and drafts for its model as well as its page says."""

import re
from pathlib import Path

import pytest

import slipstream
from slipstream import LLM, SamplingParams

HEADS = sorted((Path(slipstream.__file__).parent / "speculative").glob("*/heads/*"))
CHATS = ("I have an interview next week and I am nervous. What should I do?", "Who was Marie Curie?")
MODELS = {"SmolLM2-135M-Instruct": "smollm2"}


def name_of(folder: Path) -> str:
    return f"{folder.parent.parent.name}-{folder.name}"


def test_each_method_that_is_trained_has_one() -> None:
    trained = {"draft_model", "eagle", "medusa", "redrafter"}
    assert {f"{method}-SmolLM2-135M-Instruct" for method in trained} <= set(map(name_of, HEADS))


@pytest.mark.parametrize("folder", HEADS, ids=name_of)
def test_its_page_says_where_it_is_from(folder: Path) -> None:
    page = (folder / "README.md").read_text()
    assert f"train-drafter --method {folder.parent.parent.name}" in page
    assert all(f"| {what}" in page for what in ("training command", "data source", "licence", "acceptance length"))
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 10 << 20


@pytest.mark.real_model
@pytest.mark.parametrize("folder", HEADS, ids=name_of)
def test_it_drafts_without_being_named(folder: Path) -> None:
    """In float32, where texts are those of plain decoding to the last token."""
    method, model = folder.parent.parent.name, MODELS[folder.name]
    said = re.search(r"(\d\.\d+) in chats", (folder / "README.md").read_text())
    assert said is not None
    texts, asked = [], SamplingParams(max_tokens=64, temperature=0)
    for speculative in (None, {"method": method, "adaptive": False}):
        with LLM(model, dtype="float32", max_batch_size=2, speculative=speculative) as llm:
            prompts = [llm.chat_prompt([{"role": "user", "content": text}]) for text in CHATS]
            texts.append([output.outputs[0].token_ids for output in llm.generate(prompts, asked)])
            stats = llm.stats
    assert texts[1] == texts[0]
    assert 1 + sum(stats.num_accepted_tokens) / stats.num_drafts > 0.75 * float(said[1])
