"""How a KV cache is to be kept, as each tool says it: read, kept by our folders, and given back."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from slipstream.checkpoint import convert, open_checkpoint, resolve
from slipstream.checkpoint.random import write_random_model
from slipstream.errors import ModelError
from slipstream.models import deepseek_v3, llama, phi3
from tests.checkpoint.naive_formats import FORMATS
from tests.checkpoint.test_formats import write_quantized

TINY = llama.TINY | {"num_hidden_layers": 2}
FLOAT = {"num_bits": 8, "type": "float", "dynamic": False}
MODELOPT = {"quant_method": "modelopt", "quant_algo": None, "producer": {"name": "modelopt", "version": "0.39.0"}}
COMPRESSED = {"quant_method": "compressed-tensors", "format": "dense", "config_groups": {}}


def write(folder: Path, config: dict[str, Any], scales: dict[str, Tensor], options: dict[str, Any] = TINY) -> Path:
    """scales: below model.layers.{layer}.self_attn, times layer + 1."""
    write_random_model(folder, options, seed=5)
    tensors = load_file(folder / "model.safetensors")
    for layer in range(2):
        tensors |= {f"model.layers.{layer}.self_attn.{name}": scale * (layer + 1) for name, scale in scales.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"quantization_config": config}))
    return folder


def number(value: float) -> Tensor:
    return torch.tensor(value)


HEADS = torch.tensor([0.5, 0.25])
CASES: dict[str, tuple[dict[str, Any], dict[str, Tensor], str, list[list[float]] | None]] = {
    "compressed-tensors": (
        COMPRESSED | {"kv_cache_scheme": FLOAT | {"symmetric": True, "strategy": "tensor", "observer": "minmax"}},
        {"k_scale": number(0.5)[None], "v_scale": number(0.25)[None], "q_scale": number(3.0)[None]},
        "float8_e4m3fn", [[0.5, 0.5], [0.25, 0.25]],
    ),
    "compressed-tensors, int8, a scale a head": (
        COMPRESSED | {"kv_cache_scheme": {"num_bits": 8, "type": "int", "strategy": "attn_head"}},
        {"k_scale": HEADS[:, None, None], "v_scale": 2 * HEADS[:, None, None]}, "int8", [[0.5, 0.25], [1.0, 0.5]],
    ),
    "ModelOpt": (
        MODELOPT | {"kv_cache_quant_algo": "FP8"},
        {"k_proj.k_scale": number(0.5), "v_proj.v_scale": number(0.25)}, "float8_e4m3fn", [[0.5, 0.5], [0.25, 0.25]],
    ),
    "ModelOpt without scales": (MODELOPT | {"kv_cache_scheme": FLOAT}, {}, "float8_e4m3fn", None),
    "nothing": (MODELOPT | {"kv_cache_quant_algo": None, "kv_cache_scheme": None}, {}, "", None),
}  # fmt: skip


def check(folder: Path, dtype: str, scales: list[list[float]] | None) -> None:
    cache = open_checkpoint(resolve(folder)).kv_cache
    assert cache.dtype == dtype
    expected = {} if scales is None else {layer: torch.tensor(scales) * (layer + 1) for layer in range(2)}
    assert cache.scales.keys() == expected.keys()
    assert all(torch.equal(cache.scales[layer], expected[layer]) for layer in expected)


@pytest.mark.parametrize("name", [name for name in CASES if name != "nothing"])
def test_a_cache_is_read_and_goes_through_every_folder(name: str, tmp_path: Path) -> None:
    config, tensors, dtype, scales = CASES[name]
    model = write(tmp_path / "model", config, tensors)
    convert(model, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "back", output_format="hf")
    for folder in ("model", "ours", "back"):
        check(tmp_path / folder, dtype, scales)


def test_where_nothing_is_quantized_the_config_is_at_odds_with_the_tensors(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="announces modelopt, but no tensor"):
        open_checkpoint(resolve(write(tmp_path / "model", *CASES["nothing"][:2])))


def test_weights_are_packed_and_a_cache_quantized_at_once(tmp_path: Path) -> None:
    """AutoFP8's name, for keys and values both; its config says nothing of it that we need."""
    model, _ = write_quantized(tmp_path / "model", TINY, FORMATS["fp8-tensor-static"])
    tensors = load_file(model / "model.safetensors")
    tensors |= {f"model.layers.{layer}.self_attn.kv_scale": torch.tensor(0.5 * (layer + 1)) for layer in range(2)}
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    convert(model, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "back", output_format="hf")
    for folder in ("model", "ours", "back"):
        check(tmp_path / folder, "float8_e4m3fn", [[0.5, 0.5], [0.5, 0.5]])
        assert len(open_checkpoint(resolve(tmp_path / folder)).formats) == 14


