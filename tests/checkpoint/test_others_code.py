"""Folders of ours run by other libraries, and folders that they wrote run by us: the same logits.

transformers reads FP8 blocks by itself, compressed-tensors with the library of that name, and AWQ and GPTQ with
GPTQModel and optimum, which scripts/_setup.sh puts into a folder of their own: they ask for newer versions of what
everything else here uses.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    apply_quantization_config,
    preset_name_to_scheme,
)
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from slipstream.checkpoint import convert, open_checkpoint, resolve
from slipstream.checkpoint.random import write_random_model
from tests.checkpoint.naive_formats import BLOCK, FORMATS, rounded, to_e4m3
from tests.checkpoint.test_formats import (
    ACTIVATION_TOLERANCE,
    TOKEN_IDS,
    TOLERANCE,
    build_engine,
    logits_of,
    round_activations,
    write_quantized,
)
from tests.checkpoint.test_interchange import SHAPES
from tests.oracle import GraphRunner


def our_logits(model: Path, folder: Path) -> Tensor:
    return GraphRunner(build_engine(model, folder)).logits(TOKEN_IDS)


# ----- ours, run by compressed-tensors: it rounds activations, too

# A weight is multiplied in its scale's dtype there, in float32 here.
ROUNDED_WEIGHTS = {"gptq-4-sym": 5e-3, "ct-pack-8-channel": 5e-2, "ct-pack-w4afp8": 5e-2}
# With zero points transformers' newest version loads dequantized weights alone (test_formats.py).
COMPRESSED = [*ROUNDED_WEIGHTS, "ct-int-w8a8-static", "ct-float-dynamic", "ct-float-block"]


@pytest.mark.parametrize("name", COMPRESSED)
def test_compressed_tensors_runs_our_folder(name: str, tmp_path: Path) -> None:
    model, _ = write_quantized(tmp_path / "model", SHAPES, FORMATS[name])
    convert(model, tmp_path / "hf", output_format="compressed-tensors")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    assert theirs.model.layers[1].mlp.up_proj.quantization_scheme is not None
    expected = logits_of(theirs)
    assert expected.std() > 0.1
    tolerance = ROUNDED_WEIGHTS.get(name, ACTIVATION_TOLERANCE if FORMATS[name].activations else TOLERANCE)
    torch.testing.assert_close(our_logits(tmp_path / "hf", tmp_path / "engine"), expected, atol=tolerance, rtol=0)


# ----- theirs, run by us


def observed(weight_NK: Tensor, args: QuantizationArgs) -> tuple[Tensor, Tensor]:
    """The smallest and largest weight under each scale."""
    if args.strategy == "tensor":
        return weight_NK.min(), weight_NK.max()
    if args.strategy == "block":
        rows, columns = args.block_structure
        padding = (0, -weight_NK.shape[1] % columns, 0, -weight_NK.shape[0] % rows)
        padded = torch.nn.functional.pad(weight_NK, padding)
        blocks = padded.unflatten(0, (-1, rows)).unflatten(2, (-1, columns)).transpose(1, 2).flatten(2)
    else:
        blocks = weight_NK.unflatten(1, (-1, args.group_size or weight_NK.shape[1]))
    return blocks.amin(2), blocks.amax(2)


def write_compressed(folder: Path, preset: str, kv_cache: QuantizationArgs | None = None) -> Tensor:
    """As llm-compressor does: a preset applied to a model, its observers' scales, the compressor. Gives its logits."""
    base = write_random_model(folder.with_name("base"), SHAPES, seed=5)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    scheme = preset_name_to_scheme(preset, ["Linear"])
    config = QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"], kv_cache_scheme=kv_cache)
    apply_quantization_config(model, config, show_progress=False)
    for name, parameter in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        if leaf == "weight_scale":
            global_scale = getattr(module, "weight_global_scale", None)
            if global_scale is not None:
                global_scale.data.copy_(generate_gparam(module.weight.min(), module.weight.max()))
            found = calculate_qparams(*observed(module.weight, scheme.weights), scheme.weights, global_scale)
            for place, value in zip((parameter, getattr(module, "weight_zero_point", None)), found, strict=True):
                if place is not None:
                    place.data.copy_(value.reshape(place.shape))
        elif leaf in ("input_scale", "k_scale", "v_scale"):
            parameter.data.fill_({"input": 4 / 448, "k": 0.02, "v": 0.01}[leaf.removesuffix("_scale")])
    expected = logits_of(model)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(str(folder))
    return expected


@pytest.mark.parametrize("preset", ["W4A16_ASYM", "W8A16", "FP8", "FP8_BLOCK", "W4AFP8", "NVFP4A16"])
def test_a_folder_that_compressed_tensors_wrote_runs_here(preset: str, tmp_path: Path) -> None:
    expected = write_compressed(tmp_path / "model", preset)
    assert len(open_checkpoint(resolve(tmp_path / "model")).formats) == 7 * 2
    torch.testing.assert_close(our_logits(tmp_path / "model", tmp_path / "engine"), expected, atol=1e-4, rtol=0)


