"""Medusa's heads against their definition, its trees against their choices, and which heads are refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from slipstream import LLM, SamplingParams
from slipstream.build import build
from slipstream.checkpoint import open_checkpoint, resolve
from slipstream.checkpoint.random import write_random_model
from slipstream.engine.folder import open_engine
from slipstream.engine.shared import head_of_tokens, lm_head
from slipstream.errors import EngineError, ModelError, SlipstreamError, UsageError
from slipstream.models import gemma2, llama
from slipstream.schema.build import BuildConfig
from slipstream.speculative.choices import fitting, parents_of
from slipstream.speculative.drafter import Draft, DraftTensors, Ends
from slipstream.speculative.medusa import drafter as medusa
from slipstream.speculative.medusa.head import load
from slipstream.speculative.tree import check_parents
from tests.speculative.heads import write_medusa
from tests.speculative.test_lossless import LIMITS

CPU = torch.device("cpu")
HIDDEN, VOCAB = llama.TINY["hidden_size"], llama.TINY["vocab_size"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_model(tmp_path_factory.mktemp("model"), llama.TINY)


def naive(tensors: dict[str, Tensor], head: int, num_layers: int, x_H: Tensor) -> Tensor:
    for layer in range(num_layers):
        z_H = tensors[f"{head}.{layer}.linear.weight"].double() @ x_H + tensors[f"{head}.{layer}.linear.bias"].double()
        x_H = x_H + z_H / (1 + torch.exp(-z_H))
    return tensors[f"{head}.{num_layers}.weight"].double() @ x_H


@pytest.mark.parametrize("num_layers", [0, 1, 2])
def test_a_head_is_its_residual_layers_and_a_product(num_layers: int, model: Path, tmp_path: Path) -> None:
    folder = write_medusa(model, tmp_path / "heads", num_heads=5, num_layers=num_layers)
    heads = load(folder, HIDDEN, VOCAB, torch.float32, CPU, pytest.fail)
    tensors, x_SH = load_file(folder / "medusa_lm_head.safetensors"), torch.randn(3, HIDDEN)
    logits_NSV = heads.logits(x_SH)
    assert len(logits_NSV) == 5  # whatever config.json says
    for index, logits_SV in enumerate(logits_NSV):
        expected = torch.stack([naive(tensors, index, num_layers, x_H.double()) for x_H in x_SH])
        torch.testing.assert_close(logits_SV.double(), expected, rtol=1e-4, atol=1e-4)


def test_heads_that_share_the_models_own(model: Path, tmp_path: Path) -> None:
    """Its rows for the tokens that can be drafted, whatever the engine does to logits after it."""
    folder, own = write_medusa(model, tmp_path / "heads"), load_file(model / "model.safetensors")["lm_head.weight"]
    tensors, x_SH = load_file(folder / "medusa_lm_head.safetensors"), torch.randn(4, HIDDEN)
    token_ids = torch.tensor([99, 3, 120, 7, 8])
    shared = {name: each for name, each in tensors.items() if "linear" in name}
    save_file(shared | {"draft_token_ids": token_ids.int()}, folder / "medusa_lm_head.safetensors")
    with LLM(model) as llm:
        engine = open_engine(llm.engine_path)
    assert torch.equal(lm_head(engine), own)
    heads = load(
        folder, HIDDEN, VOCAB, torch.float32, CPU, lambda ids: head_of_tokens(engine, ids, torch.float32, CPU)
    )  # fmt: skip
    found_NSK = heads.token_ids(heads.logits(x_SH).topk(5).indices)
    for row, x_H in enumerate(x_SH):
        for head in range(3):
            logits_V = naive(tensors | {f"{head}.1.weight": own}, head, 1, x_H.double())
            expected = token_ids[logits_V[token_ids].argsort(descending=True)]
            assert found_NSK[head, row].tolist() == expected.tolist()


def test_where_the_models_head_is(tmp_path: Path) -> None:
    """Tied to the embedding it is there beside any format; a CPU's panels are written out, other packed formats not."""
    tied = write_random_model(tmp_path / "tied", llama.TINY | {"tie_word_embeddings": True})
    capped = write_random_model(tmp_path / "capped", gemma2.TINY)
    for model in (tied, capped):
        for quantization in (None, "int8"):
            with LLM(model, quantization=quantization) as llm:
                own = load_file(model / "model.safetensors")["model.embed_tokens.weight"]
                torch.testing.assert_close(lm_head(open_engine(llm.engine_path)), own, rtol=0, atol=0.01)
    alone = write_random_model(tmp_path / "alone", llama.TINY)
    with LLM(alone, quantization="int8") as llm:
        own = load_file(alone / "model.safetensors")["lm_head.weight"]
        torch.testing.assert_close(lm_head(open_engine(llm.engine_path)), own, rtol=0, atol=0.01)
        x_SBH, token_ids = (
            torch.randn(2, 3, HIDDEN, generator=torch.Generator().manual_seed(0)),
            torch.arange(100, 3, -2),
        )
        product = head_of_tokens(open_engine(llm.engine_path), token_ids, torch.float32, CPU)
        torch.testing.assert_close(product(x_SBH), x_SBH @ own[token_ids].T, rtol=0, atol=0.1)
    with (
        LLM(alone, quantization="int8", disabled_passes=["pack_panels"]) as llm,
        pytest.raises(EngineError, match=r"packed format.*build the engine"),
    ):
        lm_head(open_engine(llm.engine_path))


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_the_models_head_of_several_ranks_is_put_together(quantization: str | None, tmp_path: Path) -> None:
    """In stages, too, and where their parts are not of one size."""
    model = write_random_model(tmp_path / "model", llama.TINY | {"vocab_size": 131})
    config = BuildConfig(tp_size=2, pp_size=2, quantization=quantization, max_batch_size=2, max_num_tokens=32)
    build(open_checkpoint(resolve(model)), tmp_path / "engine", config)
    own = load_file(model / "model.safetensors")["lm_head.weight"]
    torch.testing.assert_close(lm_head(open_engine(tmp_path / "engine")), own, rtol=0, atol=0.01)


