"""Weights rounded as they are read are those that slipstream quantize writes without texts, and in int8 the head."""

from pathlib import Path

import pytest
import torch

from slipstream import LLM, SamplingParams
from slipstream.build import build
from slipstream.checkpoint import open_checkpoint, resolve
from slipstream.checkpoint.random import write_random_model
from slipstream.errors import EngineError, ModelError
from slipstream.kernels.linear.panels import panel_weight
from slipstream.models import llama, qwen3_moe
from slipstream.quantize.apply import Settings, quantize_model
from slipstream.quantize.on_load import quantized_on_load
from slipstream.quantize.stream import captured_graph
from slipstream.schema.format import WeightFormat
from tests.quantize.test_apply import texts_of

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=1)


@pytest.mark.parametrize("model", [llama, qwen3_moe], ids=["llama", "qwen3_moe"])
@pytest.mark.parametrize("qformat", ["fp8", "fp8_block", "int8", "int8_wo", "int4_wo", "nvfp4"])
def test_it_is_what_quantize_writes(model: object, qformat: str, tmp_path: Path) -> None:
    write_random_model(tmp_path / "model", model.TINY)  # type: ignore[attr-defined]
    quantize_model(
        tmp_path / "model", tmp_path / "made", lambda checkpoint: texts_of(checkpoint, 0), Settings(qformat=qformat)
    )
    plain, written = (open_checkpoint(resolve(tmp_path / name)) for name in ("model", "made"))
    loaded = quantized_on_load(plain, captured_graph(plain).graph, qformat)
    assert loaded.formats == written.formats | (
        {"lm_head.weight": WeightFormat(kind="w8a8")} if qformat == "int8" else {}
    )
    assert written.formats
    for name in [name for name in written.stored_names() if name in loaded.stored_names()]:
        assert torch.equal(loaded.read(name).view(torch.uint8), written.read(name).view(torch.uint8)), name
        assert (loaded.shape(name), loaded.dtype_of(name)) == (written.shape(name), written.dtype_of(name))
    for name in list(written.formats)[:3]:
        torch.testing.assert_close(loaded.read(name), written.read(name), rtol=0, atol=0)


def test_a_head_that_is_the_embedding_is_rounded_and_both_are_the_same_numbers(tmp_path: Path) -> None:
    write_random_model(tmp_path / "model", llama.TINY | {"tie_word_embeddings": True})
    with LLM(tmp_path / "model", quantization="int8") as llm:
        graph, weights = llm._folder.graph, llm._folder.weights
        assert "linear" not in graph.count_ops()
        head = next(node for node in graph.nodes if node.outputs[0] == graph.outputs[0])
        table = next(node for node in graph.nodes if node.op == "embedding_panels")
        assert head.inputs[2:5] == table.inputs[:3], "in memory once"
        panels, scales = (weights.read(str(name)) for name in table.inputs[:2])
    whole = open_checkpoint(resolve(tmp_path / "model"), "float32").read("embed.weight")
    found = panel_weight(panels, scales, None, 8, 0, *whole.shape)
    step = whole.abs().amax(1, keepdim=True) / 127
    assert ((found - whole).abs() <= step * 0.501).all()


def test_a_model_is_opened_in_fewer_bits(tmp_path: Path) -> None:
    write_random_model(tmp_path / "model", llama.TINY)
    quantize_model(
        tmp_path / "model", tmp_path / "made", lambda checkpoint: texts_of(checkpoint, 0), Settings(qformat="int8_wo")
    )
    outputs = []
    for folder, quantization in (("model", "int8_wo"), ("made", None)):
        with LLM(tmp_path / folder, quantization=quantization) as llm:
            outputs.append(llm.generate([[5, 6, 7, 8]], GREEDY)[0].outputs[0])
            assert "linear_w8a16" in {node.op for node in llm._folder.graph.nodes}
    assert outputs[0].token_ids == outputs[1].token_ids
    assert outputs[0].logprobs == outputs[1].logprobs


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    write_random_model(tmp_path / "model", llama.TINY)
    with pytest.raises(
        ModelError, match=r"int4_awq.*may be fp8, fp8_block, int8, int8_wo, int4_wo, nvfp4, gguf; slipstream quantize"
    ):
        LLM(tmp_path / "model", quantization="int4_awq")
    with pytest.raises(ModelError, match="quantization is 'int3'; when loading it may be"):
        LLM(tmp_path / "model", quantization="int3")
    quantize_model(
        tmp_path / "model", tmp_path / "made", lambda checkpoint: texts_of(checkpoint, 0), Settings(qformat="int8_wo")
    )
    with pytest.raises(ModelError, match="quantized already"):
        LLM(tmp_path / "made", quantization="fp8")
    build(open_checkpoint(resolve(tmp_path / "model")), tmp_path / "engine")
    with pytest.raises(EngineError, match="is built already"):
        LLM(tmp_path / "engine", quantization="fp8")
