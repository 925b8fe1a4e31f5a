"""Heads in TensorRT-LLM's checkpoints, beside their model, as its converters write them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from slipstream import LLM, SamplingParams
from slipstream.checkpoint.random import write_random_model
from slipstream.errors import ModelError, SlipstreamError, UnsupportedModel
from slipstream.models import llama
from slipstream.speculative.head_file import open_head
from tests.checkpoint.tensorrt_llm import HEADS, add_head, write_as_tensorrt_llm
from tests.speculative.heads import write_eagle, write_medusa, write_redrafter
from tests.speculative.test_lossless import LIMITS

WRITERS = {"medusa": write_medusa, "redrafter": write_redrafter, "eagle": write_eagle}
FILES = {"medusa": "medusa_lm_head.safetensors", "redrafter": "model.safetensors", "eagle": "model.safetensors"}
GREEDY = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_model(tmp_path_factory.mktemp("model"), llama.TINY)


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("method", HEADS)
def test_a_head_beside_its_model_is_the_published_one(method: str, tp_size: int, model: Path, tmp_path: Path) -> None:
    head = WRITERS[method](model, tmp_path / "head")
    folder = add_head(write_as_tensorrt_llm(model, tmp_path / "both", tp_size), head, method, tp_size)
    expected = load_file(head / FILES[method])
    with open_head(folder, method, FILES[method], "", "") as (_, file):
        assert {*file.names()} == {*expected}
        for name, tensor in expected.items():
            assert file.shape(name) == tuple(tensor.shape)
            assert torch.equal(file.read(name), tensor)

    found = []
    for target, drafts in ((model, head), (folder, folder)):
        speculative = {"method": method, "model": str(drafts), "adaptive": False}
        with LLM(target, **LIMITS, speculative=speculative) as llm:
            outputs = llm.generate([[1, 2, 3], [7] * 20], GREEDY)
            found.append(([each.outputs[0].token_ids for each in outputs], llm.stats.num_draft_tokens))
    assert found[0] == found[1]


def test_beams_are_those_that_the_folder_names(model: Path, tmp_path: Path) -> None:
    head = write_redrafter(model, tmp_path / "head")
    folder = add_head(write_as_tensorrt_llm(model, tmp_path / "both", 1), head, "redrafter", 1)
    config = json.loads((folder / "config.json").read_text())
    config |= {"redrafter_num_beams": 3, "redrafter_draft_len_per_beam": 4}
    (folder / "config.json").write_text(json.dumps(config))
    for given, most in (({}, 12), ({"width": 2}, 8), ({"length": 1}, 3)):
        speculative = {"method": "redrafter", "model": str(folder), **given}
        with LLM(folder, **LIMITS, speculative=speculative) as llm:
            assert llm.runtime_config.max_draft_len == most


@pytest.mark.parametrize(
    ("method", "change", "error", "sentence"),
    [
        ("eagle", {}, ModelError, "is of ReDrafterForCausalLM, which holds a head for redrafter; give one of eagle"),
        ("redrafter", {"architecture": "LlamaForCausalLM"}, ModelError, "of LlamaForCausalLM, which holds no head"),
        ("redrafter", {"redrafter_hidden_size": 65}, ModelError, "has hidden_size 65 and the model 64; take the head"),
        ("redrafter", {"vocab_size": 100}, ModelError, "has vocab_size 100 and the model 128; take the head"),
        ("redrafter", {"redrafter_num_layers": 3}, ModelError, r"lacks lm_head\.2\.linear\.weight"),
        ("redrafter", {"redrafter_exit_dim": 0}, SlipstreamError, "redrafter_exit_dim is 0; it must be"),
        ("redrafter", "packed", ModelError, r"has drafter\.rnn_w\.weight in int8; heads are read as floats only"),
    ],
)
def test_what_is_wrong_is_said(
    method: str, change: Any, error: type[SlipstreamError], sentence: str, model: Path, tmp_path: Path
) -> None:
    head = write_redrafter(model, tmp_path / "head")
    folder = add_head(write_as_tensorrt_llm(model, tmp_path / "both"), head, "redrafter", 1)
    if change == "packed":
        tensors = load_file(folder / "rank0.safetensors")
        save_file(tensors | {"drafter.rnn_w.weight": torch.ones(64, 64).char()}, folder / "rank0.safetensors")
    else:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(error, match=sentence):
        LLM(model, **LIMITS, speculative={"method": method, "model": str(folder)})


def test_a_base_that_is_not_known_is_refused(model: Path, tmp_path: Path) -> None:
    head = write_redrafter(model, tmp_path / "head")
    folder = add_head(write_as_tensorrt_llm(model, tmp_path / "both"), head, "redrafter", 1)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"base_model_architecture": "GPTForCausalLM"}))
    with pytest.raises(UnsupportedModel, match="base_model_architecture is 'GPTForCausalLM'"):
        LLM(folder)
