"""Every published format, from the folder that its tool writes to logits: packed all the way, and right.

naive_formats.py quantizes a random model with its own code; transformers runs what the numbers mean, in float32.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

import tests.models.baichuan_reference  # noqa: F401 - what transformers lacks
from slipstream.build import build
from slipstream.checkpoint import convert, open_checkpoint, resolve
from slipstream.checkpoint.quantized.linears import matches_target
from slipstream.checkpoint.random import write_random_model
from slipstream.engine.folder import open_engine
from slipstream.errors import CorruptFile, ModelError
from slipstream.models import llama, mixtral
from slipstream.schema.build import BuildConfig
from tests.checkpoint.naive_formats import FORMATS, Format, ct
from tests.oracle import GraphRunner

# Widths that 128 does not divide, so that the last block of a row and of a column is smaller.
SHAPES = llama.TINY | {"hidden_size": 160, "intermediate_size": 224, "head_dim": 48, "num_hidden_layers": 2}
LINEARS_PER_LAYER = 7
TOLERANCE = 1e-4  # absolute, float32 logits
# A number between two of an activation's steps may round the other way than in float64: one step of one number.
ACTIVATION_TOLERANCE = 5e-2
TOKEN_IDS = list(range(3, 120, 7))


def quantized_linears(reference: nn.Module) -> dict[str, nn.Linear]:
    """What the tools quantize: every linear but the head and routers."""
    found = {name: module for name, module in reference.named_modules() if isinstance(module, nn.Linear)}
    return {name: module for name, module in found.items() if not name.endswith(("lm_head", ".gate", ".router"))}


def write_quantized(folder: Path, options: dict[str, Any], format: Format) -> tuple[Path, Any]:
    """The folder as its tool would write it, and the transformers model of the same numbers."""
    write_random_model(folder, options, seed=5)
    tensors, rng = load_file(folder / "model.safetensors"), np.random.default_rng(7)
    linears = quantized_linears(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    dense = dict(tensors)
    for name in [*linears, *(name.removesuffix(".weight") for name in tensors if re.search(r"experts\.\d", name))]:
        if f"{name}.weight" not in tensors:  # transformers has joined what the folder has apart
            continue
        quantized = format.quantize(tensors.pop(f"{name}.weight").double(), rng)
        tensors |= {f"{name}.{suffix}": tensor for suffix, tensor in quantized.stored.items()}
        dense[f"{name}.weight"] = quantized.weight.float()
    save_file(dense, folder / "model.safetensors", {"format": "pt"})
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager")
    if format.activations is not None:
        round_activations(reference, format.activations)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    if format.config:
        (folder / "config.json").write_text(json.dumps(config | {"quantization_config": format.config}))
    if format.extra_file:
        name, values = format.extra_file
        (folder / name).write_text(json.dumps(values))
    return folder, reference.eval()


def round_activations(reference: nn.Module, rounded: Callable[[Tensor], Tensor]) -> None:
    plain = nn.functional.linear
    for name, linear in quantized_linears(reference).items():
        if not name.endswith("kv_b_proj"):  # it is absorbed, so it has no input
            linear.register_forward_pre_hook(lambda _, inputs: (rounded(inputs[0]),))
    for name, module in reference.named_modules():
        if name.endswith(".experts"):
            module.register_forward_pre_hook(lambda *_: _set_linear(lambda x, weight: plain(rounded(x), weight)))
            module.register_forward_hook(lambda *_: _set_linear(plain))


def _set_linear(function: Callable[..., Tensor]) -> None:
    nn.functional.linear = function  # type: ignore[assignment]


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([TOKEN_IDS])).logits[0]


def bytes_in(tensor: Tensor) -> Tensor:
    return tensor.flatten().view(torch.uint8)


def build_engine(model: Path, folder: Path, **changes: Any) -> Path:
    build(open_checkpoint(resolve(model)), folder, BuildConfig(max_batch_size=4, max_num_tokens=64, **changes))
    return folder


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_runs_packed_and_right(name: str, tmp_path: Path) -> None:
    format = FORMATS[name]
    model, reference = write_quantized(tmp_path / "model", SHAPES, format)
    tolerance = TOLERANCE if format.activations is None else ACTIVATION_TOLERANCE
    expected = logits_of(reference)
    assert expected.std() > 0.1

    checkpoint = open_checkpoint(resolve(model))
    assert len(checkpoint.formats) == LINEARS_PER_LAYER * 2
    assert {each.kind for each in checkpoint.formats.values()} == {format.kind}
    engine_folder = build_engine(model, tmp_path / "engine")
    torch.testing.assert_close(GraphRunner(engine_folder).logits(TOKEN_IDS), expected, atol=tolerance, rtol=0)

    engine = open_engine(engine_folder)
    ops = engine.graph.count_ops()
    on_cpu = ("linear_panels", "linear_panels_silu_and_mul_quantize")  # what its kernels read instead
    products = sum(ops.get(name, 0) for name in (f"linear_{format.kind}", *on_cpu))
    assert products == 4 * 2, "q, k, v are one product, gate and up too"
    sizes = {each: engine.weights.read(each).nbytes for each in engine.weights.names()}
    num_weights = sum(linear.weight.numel() for linear in quantized_linears(reference).values())
    assert sum(size for each, size in sizes.items() if ".packed" in each) == num_weights * format.bits / 8
    assert sum(size for each, size in sizes.items() if ".layers." in f".{each}") < num_weights * 1.7
    engine.close()

    converted = tmp_path / "converted"
    convert(model, converted)
    again = build_engine(converted, tmp_path / "again")
    assert (again / "rank0.engine").read_bytes() == (engine_folder / "rank0.engine").read_bytes()


@pytest.mark.parametrize("name", [name for name in FORMATS if name.startswith("ct-") and "act-order" not in name])
def test_compressed_tensors_itself_reads_the_same_weights(name: str, tmp_path: Path) -> None:
    """The library that defines the format is an oracle of the naive packing. (Its newest version has no act-order.)"""
    model, _ = write_quantized(tmp_path / "model", SHAPES, FORMATS[name])
    dequantize = CompressedTensorsConfig(dequantize=True)
    theirs = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, quantization_config=dequantize)
    checkpoint = open_checkpoint(resolve(model))
    # It multiplies in the scale's dtype, or in bfloat16, we in float32.
    rounding = 2**-8 if "pack" in name or "nvfp4" in name else 1e-6
    for ours in checkpoint.formats:
        weight = theirs.get_parameter(checkpoint.recipes[ours].sources[0])
        torch.testing.assert_close(checkpoint.read(ours), weight, atol=0, rtol=rounding)


@pytest.mark.parametrize("name", FORMATS)
def test_packed_weights_go_back_to_hugging_face_as_compressed_tensors(name: str, tmp_path: Path) -> None:
    model, _ = write_quantized(tmp_path / "model", SHAPES, FORMATS[name])
    convert(model, tmp_path / "hf", output_format="compressed-tensors")
    before, after = open_checkpoint(resolve(model)), open_checkpoint(resolve(tmp_path / "hf"))
    assert after.formats == before.formats
    for stored in before.stored_names():
        assert torch.equal(bytes_in(before.read(stored)), bytes_in(after.read(stored))), stored
    if "act-order" in name:
        return  # the library's newest version has none
    dequantize = CompressedTensorsConfig(dequantize=True)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32, quantization_config=dequantize)
    for ours in before.formats:
        weight = theirs.get_parameter(before.recipes[ours].sources[0])
        torch.testing.assert_close(before.read(ours), weight, atol=0, rtol=2**-8)


def test_a_bias_of_zeros_that_a_tool_added_is_left_out(tmp_path: Path) -> None:
    model, _ = write_quantized(tmp_path / "model", SHAPES, FORMATS["gptq-4-sym"])
    change(model, lambda t: t.update({"model.layers.0.mlp.up_proj.bias": torch.zeros(224)}))
    assert "layers.0.mlp.up_proj.bias" not in open_checkpoint(resolve(model)).recipes
    change(model, lambda t: t.update({"model.layers.0.mlp.up_proj.bias": torch.ones(224)}))
    with pytest.raises(CorruptFile, match=r"up_proj\.bias, which its config has no place for"):
        open_checkpoint(resolve(model))


def test_linears_of_many_formats_are_joined_where_they_are_stored_alike(tmp_path: Path) -> None:
    """One config group for q and gate, another for the rest; v is not quantized at all."""
    model, reference = write_quantized(tmp_path / "model", SHAPES, FORMATS["ct-pack-4"])
    tensors = load_file(model / "model.safetensors")
    config = json.loads((model / "config.json").read_text())
    eight = ct("pack-quantized", {"num_bits": 8, "strategy": "channel"})["config_groups"]["group_0"]
    eight["targets"] = [r"re:.*\.gate_proj", "model.layers.0.self_attn.q_proj"]
    groups = {"group_0": eight, "group_1": config["quantization_config"]["config_groups"]["group_0"]}
    config["quantization_config"] |= {"config_groups": groups}
    for name, linear in quantized_linears(reference).items():
        old = {each: tensors.pop(each) for each in list(tensors) if each.startswith(f"{name}.")}
        if name.endswith("v_proj"):
            tensors[f"{name}.weight"] = linear.weight.data.clone()
        elif name.endswith("gate_proj") or name == "model.layers.0.self_attn.q_proj":
            quantized = FORMATS["ct-pack-8-channel"].quantize(linear.weight.data.double(), np.random.default_rng())
            linear.weight.data = quantized.weight.float()
            tensors |= {f"{name}.{suffix}": tensor for suffix, tensor in quantized.stored.items()}
        else:
            tensors |= old
    save_file(tensors, model / "model.safetensors")
    (model / "config.json").write_text(json.dumps(config))
    checkpoint = open_checkpoint(resolve(model))
    report = build(checkpoint, tmp_path / "engine", BuildConfig(max_batch_size=4, max_num_tokens=64))
    matches = {each.name: each.matches for each in report.passes}
    assert (matches["fuse_qkv"], matches["fuse_gate_up"], matches["lower_formats"]) == (0, 0, 12)
    expected = logits_of(reference)
    torch.testing.assert_close(GraphRunner(tmp_path / "engine").logits(TOKEN_IDS), expected, atol=TOLERANCE, rtol=0)


# ----- what cannot be


def change(folder: Path, edit: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def edited(name: str, edit: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    full = f"model.layers.1.mlp.up_proj.{name}"
    return lambda tensors: tensors.__setitem__(full, edit(tensors[full]).contiguous())


BAD_TENSORS: list[tuple[str, Callable[[dict[str, Tensor]], Any], str]] = [
    ("awq", edited("qweight", lambda t: t[:, :-1]), r"up_proj\.qzeros is int32 \[5, 28\]; .* must be int32 \[5, 27\]"),
    ("awq", edited("qweight", lambda t: t.float()), r"up_proj\.qweight is float32 .* must be int32"),
    ("awq", edited("qweight", lambda t: t[0]), r"up_proj\.qweight is \[28\]; it must have 2 dimensions"),
    ("awq", lambda t: t.pop("model.layers.1.mlp.up_proj.scales"), r"lacks the tensor model\.layers\.1\.mlp\.up"),
    ("gptq-4-act-order", edited("g_idx", lambda t: t + 1), r"g_idx must put 32 columns into .* 1 to 5"),
    ("gptq-4-act-order", edited("g_idx", lambda t: t - 1), r"g_idx must put 32 columns into .* -1 to 3"),
    ("gptq-4-act-order", edited("g_idx", lambda t: t * 0), r"g_idx must put 32 columns into .* 0 to 0"),
    ("gptq-4-act-order", edited("g_idx", lambda t: t[1:]), r"g_idx is int32 \[159\]; .* int64 \[160\]"),
    ("gptq-4-sym", edited("qzeros", lambda t: t + 1), "qzeros has zero points off the middle; sym must be false"),
    ("awq-sym", edited("qzeros", lambda t: t + 1), "qzeros has zero points other than 8; zero_point must be true"),
    ("ct-pack-4", edited("weight_shape", lambda t: t * 0), r"weight_shape is \[0, 0\]; weight_packed has 224 rows"),
    ("ct-pack-4", edited("weight_shape", lambda t: t + torch.tensor([0, 2**50])), "weight_shape is .*224 rows"),
    ("ct-pack-4", edited("weight_packed", lambda t: t[:, 1:]), r"weight_packed is int32 \[224, 19\]; .* \[224, 20\]"),
    ("ct-float-static", edited("input_scale", lambda t: t * 0), "input_scale is 0.0; a scale must be above 0"),
    ("ct-float-static", edited("input_scale", lambda t: t * float("nan")), "input_scale is nan; a scale must be"),
    ("ct-float-static", edited("input_scale", lambda t: torch.ones(2)), r"input_scale is float32 \[2\]; .* \[1\]"),
    ("fp8-blocks", edited("weight_scale_inv", lambda t: t.t()[:, :1]), r"scale_inv is float32 \[2, 1\]; .* \[2, 2\]"),
    ("fp8-blocks", edited("weight", lambda t: t[1:]), r"weight is \[223, 160\]; its config asks for \[224"),
    ("fp8-blocks", edited("weight", lambda t: t.float()), r"up_proj\.weight is float32 .* must be float8_e4m3fn"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "edit", "message"), BAD_TENSORS, ids=[each[2][:40] for each in BAD_TENSORS])
def test_a_tensor_that_cannot_be_is_named(
    name: str, edit: Callable[[dict[str, Tensor]], Any], message: str, tmp_path: Path
) -> None:
    model, _ = write_quantized(tmp_path / "model", SHAPES, FORMATS[name])
    change(model, edit)
    with pytest.raises(CorruptFile, match=message):
        convert(model, tmp_path / "converted")


BAD_CONFIGS: list[tuple[str, Any, str]] = [
    ("awq", {"quant_method": "hqq"}, "quant_method is 'hqq'; the known ones are awq, compressed-tensors, fp8"),
    ("awq", {"bits": 3}, "bits is 3; the known values are 4"),
    ("awq", {"version": "marlin"}, "version is 'marlin'; the known values are gemm, GEMM"),
    ("awq", {"surprise": 1}, r"AWQ does not know the option 'surprise' \(1\)"),
    ("gptq-4-sym", {"bits": 5}, "bits is 5; the known values are 2, 3, 4, 8"),
    ("gptq-4-sym", {"group_size": "x"}, "group_size is 'x'; it must be a whole number"),
    ("gptq-4-sym", {"checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'; the known values are gptq"),
    ("gptq-4-sym", {"dynamic": {"-:lm_head": {}, "+:.*up": {"bits": 8}}}, r"dynamic has '\+:\.\*up'; only line"),
    ("gptq-4-sym", {"dynamic": ["-:lm_head"]}, "dynamic is .* it must be an object"),
    ("fp8-blocks", {"weight_block_size": [128]}, r"weight_block_size is \[128\]; it must be two sizes"),
    ("fp8-blocks", {"fmt": "e5m2"}, "fmt is 'e5m2'; the known values are e4m3"),
    ("ct-pack-4", {"format": "mxfp4-pack-quantized"}, "format is 'mxfp4-pack-quantized'; the known values are p"),
    ("ct-pack-4", {"config_groups": {}}, "is quantized, but no config group has it among its targets"),
    ("ct-pack-4", {"sparsity_config": {"format": "dense"}}, "has a sparsity_config; only models without one"),
    ("modelopt-fp8-channel", {"quant_algo": "MXFP8"}, "quant_algo is 'MXFP8'; the known values are FP8"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "edit", "message"), BAD_CONFIGS, ids=[each[2][:40] for each in BAD_CONFIGS])
def test_a_config_that_is_not_known_is_refused(name: str, edit: dict[str, Any], message: str, tmp_path: Path) -> None:
    model, _ = write_quantized(tmp_path / "model", SHAPES, FORMATS[name])
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] |= edit
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=message):
        open_checkpoint(resolve(model))


@pytest.mark.parametrize("target", ["re:(a+)+b", "re:(.*)*", "re:.*.*.*.*.*.*.*x", "re:" + "a" * 1000, "re:["])
def test_an_expression_that_could_take_forever_is_not_searched(target: str) -> None:
    with pytest.raises(ModelError, match="The target "):
        matches_target("a" * 60, target)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda f: [], r"formats is '\[\]'"),
        (lambda f: {"norm.weight": next(iter(f.values()))}, "has a format for norm.weight, which is no matrix"),
        (lambda f: {name: each | {"kind": "w2a2"} for name, each in f.items()}, "is no weight format"),
        (lambda f: {name: each | {"group_size": True} for name, each in f.items()}, "is no weight format"),
        (lambda f: {name: each | {"group_size": 7} for name, each in f.items()}, r"lacks .*\.scale as float16"),
        (lambda f: dict(list(f.items())[1:]), "lacks the tensor for layers|holds the tensor"),
    ],
)
def test_formats_of_our_own_checkpoint_are_checked(edit: Any, message: str, tmp_path: Path) -> None:
    model, _ = write_quantized(tmp_path / "model", SHAPES, FORMATS["gptq-4-act-order"])
    convert(model, tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"formats": edit(values["formats"])}))
    with pytest.raises(CorruptFile, match=message):
        open_checkpoint(resolve(tmp_path / "out"))


@pytest.mark.parametrize("name", ["awq", "fp8-blocks"])
def test_experts_stay_packed_through_every_folder(name: str, tmp_path: Path) -> None:
    """The tool's folder, our checkpoint, and the Hugging Face folder made of it build the same engine."""
    model, _ = write_quantized(tmp_path / "model", mixtral.TINY | {"intermediate_size": 64}, FORMATS[name])
    convert(model, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "back", output_format="hf")
    engines = [build_engine(tmp_path / each, tmp_path / f"engine-{each}") for each in ("model", "ours", "back")]
    first, *others = [(engine / "rank0.engine").read_bytes() for engine in engines]
    assert others == [first, first]
    sizes = open_checkpoint(resolve(model)).num_bytes, open_checkpoint(resolve(tmp_path / "ours")).num_bytes
    assert sizes[0] == sizes[1]
