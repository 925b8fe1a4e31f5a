"""KV caches in fewer bits through the whole engine; 8 bits against Llama in float64 whose cache rounds as they do."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from slipstream import LLM, SamplingParams
from slipstream.checkpoint.random import write_random_model
from slipstream.errors import SlipstreamError
from slipstream.models import known_models, llama, model_file
from tests.naive_llama import NaiveLlama

PROMPT = [(7 * i * i + 3 * i + 1) % 128 for i in range(41)]
SIZES: dict[str, Any] = {"max_batch_size": 4, "kv_cache_max_tokens": 512}
# A number between two of the cache's steps may round the other way than in float64: one step of one number.
TOLERANCE = 2e-2
SCHEMES = {"fp8": {"num_bits": 8, "type": "float"}, "int8": {"num_bits": 8, "type": "int"}}
every_format = pytest.mark.parametrize("name", SCHEMES)


def scale_of(name: str, layer: int, plane: int) -> float:
    """Coarse, and another one for each layer and plane: a mistaken one shows."""
    return {"fp8": 0.5, "int8": 0.02}[name] * (1 + layer / 4 + plane / 8)


def write_calibrated(folder: Path, name: str, options: dict[str, Any] = llama.TINY) -> Path:
    """A model as llm-compressor writes one of which the KV cache alone is quantized."""
    write_random_model(folder, options, seed=3)
    tensors = load_file(folder / "model.safetensors")
    for layer in range(options["num_hidden_layers"]):
        for plane, letter in enumerate("kv"):
            tensors[f"model.layers.{layer}.self_attn.{letter}_scale"] = torch.tensor([scale_of(name, layer, plane)])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    scheme = SCHEMES[name] | {"symmetric": True, "strategy": "tensor", "dynamic": False, "group_size": None}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors", "format": "dense", "quantization_status": "compressed",
        "config_groups": {}, "ignore": [], "kv_cache_scheme": scheme,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: write_calibrated(tmp_path_factory.mktemp(name) / "model", name) for name in SCHEMES}


def rounded(name: str, has_scales: bool = True) -> Callable[[str, Tensor], Tensor]:
    def stored(which: str, x: Tensor) -> Tensor:
        layer, plane = int(which.split(".")[2]), "kv".index(which[-1])
        scale = scale_of(name, layer, plane) if has_scales else 1.0
        scaled = x / torch.tensor(scale).double()
        if name == "int8":
            return scaled.round().clamp(-127, 127) * scale
        return scaled.clamp(-448, 448).float().to(torch.float8_e4m3fn).double() * scale

    return stored


def naive(model: Path, name: str, has_scales: bool = True) -> NaiveLlama:
    return NaiveLlama(model, [0] * 3, stored=rounded(name, has_scales))


def scores(llm: LLM, token_ids: list[int]) -> Tensor:
    return torch.tensor(llm.score(token_ids).logprobs[1:])


def expected_scores(logits_TV: Tensor, token_ids: list[int]) -> Tensor:
    return logits_TV.log_softmax(-1)[:-1].gather(1, torch.tensor(token_ids[1:])[:, None])[:, 0].float()


def greedy(llm: LLM, prompt: list[int], num_tokens: int) -> Any:
    return llm.generate(prompt, SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True))


@every_format
@pytest.mark.parametrize("max_num_tokens", [64, 7, 1], ids=["whole", "chunks", "token_by_token"])
def test_scores_are_those_of_a_cache_that_rounds(calibrated: dict[str, Path], name: str, max_num_tokens: int) -> None:
    model = calibrated[name]
    expected = expected_scores(naive(model, name).logits(PROMPT), PROMPT)
    exact = expected_scores(NaiveLlama(model, [0] * 3).logits(PROMPT), PROMPT)
    assert (expected - exact).abs().max() > 3 * TOLERANCE, "the rounding must show"
    with LLM(model, **SIZES | {"max_batch_size": 1}, max_num_tokens=max_num_tokens) as llm:
        assert llm.manifest.kv_cache_dtype == name
        torch.testing.assert_close(scores(llm, PROMPT), expected, rtol=0, atol=TOLERANCE)
    with LLM(model, **SIZES, kv_cache_dtype="float32") as llm:
        torch.testing.assert_close(scores(llm, PROMPT), exact, rtol=0, atol=1e-4)


@every_format
def test_a_prefix_is_reused_and_copied(calibrated: dict[str, Path], name: str) -> None:
    """36 tokens are two whole blocks and a part of a third, which is copied."""
    model, other = calibrated[name], [*PROMPT[:36], 99, 98, 97]
    with LLM(model, **SIZES) as llm:
        alone = greedy(llm, other, 6).outputs[0].token_ids
    with LLM(model, **SIZES) as llm:
        greedy(llm, PROMPT, 1)
        again = greedy(llm, other, 6)
        assert again.num_cached_tokens == 36
        assert again.outputs[0].token_ids == alone == naive(model, name).greedy(other, 6)


def test_fp8_needs_no_scales(tmp_path: Path) -> None:
    model = write_random_model(tmp_path / "model", llama.TINY, seed=3)
    expected = expected_scores(naive(model, "fp8", has_scales=False).logits(PROMPT), PROMPT)
    with LLM(model, **SIZES, kv_cache_dtype="fp8") as llm:
        torch.testing.assert_close(scores(llm, PROMPT), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("model_type", known_models())
def test_every_model_keeps_its_cache_in_8_bits(model_type: str, tmp_path: Path) -> None:
    """A quarter of float32's bytes; scores near those of float32, since the build knows of it and no model does."""
    model = write_random_model(tmp_path / "model", model_file(model_type).TINY, seed=2)
    limits = SIZES | {"max_num_tokens": 64}
    with LLM(model, **limits) as llm:
        wide, exact = llm.manifest, scores(llm, PROMPT[:30])
    with LLM(model, **limits, kv_cache_dtype="fp8") as llm:
        narrow, found = llm.manifest, scores(llm, PROMPT[:30])
    assert narrow.kv_block_bytes(narrow.kv_groups) * 4 == wide.kv_block_bytes(wide.kv_groups)
    assert 0 < (found - exact).abs().median() < 0.2


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("model_type", ["llama", "deepseek_v3"])  # two planes, and one
def test_a_model_keeps_its_cache_in_16_bits(model_type: str, dtype: str, tmp_path: Path) -> None:
    """Half of float32's bytes, and no scales; scores a little away from those of float32."""
    model = write_random_model(tmp_path / "model", model_file(model_type).TINY, seed=2)
    limits = SIZES | {"max_num_tokens": 64, "dtype": "float32"}
    with LLM(model, **limits) as llm:
        wide, exact = llm.manifest, scores(llm, PROMPT[:30])
    with LLM(model, **limits, kv_cache_dtype=dtype) as llm:
        narrow, found = llm.manifest, scores(llm, PROMPT[:30])
    assert narrow.kv_cache_dtype == dtype
    assert narrow.kv_block_bytes(narrow.kv_groups) * 2 == wide.kv_block_bytes(wide.kv_groups)
    assert 0 < (found - exact).abs().median() < 0.02


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"quantization": "int8"}, "float16"),
        ({"quantization": "int8", "kv_cache_dtype": "float32"}, "float32"),
        ({"quantization": "int8_wo"}, "float32"),
        ({}, "float32"),
    ],
    ids=str,
)
def test_activations_of_8_bits_come_with_a_cache_in_float16(
    tiny_model: Path, options: dict[str, str], expected: str
) -> None:
    with LLM(tiny_model, **SIZES, dtype="float32", **options) as llm:
        assert llm.manifest.kv_cache_dtype == expected