@pytest.mark.parametrize("model", [phi3, deepseek_v3], ids=lambda model: model.__name__)
def test_scales_go_back_to_the_attention_they_came_from(model: Any, tmp_path: Path) -> None:
    """Whose keys have another name there, and one plane where they are latent."""
    options = model.TINY | {"num_hidden_layers": 2}
    scales = {"k_scale": number(0.5)[None], "v_scale": number(0.25)[None]}
    first = write(tmp_path / "model", COMPRESSED | {"kv_cache_scheme": FLOAT}, scales, options)
    convert(first, tmp_path / "back", output_format="hf")
    before, after = (open_checkpoint(resolve(folder)).kv_cache for folder in (first, tmp_path / "back"))
    config = open_checkpoint(resolve(first)).config
    assert before.scales[1].shape == (config.kv_planes, config.num_kv_heads)
    assert all(torch.equal(before.scales[layer], after.scales[layer]) for layer in range(2))


def test_converting_can_decide_it(tmp_path: Path) -> None:
    model = write_random_model(tmp_path / "model", TINY)
    convert(model, tmp_path / "ours", kv_cache_dtype="fp8")
    check(tmp_path / "ours", "float8_e4m3fn", None)
    convert(tmp_path / "ours", tmp_path / "wide", kv_cache_dtype="float32")
    check(tmp_path / "wide", "", None)
    with pytest.raises(ModelError, match="int8 needs scales found by calibration"):
        convert(model, tmp_path / "narrow", kv_cache_dtype="int8")


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        (COMPRESSED | {"kv_cache_scheme": FLOAT}, {"k_scale": number(0.5)}, "lacks the scale of values in layer 0"),
        (
            COMPRESSED | {"kv_cache_scheme": FLOAT},
            {"k_scale": torch.ones(3), "v_scale": number(0.5)},
            "lacks the scale of keys in layer 0, one number or one for each KV head",
        ),
        (
            COMPRESSED | {"kv_cache_scheme": FLOAT},
            {"k_scale": number(0.0), "v_scale": number(0.5)},
            "a scale of keys or values in layer 0 that is not above 0",
        ),
        (COMPRESSED | {"kv_cache_scheme": FLOAT | {"num_bits": 4}}, {}, "num_bits is 4; the known values are 8"),
        (COMPRESSED | {"kv_cache_scheme": FLOAT | {"dynamic": True}}, {}, "dynamic is True; the known values are Fal"),
        (MODELOPT | {"kv_cache_quant_algo": "NVFP4"}, {}, "kv_cache_quant_algo is 'NVFP4'; the known values are FP8"),
    ],
)
def test_what_is_not_known_is_refused(
    config: dict[str, Any], tensors: dict[str, Tensor], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=message):
        open_checkpoint(resolve(write(tmp_path / "model", config, tensors)))


def test_our_own_folder_is_checked(tmp_path: Path) -> None:
    convert(write_random_model(tmp_path / "model", TINY), tmp_path / "ours", kv_cache_dtype="fp8")
    path = tmp_path / "ours" / "config.json"
    path.write_text(path.read_text().replace("float8_e4m3fn", "float8"))
    with pytest.raises(ModelError, match="kv_dtype is 'float8'; it must be one of float8_e4m3fn, int8"):
        open_checkpoint(resolve(tmp_path / "ours"))