def test_heads_read_what_the_models_own_head_read(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A head that is the model's own says again what was said last, and the tree what its choices say."""
    folder = write_medusa(model, tmp_path / "heads", num_layers=0)
    own = load_file(model / "model.safetensors")["lm_head.weight"]
    tensors = load_file(folder / "medusa_lm_head.safetensors")
    save_file(tensors | {"0.0.weight": own}, folder / "medusa_lm_head.safetensors")
    seen: list[tuple[Ends, list[Draft]]] = []
    draft = medusa.Drafter.draft

    def look(self: Any, ends: Ends, most: int) -> DraftTensors:
        drafts = draft(self, ends, most)
        seen.append((ends, drafts.lists()))
        return drafts

    monkeypatch.setattr(medusa.Drafter, "draft", look)
    asked = [SamplingParams(max_tokens=12, temperature=0), SamplingParams(max_tokens=9, temperature=0, min_tokens=2)]
    with LLM(
        model, **LIMITS, speculative={"method": "medusa", "model": str(folder), "max_draft_len": 20, "adaptive": False}
    ) as llm:
        llm.generate([[5, 6, 7], [index % 50 for index in range(90)]], asked)
    tensors = load_file(folder / "medusa_lm_head.safetensors")
    choices = medusa.default_choices()
    assert len(seen) > 5 and any(len(ends.slots) == 2 for ends, _ in seen)
    for ends, drafts in seen:
        assert ends.hidden is not None
        for hidden_H, said, made in zip(ends.hidden.double(), ends.token_ids, drafts, strict=True):
            ranked = [naive(tensors, head, 0, hidden_H).argsort(descending=True) for head in range(3)]
            assert ranked[0][0] == said
            assert made.parents is not None and len(made.token_ids) == 20
            placed = list(zip(made.token_ids, made.parents, strict=True))
            for choice in choices[:20]:
                parent = 0
                for depth, rank in enumerate(choice):
                    parent = 1 + placed.index((int(ranked[depth][rank]), parent))


def test_the_tree_of_63() -> None:
    choices = medusa.default_choices()
    assert len(set(choices)) == 63 and max(map(len, choices)) == 4 and max(map(max, choices)) == 9
    for count in range(1, 64):
        check_parents(parents_of(choices[:count]))
        assert all(len(choice) == 1 or choice[:-1] in choices[:count] for choice in choices[:count])
    assert fitting(choices, 2, 4)[:5] == [(0,), (0, 0), (1,), (0, 1), (2,)]
    assert fitting([(1, 0), (0,), (1,)], 4, 10) == [(1,), (1, 0), (0,)]


def test_choices_of_a_file(model: Path, tmp_path: Path) -> None:
    folder, file = write_medusa(model, tmp_path / "heads"), tmp_path / "choices.json"
    file.write_text("[[0, 1], [0], [2], [0, 1, 0]]")
    speculative = {"method": "medusa", "model": str(folder), "choices": str(file), "adaptive": False}
    with LLM(model, **LIMITS, speculative=speculative) as llm:
        llm.generate([1, 2, 3], SamplingParams(max_tokens=20, temperature=0))
        assert llm.runtime_config.max_draft_len == 4
        assert llm.stats.num_draft_tokens > 4


@pytest.mark.parametrize(
    ("what", "error", "sentence"),
    [
        ("no folder", ModelError, "has no medusa_lm_head.safetensors; name a folder of Medusa heads"),
        (
            "no name",
            UsageError,
            "lacks model, a folder: those of medusa that ship are for .*train one with slipstream",
        ),
        ("other tokens", ModelError, "drafts tokens that the model's 128 do not have; take the head"),
        ("pickled", ModelError, "holds medusa_lm_head.pt, which is pickled.*save its tensors as"),
        ("wide", ModelError, r"has 0\.0\.linear\.weight \[65, 65\], and its config and the model need \[64, 64\]"),
        ("layers", ModelError, r"lacks 0\.1\.linear\.weight, which its config\.json asks for"),
        ("no layers", ModelError, "has medusa_num_layers 'one'; it must be a whole number"),
        ("[[0], [1, 2]]", UsageError, r"has \[1, 2\] without \[1\]; add that one"),
        ("[[0], 3]", UsageError, "is no list of lists of ranks from 0; give"),
        ("[[0], [-1]]", UsageError, "is no list of lists of ranks from 0; give"),
        ("[[", UsageError, "cannot be read as JSON"),
    ],
)
def test_what_is_wrong_is_said(
    what: str, error: type[SlipstreamError], sentence: str, model: Path, tmp_path: Path
) -> None:
    folder, speculative = tmp_path / "heads", {"method": "medusa", "model": str(tmp_path / "heads")}
    if what != "no folder":
        write_medusa(model, folder)
    if what == "no name":
        del speculative["model"]
    elif what == "other tokens":
        tensors = load_file(folder / "medusa_lm_head.safetensors") | {"draft_token_ids": torch.tensor([5, VOCAB])}
        save_file(tensors, folder / "medusa_lm_head.safetensors")
    elif what == "pickled":
        (folder / "medusa_lm_head.safetensors").rename(folder / "medusa_lm_head.pt")
    elif what == "wide":
        (tmp_path / "wide").mkdir()
        (tmp_path / "wide/config.json").write_text(json.dumps({"hidden_size": 65, "vocab_size": VOCAB}))
        speculative["model"] = str(write_medusa(tmp_path / "wide", tmp_path / "wide heads"))
    elif what.endswith("layers"):
        (folder / "config.json").write_text(json.dumps({"medusa_num_layers": 2 if what == "layers" else "one"}))
    elif what.startswith("["):
        (tmp_path / "choices.json").write_text(what)
        speculative["choices"] = str(tmp_path / "choices.json")
    with pytest.raises(error, match=sentence):
        LLM(model, **LIMITS, speculative=speculative)