@every_format
def test_sinks_and_windows_go_together_with_8_bits(calibrated: dict[str, Path], name: str) -> None:
    options = SIZES | {"max_attention_window_size": 16, "sink_token_length": 2}
    with LLM(calibrated[name], **options) as whole, LLM(calibrated[name], **options, max_num_tokens=5) as chunks:
        torch.testing.assert_close(scores(whole, PROMPT), scores(chunks, PROMPT), rtol=0, atol=TOLERANCE)


def test_what_cannot_be_is_said_in_a_sentence(calibrated: dict[str, Path], tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(SlipstreamError, match=r"int8 needs scales found by calibration, which .* give .* fp8"):
        LLM(tiny_model, kv_cache_dtype="int8")
    with pytest.raises(SlipstreamError, match=r"int8 needs scales"):  # those of E4M3 are of no use
        LLM(calibrated["fp8"], kv_cache_dtype="int8")
    with pytest.raises(
        SlipstreamError, match=r"kv_cache_dtype is 'fp4'; .* must be auto, fp8, int8, float32, bfloat16"
    ):
        LLM(tiny_model, kv_cache_dtype="fp4")
    with pytest.raises(
        SlipstreamError, match=r"kv_cache_dtype is 'float32'; .* in bfloat16 it must be auto, .*, bfloat16\."
    ):
        LLM(tiny_model, dtype="bfloat16", kv_cache_dtype="float32")
    with pytest.raises(SlipstreamError, match=r"kv_cache_dtype is 8; it must be a string"):
        LLM(tiny_model, kv_cache_dtype=8)  # type: ignore[arg-type]
