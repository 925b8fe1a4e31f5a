"""ReDrafter's head and its beam search against their definition, its drafts against its beams, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from slipstream import LLM, SamplingParams
from slipstream.checkpoint.random import write_random_model
from slipstream.errors import ModelError, SlipstreamError, UsageError
from slipstream.models import llama
from slipstream.speculative.drafter import Draft, DraftTensors, Ends
from slipstream.speculative.redrafter import drafter as redrafter
from slipstream.speculative.redrafter.beams import beam_search, merged_beams
from slipstream.speculative.redrafter.head import load
from slipstream.speculative.tree import merged
from tests.speculative.heads import write_redrafter
from tests.speculative.test_lossless import LIMITS

CPU = torch.device("cpu")
HIDDEN, VOCAB = llama.TINY["hidden_size"], llama.TINY["vocab_size"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_model(tmp_path_factory.mktemp("model"), llama.TINY)


class Naive:
    """A beam at a time, in float64."""

    def __init__(self, folder: Path, embed_VH: Tensor) -> None:
        self.config = json.loads((folder / "config.json").read_text())
        self.weights = {name: each.double() for name, each in load_file(folder / "model.safetensors").items()}
        self.embed = embed_VH.double()

    def log_probs(self, h_H: Tensor, token_ids: list[int]) -> Tensor:
        """[V] of what follows the last known token and those drafted after it; -inf beyond the likeliest 50."""
        s_H = torch.zeros(HIDDEN).double()
        for token_id in token_ids:
            s_H = self.embed[token_id] + s_H if not self.config["rnn"] else self._through_rnn(self.embed[token_id], s_H)
        x_X = torch.cat((h_H.double(), s_H))
        if "input_proj.weight" in self.weights:
            x_X = self.weights["input_proj.weight"] @ x_X + self.weights["input_proj.bias"]
        num_layers = self.config["num_draft_layers"]
        for layer in range(num_layers):
            z_X = self.weights[f"lm_head.{layer}.linear.weight"] @ x_X + self.weights[f"lm_head.{layer}.linear.bias"]
            x_X = x_X + z_X / (1 + torch.exp(-z_X))
        logits_V = self.weights[f"lm_head.{num_layers}.weight"] @ x_X
        least = logits_V.sort(descending=True).values[:50][-1]
        return logits_V.masked_fill(logits_V < least, -torch.inf).log_softmax(0)

    def _through_rnn(self, e_H: Tensor, s_H: Tensor) -> Tensor:
        z_H = self.weights["rnn_w.weight"] @ e_H + self.weights["rnn_u.weight"] @ s_H + self.weights["rnn_u.bias"]
        return z_H / (1 + torch.exp(-z_H))

    def beams(self, h_H: Tensor, token_id: int, width: int, length: int) -> list[list[int]]:
        beams: list[tuple[float, list[int]]] = [(0.0, [])]
        for _ in range(length):
            grown = []
            for score, beam in beams:
                log_probs_V = self.log_probs(h_H, [token_id, *beam])
                grown += [(score + float(each), [*beam, index]) for index, each in enumerate(log_probs_V)]
            beams = sorted(grown, reverse=True)[:width]
        return [beam for _, beam in beams]


@pytest.mark.parametrize(("exit_dim", "num_layers", "rnn"), [(0, 2, True), (48, 1, True), (48, 0, False)])
def test_the_beam_search_is_its_definition(
    exit_dim: int, num_layers: int, rnn: bool, model: Path, tmp_path: Path
) -> None:
    folder = write_redrafter(model, tmp_path / "head", exit_dim, num_layers, rnn)
    embed_VH = load_file(model / "model.safetensors")["model.embed_tokens.weight"]
    generator = torch.Generator().manual_seed(0)
    h_SH, token_ids_S = torch.randn(3, HIDDEN, generator=generator), torch.tensor([5, 99, 5])
    head = load(folder, HIDDEN, VOCAB, torch.float32, CPU, pytest.fail)
    found = beam_search(head, lambda ids: embed_VH[ids], h_SH, token_ids_S, width=4, length=3).tolist()
    naive = Naive(folder, embed_VH)
    assert found == [naive.beams(h, int(token_id), 4, 3) for h, token_id in zip(h_SH, token_ids_S, strict=True)]


@pytest.mark.parametrize("names", [{"input_proj.": "input_projs.", "lm_head.": "lm_heads."}, {"lm_head.": "0."}])
def test_a_head_under_its_other_names(names: dict[str, str], model: Path, tmp_path: Path) -> None:
    folder = write_redrafter(model, tmp_path / "head", exit_dim=96)
    tensors = load_file(folder / "model.safetensors")
    expected = load(folder, HIDDEN, VOCAB, torch.float32, CPU, pytest.fail)
    for old, new in names.items():
        tensors = {name.replace(old, new): tensor for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors")
    found = load(folder, HIDDEN, VOCAB, torch.float32, CPU, pytest.fail)
    h_SH, s_SH = torch.randn(2, 3, HIDDEN, generator=torch.Generator().manual_seed(0))
    assert torch.equal(found.logits(h_SH, s_SH), expected.logits(h_SH, s_SH))


def test_a_head_that_shares_the_models_own(model: Path, tmp_path: Path) -> None:
    """Its rows for the tokens that can be drafted."""
    folder = write_redrafter(model, tmp_path / "head", exit_dim=HIDDEN)
    weights = load_file(model / "model.safetensors")
    own_VH, embed_VH = weights["lm_head.weight"], weights["model.embed_tokens.weight"]
    tensors, token_ids = load_file(folder / "model.safetensors"), torch.arange(3, 43)
    del tensors["lm_head.2.weight"]
    save_file(tensors | {"draft_token_ids": token_ids.int()}, folder / "model.safetensors")
    h_SH = torch.randn(2, HIDDEN, generator=torch.Generator().manual_seed(0))
    head = load(folder, HIDDEN, VOCAB, torch.float32, CPU, lambda ids: lambda x: x @ own_VH[ids].T)
    found = beam_search(head, lambda ids: embed_VH[ids], h_SH, torch.tensor([7, 8]), width=3, length=4).tolist()
    naive = Naive(folder, embed_VH[token_ids])  # as if these were all tokens there are
    naive.weights["lm_head.2.weight"] = own_VH[token_ids].double()
    expected = [naive.beams(h_H, token_id - 3, 3, 4) for h_H, token_id in zip(h_SH, (7, 8), strict=True)]
    assert found == [[[3 + token_id for token_id in beam] for beam in beams] for beams in expected]


@given(st.integers(1, 4), st.integers(1, 4), st.data())
def test_beams_that_begin_alike_are_one(width: int, length: int, data: st.DataObject) -> None:
    """As the tree that is put together one token after the other."""
    beam = st.lists(st.integers(0, 2), min_size=length, max_size=length)
    beams = data.draw(st.lists(st.lists(beam, min_size=width, max_size=width), min_size=1, max_size=3))
    trees = [merged(ways) for ways in beams]
    tree = merged_beams(torch.tensor(beams))
    assert tree.lists() == [Draft(tree.token_ids, tree.parents) for tree in trees]
    assert tree.token_ids.shape == tree.parents.shape == (len(beams), width * length)


def test_drafts_are_the_beams_of_what_the_models_head_read(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each once, as far as they begin alike; the first max_draft_len tokens of them."""
    folder = write_redrafter(model, tmp_path / "head")
    seen: list[tuple[Ends, list[Draft]]] = []
    draft = redrafter.Drafter.draft

    def look(self: Any, ends: Ends, most: int) -> DraftTensors:
        drafts = draft(self, ends, most)
        seen.append((ends, drafts.lists()))
        return drafts

    monkeypatch.setattr(redrafter.Drafter, "draft", look)
    weights = load_file(model / "model.safetensors")
    naive, own_VH = Naive(folder, weights["model.embed_tokens.weight"]), weights["lm_head.weight"]
    asked = [SamplingParams(max_tokens=8, temperature=0), SamplingParams(max_tokens=6, temperature=0, min_tokens=2)]
    options = {
        "method": "redrafter",
        "model": str(folder),
        "width": 3,
        "length": 3,
        "max_draft_len": 7,
        "adaptive": False,
    }
    with LLM(model, **LIMITS, speculative=options) as llm:
        llm.generate([[5, 6, 7], [index % 50 for index in range(90)]], asked)
        assert llm.runtime_config.max_draft_len == 7
    assert len(seen) > 5 and any(len(ends.slots) == 2 for ends, _ in seen)
    for ends, drafts in seen:
        assert ends.hidden is not None
        for hidden_H, said, made in zip(ends.hidden, ends.token_ids.tolist(), drafts, strict=True):
            assert int((own_VH @ hidden_H).argmax()) == said
            assert made.parents is not None
            ways = [()]
            for token_id, parent in zip(made.token_ids, made.parents, strict=True):
                ways.append((*ways[parent], token_id))  # type: ignore[arg-type]
            beams = naive.beams(hidden_H, said, 3, 3)
            begun = list(dict.fromkeys(tuple(beam[:depth]) for beam in beams for depth in range(1, 4)))
            assert ways[1:] == begun[:7]


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"model": "gone"}, ModelError, "has no model.safetensors; name a folder of a ReDrafter head"),
        ({"model": None}, UsageError, "lacks model, a folder: those of redrafter that ship are for"),
        ({"width": 65}, UsageError, "width · length = 325 drafts a step; lower them to at most 256, such as width 5"),
        ({"beams": 3}, UsageError, "'beams', which redrafter does not know; it takes .*model, width, len"),
        ({"pickled": True}, ModelError, "holds pytorch_model.bin, which is pickled.*save its tensors as"),
        ({"hidden_size": 65}, ModelError, "has hidden_size 65 and the model 64; take the head"),
        ({"vocab_size": 99}, ModelError, "has vocab_size 99 and the model 128; take the head"),
        ({"model_type": "llama"}, ModelError, "has model_type 'llama'; a ReDrafter head is of 'recurrent"),
        ({"num_draft_layers": 3}, ModelError, r"lacks lm_head\.2\.linear\.weight, which its config\.json asks for"),
        ({"num_draft_layers": 1}, ModelError, r"lacks lm_head\.1\.weight, which its config\.json asks for"),
        ({"exit_dim": 96}, ModelError, r"lacks input_proj\.weight, which its config"),
        ({"rnn": False}, ModelError, r"has rnn_u\.bias, which its config\.json does not tell of"),
        ({"tensor": ("rnn_w.weight", (64, 63))}, ModelError, r"has rnn_w\.weight \[64, 63\], and .* need \[64, 64\]"),
        ({"tensor": ("draft_token_ids", (4,))}, ModelError, "reads 64 numbers and not exit_dim 128"),
    ],
)
def test_what_is_wrong_is_said(
    change: dict[str, Any], error: type[SlipstreamError], sentence: str, model: Path, tmp_path: Path
) -> None:
    folder = write_redrafter(model, tmp_path / "head")
    speculative: dict[str, Any] = {"method": "redrafter", "model": str(folder)}
    config = json.loads((folder / "config.json").read_text())
    for name, value in change.items():
        if name in ("model", "width", "beams"):
            speculative[name] = value
        elif name == "pickled":
            (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
        elif name == "tensor":
            tensors = load_file(folder / "model.safetensors") | {value[0]: torch.zeros(value[1])}
            save_file(tensors, folder / "model.safetensors")
        else:
            config[name] = value
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(error, match=sentence):
        LLM(model, **LIMITS, speculative={name: value for name, value in speculative.items() if value is not None})
