"""The draft model's own engine: what it computes, when its pool or its positions end, whose tokens it may say."""

import random
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from slipstream import LLM, SamplingParams
from slipstream.build import build
from slipstream.checkpoint import open_checkpoint, resolve
from slipstream.checkpoint.random import write_random_model
from slipstream.errors import SlipstreamError, UsageError
from slipstream.kernels.attention.metadata import StepTensors
from slipstream.models import llama
from slipstream.runtime.draft_control import DraftControl
from slipstream.runtime.worker.worker import Worker
from slipstream.schema.build import BuildConfig
from slipstream.speculative.draft_model import drafter as draft_model
from tests.speculative.likeness import write_likeness
from tests.speculative.test_lossless import LIMITS, REQUESTS, assert_same, prompts, run


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_model(tmp_path_factory.mktemp("target"), llama.TINY)


@pytest.fixture(params=[False, True], ids=["waits", "launches ahead"])
def computes_by_itself(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """As on a GPU, whose next step begins before it is known where."""
    is_late: bool = request.param
    monkeypatch.setattr(Worker, "computes_by_itself", is_late)
    return is_late


def drafted_by(folder: Path | str, max_draft_len: int = 4) -> dict[str, Any]:
    return {"method": "draft_model", "model": str(folder), "max_draft_len": max_draft_len, "adaptive": False}


@pytest.mark.parametrize(
    "asked",
    [
        {"temperature": 0.0},
        {"seed": 3},
        {"seed": 4, "temperature": 0.7, "top_p": 0.8, "top_k": 20},
        {"seed": 5, "min_p": 0.02, "typical_p": 0.9},
    ],
    ids=str,
)
@pytest.mark.usefixtures("computes_by_itself")
def test_all_is_accepted_of_a_draft_model_that_is_the_model(asked: dict[str, Any], model: Path) -> None:
    """Drawn with the request's own noise. Then its last draft is computed with the next token, every time."""
    with LLM(model, **LIMITS, speculative=drafted_by(model)) as llm:
        llm.generate([3, 1, 4], SamplingParams(max_tokens=41, **asked))
        stats = llm.stats
    assert stats.num_accepted_tokens == (8, 8, 8, 8) and stats.num_draft_tokens == 32
    assert stats.num_steps == 9


@pytest.mark.parametrize(
    "options",
    [
        {"max_num_tokens": 16, "max_batch_size": 3},
        {"kv_cache_max_tokens": 240, "capacity_scheduler_policy": "max_utilization"},
        {"kv_cache_max_tokens": 112, "capacity_scheduler_policy": "max_utilization"},
        {"enable_block_reuse": False},
    ],
    ids=str,
)
@pytest.mark.usefixtures("computes_by_itself")
def test_however_the_target_runs(options: dict[str, Any], model: Path, tmp_path: Path) -> None:
    draft = write_likeness(model, tmp_path / "draft")
    expected, _ = run(model, REQUESTS, **options)
    found, stats = run(model, REQUESTS, **options, speculative=drafted_by(draft))
    assert_same(found, expected)
    assert sum(stats.num_accepted_tokens) > 0 and stats.num_blocks_used == 0


@pytest.mark.parametrize("limits", [{}, {"max_num_tokens": 16, "max_batch_size": 3}], ids=str)
@pytest.mark.usefixtures("computes_by_itself")
def test_it_has_read_every_token_whenever_it_is_asked(
    limits: dict[str, Any], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then all that the model itself drafts is accepted: of prompts that are found, of texts that went on without."""
    rng = random.Random(5)

    def ask(self: DraftControl, slots: Sequence[int]) -> list[int]:
        return [rng.choice((0, 0, 4)) if rng.random() < 0.3 else 4 * (slot % 2) for slot in slots]

    monkeypatch.setattr(DraftControl, "ask", ask)
    asked = [
        SamplingParams(max_tokens=20 + number, seed=number, temperature=number % 2, ignore_eos=True)
        for number in range(12)
    ]
    speculative = drafted_by(model) | {"adaptive": True}
    with LLM(model, **LIMITS | limits, speculative=speculative) as llm:
        texts = prompts(llm.manifest.vocab_size)[:6]
        said = llm.generate(texts + texts, asked)
        longer = [
            [*text, *output.outputs[0].token_ids[:-1], 3] for text, output in zip(texts + texts, said, strict=True)
        ]
        llm.generate(longer, asked)
        stats = llm.stats
    assert stats.prompt_tokens_cached > 200 and stats.num_draft_tokens > 200
    assert sum(stats.num_accepted_tokens) == stats.num_draft_tokens


@pytest.mark.usefixtures("computes_by_itself")
def test_texts_may_be_longer_than_its_positions(model: Path, tmp_path: Path) -> None:
    draft = tmp_path / "draft"
    write_random_model(draft, llama.TINY | {"max_position_embeddings": 48})
    asked = SamplingParams(max_tokens=80, temperature=0)
    with LLM(model, **LIMITS) as llm:
        prompt = prompts(llm.manifest.vocab_size)[4]
        expected = llm.generate(prompt, asked)
    with LLM(model, **LIMITS, speculative=drafted_by(draft)) as llm:
        assert_same([llm.generate(prompt, asked)], [expected])
        assert 0 < llm.stats.num_draft_tokens < 48 * 4


def test_a_text_that_returns_finds_what_it_had_computed(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, compute = list[int](), draft_model.Drafter._compute

    def count(self: draft_model.Drafter, step: StepTensors) -> Tensor:
        seen.append(len(step.token_ids))
        return compute(self, step)

    with LLM(model, **LIMITS, speculative=drafted_by(model)) as llm:
        prompt = [index % 7 for index in range(60)]
        llm.generate(prompt, SamplingParams(max_tokens=8, temperature=0))
        monkeypatch.setattr(draft_model.Drafter, "_compute", count)
        llm.generate([*prompt, 9], SamplingParams(max_tokens=8, temperature=0))
    # The draft model computes no more of the prompt than what follows its last whole block.
    assert max(seen) <= 61 % llm.manifest.tokens_per_block + 1


@pytest.mark.parametrize(
    ("change", "given", "error", "sentence"),
    [
        (
            {},
            {"method": "draft_model"},
            UsageError,
            "lacks model, a folder: those of draft_model that ship are for .*, not for",
        ),
        ({}, {"method": "draft_model", "model": 3}, UsageError, "has model 3; it must be of type str"),
        ({}, {"width": 3}, UsageError, "'width', which draft_model does not know; it takes .*, adaptive, model"),
        ({"vocab_size": 100}, {}, UsageError, "has 100 tokens and the model 128; drafts need one vocabulary"),
    ],
)
def test_what_is_wrong_is_said(
    change: dict[str, Any], given: dict[str, Any], error: type[SlipstreamError], sentence: str, model: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    draft = write_random_model(tmp_path / "draft", llama.TINY | change)
    speculative = given if "method" in given else drafted_by(draft) | given
    with pytest.raises(error, match=sentence):
        LLM(model, **LIMITS, speculative=speculative)


def test_an_engine_of_fewer_sequences_drafts_for_more(model: Path, tmp_path: Path) -> None:
    with closing(open_checkpoint(resolve(model), "float32")) as checkpoint:
        build(checkpoint, tmp_path / "engine", BuildConfig(max_batch_size=4, max_num_tokens=64), device="cpu")
    expected, _ = run(model, REQUESTS)
    found, stats = run(model, REQUESTS, speculative=drafted_by(tmp_path / "engine"))
    assert_same(found, expected)
    assert sum(stats.num_accepted_tokens) > 0