def test_int8_activations_are_rounded_in_other_steps_there(tmp_path: Path) -> None:
    """It divides the largest by 127.5, we (as vLLM's kernels) by 127: alike, and not the same."""
    expected = write_compressed(tmp_path / "model", "W8A8")
    assert {format.kind for format in open_checkpoint(resolve(tmp_path / "model")).formats.values()} == {"w8a8"}
    found = our_logits(tmp_path / "model", tmp_path / "engine")
    assert (found - expected).std() < 0.05 * expected.std()


@pytest.mark.parametrize("strategy", ["tensor", "attn_head"])
def test_its_kv_cache_runs_here_and_ours_there(strategy: str, tmp_path: Path) -> None:
    scheme = QuantizationArgs(num_bits=8, type="float", strategy=strategy, dynamic=False, symmetric=True)
    expected = write_compressed(tmp_path / "model", "FP8_DYNAMIC", scheme)
    assert open_checkpoint(resolve(tmp_path / "model")).kv_cache.dtype == "float8_e4m3fn"
    torch.testing.assert_close(our_logits(tmp_path / "model", tmp_path / "engine"), expected, atol=1e-4, rtol=0)
    convert(tmp_path / "model", tmp_path / "hf", output_format="hf")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    torch.testing.assert_close(logits_of(theirs), expected, atol=1e-4, rtol=0)


# ----- FP8 blocks, run by transformers, which has no products of FP8 on a CPU: it dequantizes the weights


def test_transformers_runs_our_fp8_blocks(tmp_path: Path) -> None:
    model, _ = write_quantized(tmp_path / "model", SHAPES, FORMATS["ct-float-block"])
    convert(model, tmp_path / "hf", output_format="fp8")
    theirs: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    ours = open_checkpoint(resolve(tmp_path / "hf"))
    for name in ours.formats:
        assert torch.equal(ours.read(name), theirs.get_parameter(ours.recipes[name].sources[0])), name
    round_activations(theirs, rounded(to_e4m3, 448, size=BLOCK))
    found = our_logits(tmp_path / "hf", tmp_path / "engine")
    torch.testing.assert_close(found, logits_of(theirs), atol=ACTIVATION_TOLERANCE, rtol=0)


# ----- AWQ and GPTQ, run by transformers with GPTQModel

LIBRARIES = Path(sys.prefix) / "gptqmodel"
LOADS = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AwqConfig, GPTQConfig

for folder in sys.argv[2:]:
    given = json.load(open(f"{folder}/config.json"))["quantization_config"]
    # Its kernels in plain PyTorch; others would be compiled first.
    chosen = {"awq": AwqConfig(backend="torch_awq"), "gptq": GPTQConfig(bits=given["bits"], backend="torch")}
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, device_map="cpu", quantization_config=chosen[given["quant_method"]]
    ).eval()
    assert "gptqmodel" in type(model.model.layers[1].mlp.up_proj).__module__
    assert type(model.lm_head) is torch.nn.Linear
    with torch.no_grad():
        torch.save(model(torch.tensor([json.loads(sys.argv[1])])).logits[0], f"{folder}/logits.pt")
"""
CASES = {"awq": "awq", "gptq-4-sym": "gptq", "gptq-4-act-order": "gptq", "gptq-8-act-order": "gptq"}


def leave_out_v_proj(folder: Path, reference: Any) -> None:
    """As exclude_modules would."""
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if ".v_proj." not in name}
    names = [name for name, _ in reference.named_parameters() if name.endswith("v_proj.weight")]
    save_file(kept | {name: reference.get_parameter(name).data for name in names}, folder / "model.safetensors")


@pytest.mark.skipif(not LIBRARIES.is_dir(), reason="scripts/test installs GPTQModel on Linux where a compiler is")
def test_gptqmodel_runs_our_folders(tmp_path: Path) -> None:
    folders = []
    for name, layout in CASES.items():
        model, reference = write_quantized(tmp_path / f"{name}-model", SHAPES, FORMATS[name])
        if name == "gptq-4-sym":
            leave_out_v_proj(model, reference)
        folders.append(tmp_path / name)
        convert(model, folders[-1], output_format=layout)
    environment = os.environ | {
        "PYTHONPATH": str(LIBRARIES), "HOME": str(tmp_path), "TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [sys.executable, "-c", LOADS, str(TOKEN_IDS), *map(str, folders)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    for folder in folders:
        expected = torch.load(folder / "logits.pt")
        assert expected.std() > 0.1
        # It multiplies weights in float16, the dtype of the scales.
        found = our_logits(folder, folder / "engine")
        torch.testing.assert_close(found, expected, atol=5e-3, rtol=0)
