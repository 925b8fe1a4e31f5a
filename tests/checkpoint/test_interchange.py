"""Packed weights in the layouts of other tools: golden words of their own packers, and their loaders beside ours.

test_formats.py reads what they write; this is the way back.
"""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from slipstream.checkpoint import convert, open_checkpoint, resolve
from slipstream.checkpoint.export import check_hugging_face, save_hugging_face
from slipstream.checkpoint.kv_cache import KVCache
from slipstream.checkpoint.packed import PackedLinear
from slipstream.checkpoint.quantized import LAYOUTS, METHODS
from slipstream.checkpoint.quantized.linears import Parts, nvfp4_linear, words_of_values
from slipstream.checkpoint.quantized.outgoing import QuantizedLinear, QuantizedModel
from slipstream.checkpoint.random import write_random_model
from slipstream.errors import UnsupportedModel
from slipstream.kernels.linear import nvfp4, w4a16
from slipstream.kernels.linear.parts import dense_weight
from slipstream.models import gpt2, llama, phi3
from slipstream.schema.format import NVFP4, WeightFormat
from slipstream.schema.model import Options
from tests.checkpoint.naive_formats import FORMATS
from tests.checkpoint.test_formats import (
    bytes_in,
    write_quantized,
)

# Widths that all layouts can hold; k and v are half a block of rows.
SHAPES = llama.TINY | {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "num_hidden_layers": 2}
SHAPES |= {"num_attention_heads": 4, "num_key_value_heads": 2}

# ----- golden words of numbers(), by AutoAWQ 0.2.9 (WQLinear_GEMM.from_linear) and AutoGPTQ 0.7.1 (QuantLinear.pack)

NUM_ROWS = 32


def numbers(num_columns: int, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Values [N, K], zero points [N, 2], scales [N, 2], as both tools were given them."""
    n, k, g = torch.arange(NUM_ROWS)[:, None], torch.arange(num_columns)[None], torch.arange(2)[None]
    zeros = 1 + (5 * n + 3 * g) % (2**bits - 1)
    scales = 2.0 ** -((n + g) % 4).half()
    return ((7 * n + 3 * k + n * k) % 2**bits).byte(), zeros.byte(), scales


def words(rows: list[str]) -> Tensor:
    unsigned = torch.tensor([[int(word, 16) for word in row.split()] for row in rows])
    return torch.where(unsigned < 2**31, unsigned, unsigned - 2**32).int()


AWQ_QWEIGHT = words(
    ["1357ace0 9bdf2468 1357ace0 9bdf2468", "bbbb3333 bbbb3333 bbbb3333 bbbb3333",
     "531fca86 db97420e 531fca86 db97420e", "fb7351d9 fb7351d9 fb7351d9 fb7351d9"]
)  # fmt: skip
AWQ_QZEROS = words(["6b1616b1 16b1b16b b16b6b16 6b1616b1", "9e4949e4 49e4e49e e49e9e49 9e4949e4"])
# The first four columns of qweight, and qzeros. Packed column j is column 5 j mod 32.
GPTQ = {
    4: (
        words(["52fc9630 3fb73fb7 1c72d83e f93d71b5", "da741eb8 3fb73fb7 94fa50b6 f93d71b5"] * 2),
        words(["50a50a50 0a50a50a a50a50a5 50a50a50", "83d83d83 3d83d83d d83d83d8 83d83d83"]),
    ),
    8: (
        words(
            ["09060300 130f0b07 1d18130e 27211b15", "15120f0c 231f1b17 312c2722 3f39332d",
             "211e1b18 332f2b27 45403b36 57514b45", "2d2a2724 433f3b37 59544f4a 6f69635d",
             "39363330 534f4b47 6d68635e 87817b75", "45423f3c 635f5b57 817c7772 9f99938d",
             "514e4b48 736f6b67 95908b86 b7b1aba5", "5d5a5754 837f7b77 a9a49f9a cfc9c3bd"]
        ),
        words(
            ["0f0a0500 231e1914 37322d28 4b46413c 5f5a5550 736e6964 87827d78 9b96918c",
             "120d0803 26211c17 3a35302b 4e49443f 625d5853 76716c67 8a85807b 9e99948f"]
        ),
    ),
}  # fmt: skip
ORDER = torch.arange(32) * 5 % 32
G_IDX = [0, 0, 1, 0, 1, 0, 0, 1, 0, 1, 0, 0, 1, 0, 1, 0, 1, 1, 0, 1, 0, 1, 1, 0, 1, 0, 1, 1, 0, 1, 0, 1]


def linear_of(bits: int, values_NK: Tensor, zeros_NG: Tensor, scales_NG: Tensor, order_K: Tensor | None) -> Any:
    """As our checkpoints hold it."""
    format = WeightFormat(
        kind=f"w{bits}a16", group_size=values_NK.shape[1] // 2, scale_dtype="float16", has_zeros=True,
        order="" if order_K is None else "any",
    )  # fmt: skip
    packed = values_NK if order_K is None else values_NK[:, order_K]
    parts = {
        "packed": w4a16.pack(packed) if bits == 4 else (packed ^ 0x80).view(torch.int8),
        "zero": zeros_NG if bits == 4 else (zeros_NG ^ 0x80).view(torch.int8),
        "scale": scales_NG,
        "order": order_K,
    }
    return QuantizedLinear("up", format, *values_NK.shape, parts.__getitem__)


class Given:
    """A TensorSource"""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.read = tensors.__getitem__
        self.names = tensors.keys
        self.shape = lambda name: tuple(tensors[name].shape)
        self.dtype = lambda name: tensors[name].dtype


def read_back(method: str, options: dict[str, Any], tensors: dict[str, Tensor]) -> PackedLinear:
    return METHODS[method](Options(options, "test"), Parts(Given(tensors)))["up.weight"]  # type: ignore[arg-type]


def written(method: str, linear: QuantizedLinear) -> dict[str, Tensor]:
    found = {}
    for name, shape, dtype, make in LAYOUTS[method].tensors(linear):
        found[name.removeprefix("up.")] = make()
        assert (tuple(found[name.removeprefix("up.")].shape), make().dtype) == (tuple(shape), dtype)
    return found


def check_parts(found: PackedLinear, linear: QuantizedLinear) -> None:
    for part in found.parts:
        assert torch.equal(bytes_in(found.read(part)), bytes_in(linear.read(part))), part


def test_the_words_of_awq() -> None:
    values, zeros, scales = numbers(4, 4)
    linear = linear_of(4, values, zeros, scales, None)
    found = written("awq", linear)
    assert torch.equal(found["qweight"], AWQ_QWEIGHT)
    assert torch.equal(found["qzeros"], AWQ_QZEROS)
    assert torch.equal(found["scales"], scales.t())
    theirs = {"up.qweight": AWQ_QWEIGHT, "up.qzeros": AWQ_QZEROS, "up.scales": scales.t().contiguous()}
    check_parts(read_back("awq", {"bits": 4, "group_size": 2}, theirs), linear)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_words_of_gptq(bits: int) -> None:
    values, zeros, scales = numbers(32, bits)
    linear = linear_of(bits, values, zeros, scales, ORDER.int())
    found = written("gptq", linear)
    qweight, qzeros = GPTQ[bits]
    assert torch.equal(found["qweight"][:, :4], qweight)
    assert torch.equal(found["qzeros"], qzeros)
    assert torch.equal(found["scales"], scales.t())
    assert found["g_idx"].tolist() == G_IDX
    theirs = {"up.qweight": qweight, "up.g_idx": torch.tensor(G_IDX, dtype=torch.int32)}
    theirs |= {"up.qzeros": qzeros[:, : bits // 4 * 4 // 8 or 1], "up.scales": scales[:4].t().contiguous()}
    back = read_back("gptq", {"bits": bits, "group_size": 16, "sym": False}, theirs)
    # Within a group a column may lie anywhere: the reader sorts them.
    dense = (values.int() - zeros.int()[:, G_IDX]) * scales.float()[:, G_IDX]
    found_dense = QuantizedLinear("up", back.format, *back.shape, back.read)
    groups = found_dense.group_of_column().long()
    back_values = found_dense.values().int() - found_dense.zeros().int()[:, groups]
    assert torch.equal(back_values * back.read("scale").float()[:, groups], dense[:4])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("num_columns", [32, 37])
def test_the_words_of_compressed_tensors(bits: int, num_columns: int) -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

    values = torch.randint(0, 2**bits, (5, num_columns), generator=torch.Generator().manual_seed(3))
    theirs = (values - 2 ** (bits - 1)).to(torch.int8)
    found = words_of_values(values.byte(), bits)
    assert torch.equal(found, pack_to_int32(theirs, bits))
    assert torch.equal(unpack_from_int32(found, bits, theirs.shape), theirs)
    by_rows = words_of_values(values.byte().t(), bits).t()
    assert torch.equal(by_rows, pack_to_int32(theirs, bits, packed_dim=0))


def test_the_words_of_nvfp4() -> None:
    """Numbers that lie between two of E2M1's, too."""
    from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8, unpack_fp4_from_uint8
    from compressed_tensors.quantization.utils.fp4_utils import cast_to_fp4

    numbers = torch.cat([torch.arange(-7, 7, 0.125), torch.tensor([0.0, -0.0])]).view(-1, 2).float()
    theirs = cast_to_fp4(numbers.clone())
    found = w4a16.pack(nvfp4.nearest(theirs))  # of -0.0 it makes 0.0
    assert torch.equal(nvfp4.numbers_of(nvfp4.nearest(numbers)), theirs)
    assert torch.equal(found, pack_fp4_to_uint8(theirs))
    assert torch.equal(unpack_fp4_from_uint8(found, *numbers.shape, dtype=torch.float32), theirs)


def test_nvfp4_says_what_compressed_tensors_says_of_it() -> None:
    """The scheme as its preset has it; and a packed weight that its compressor reads as we do."""
    from compressed_tensors.compressors.nvfp4 import NVFP4PackedCompressor
    from compressed_tensors.quantization import QuantizationScheme, preset_name_to_scheme

    generator = torch.Generator().manual_seed(3)
    packed = torch.randint(256, (32, 32), generator=generator).to(torch.uint8)
    scale = (torch.rand(32, 4, generator=generator) * 448).to(torch.float8_e4m3fn)
    parts = {"packed": packed, "scale": scale, "row_scale": torch.full((32, 1), 1 / 81.3)}
    linear = QuantizedLinear("up", NVFP4, 32, 64, parts.__getitem__)
    found = written("compressed-tensors", linear)
    check_parts(_back(found), linear)
    model = QuantizedModel([linear], [], "lm_head", {}, KVCache())
    (group,) = LAYOUTS["compressed-tensors"].config(model)["config_groups"].values()
    preset = preset_name_to_scheme("NVFP4A16", ["Linear"])
    assert group["format"] == "nvfp4-pack-quantized"
    scheme = QuantizationScheme(**group)
    for name in ("num_bits", "type", "strategy", "group_size", "symmetric", "dynamic", "scale_dtype"):
        assert getattr(scheme.weights, name) == getattr(preset.weights, name), name
    theirs = NVFP4PackedCompressor.decompress(found, scheme)["weight"]  # in bfloat16
    torch.testing.assert_close(theirs.float(), dense_weight(NVFP4, parts, 64), atol=0, rtol=2**-7)


def _back(tensors: dict[str, Tensor]) -> PackedLinear:
    given = {f"up.{name}": tensor for name, tensor in tensors.items()}
    return nvfp4_linear(Parts(Given(given)), "up", "weight_packed", "weight_global_scale", is_inverse=True)  # type: ignore[arg-type]


def test_modelopt_has_a_file_of_its_own(tmp_path: Path) -> None:
    model, _ = write_quantized(tmp_path / "model", SHAPES, FORMATS["modelopt-nvfp4"])
    convert(model, tmp_path / "hf", output_format="modelopt")
    said = json.loads((tmp_path / "hf" / "hf_quant_config.json").read_text())["quantization"]
    assert (said["quant_algo"], said["group_size"]) == ("W4A16_NVFP4", 16)
    assert "lm_head" in said["exclude_modules"]
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    del config["quantization_config"]  # as older versions leave it out
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    formats = open_checkpoint(resolve(tmp_path / "hf")).formats
    assert set(formats.values()) == {NVFP4} and len(formats) == 7 * 2


# ----- every packed weight, in every layout that can hold it

ACCEPTED = {
    "awq": ("awq", "gptq-4-asym", "gptq-v2"),
    "gptq": ("gptq-4-sym", "gptq-4-act-order", "gptq-4-one-group", "gptq-8-act-order", "gptq-8-asym", "gptq-3-sym"),
    "fp8": ("fp8-blocks", "ct-float-block"),
    "modelopt": ("modelopt-nvfp4", "modelopt-fp8-channel", "ct-nvfp4", "ct-float-dynamic"),
}
PAIRS = [(name, layout) for layout, names in ACCEPTED.items() for name in names]


@pytest.mark.parametrize(("name", "layout"), PAIRS)
def test_a_layout_gives_back_what_it_was_given(name: str, layout: str, tmp_path: Path) -> None:
    model, _ = write_quantized(tmp_path / "model", SHAPES, FORMATS[name])
    convert(model, tmp_path / "hf", output_format=layout)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == layout
    before, after = open_checkpoint(resolve(model)), open_checkpoint(resolve(tmp_path / "hf"))
    assert after.formats == before.formats
    for stored in before.stored_names():
        assert torch.equal(bytes_in(before.read(stored)), bytes_in(after.read(stored))), stored
    if name == layout:  # and the file is the tool's own
        theirs, ours = (load_file(folder / "model.safetensors") for folder in (model, tmp_path / "hf"))
        assert theirs.keys() == ours.keys()
        assert all(torch.equal(bytes_in(theirs[each]), bytes_in(ours[each])) for each in theirs)


def test_awq_holds_what_is_symmetric(tmp_path: Path) -> None:
    """Its zero points are all 8 then."""
    model, _ = write_quantized(tmp_path / "model", SHAPES, FORMATS["gptq-4-sym"])
    convert(model, tmp_path / "hf", output_format="awq")
    before, after = open_checkpoint(resolve(model)), open_checkpoint(resolve(tmp_path / "hf"))
    assert all(format.has_zeros for format in after.formats.values())
    assert all(torch.equal(before.read(each), after.read(each)) for each in before.formats)


CHOSEN = {
    "awq": "awq",
    "gptq-4-asym": "awq",
    "gptq-4-sym": "compressed-tensors",
    "gptq-4-act-order": "gptq",
    "ct-pack-4-asym": "compressed-tensors",  # its scales are in bfloat16
    "ct-pack-4-act-order": "compressed-tensors",
    "ct-int-w8a8": "compressed-tensors",
    "ct-float-static": "compressed-tensors",
    "ct-float-block": "fp8",
}


@pytest.mark.parametrize("name", CHOSEN)
def test_a_folder_is_stored_as_its_numbers_mostly_are(name: str, tmp_path: Path) -> None:
    model, _ = write_quantized(tmp_path / "model", SHAPES, FORMATS[name])
    convert(model, tmp_path / "hf", output_format="hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == CHOSEN[name]


@pytest.mark.parametrize(
    ("name", "expected", "method"),
    [
        ("gptq-4-sym", "gptq", "gptq"),  # of numbers that say nothing of their method
        ("ct-pack-4", "gptq", "compressed-tensors"),  # scales in bfloat16
        ("ct-int-w8a8", "gptq", "compressed-tensors"),
    ],
)
def test_an_expected_layout_gives_way_where_it_has_no_place(
    name: str, expected: str, method: str, tmp_path: Path
) -> None:
    model, _ = write_quantized(tmp_path / "model", SHAPES, FORMATS[name])
    save_hugging_face(open_checkpoint(resolve(model)), tmp_path / "hf", expected=expected)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == method


# ----- what has no place


@pytest.mark.parametrize("width", [256, 320])
@pytest.mark.parametrize("has_zeros", [False, True])
def test_it_is_known_before_anything_is_quantized(width: int, has_zeros: bool, tmp_path: Path) -> None:
    model = write_random_model(tmp_path / "model", SHAPES | {"intermediate_size": width})
    checkpoint = open_checkpoint(resolve(model))
    format = WeightFormat(kind="w4a16", group_size=128, scale_dtype="float16", has_zeros=has_zeros)
    formats = {name: format for name in checkpoint.recipes if name.endswith("_proj.weight")}
    if width % 128 == 0:
        check_hugging_face(checkpoint, formats, "gptq")
    else:
        with pytest.raises(UnsupportedModel, match=r"down_proj has 320 columns, which groups of 128 .* groups of 64\."):
            check_hugging_face(checkpoint, formats, "gptq")


NARROW = SHAPES | {"hidden_size": 160}
REFUSALS: list[tuple[str, str, dict[str, Any], str]] = [
    ("ct-int-w8a8", "awq", {}, r"_proj is not of 4 bits with .*, as AWQ's are; give compressed-tensors"),
    ("gptq-4-act-order", "awq", {}, r"_proj has its columns in act-order, which AWQ does not know; give gptq"),
    ("ct-pack-4-asym", "awq", {}, r"_proj has scales in bfloat16, and AWQ's are in float16; give compressed-tensors"),
    ("gptq-4-sym", "gptq", {"intermediate_size": 240}, r"has 128 rows and 240 columns, and GPTQ's are multiples of 32"),
    ("ct-float-dynamic", "gptq", {}, r"_proj has quantized activations or floats, and GPTQ has integer weights alone"),
    ("ct-pack-4-asym", "gptq", {}, r"_proj has scales in bfloat16, and GPTQ's are in float16; give compressed"),
    ("gptq-4-sym", "fp8", {}, r"_proj is not FP8 in blocks of 128 by 128, as FP8's are; give compressed-tensors"),
    ("fp8-blocks", "fp8", NARROW, r"_proj has 160 columns, which groups of 128 do not divide; .* in groups of 32"),
    ("awq", "awq", SHAPES | {"intermediate_size": 240}, r"down_proj has 240 columns, .* 32 .* in groups of 16"),
    ("awq", "compressed-tensors", {"intermediate_size": 240}, r"down_proj has 240 columns, which groups of 32 do not"),
    (
        "ct-float-static",
        "modelopt",
        {},
        r"_proj is neither NVFP4 nor FP8 by row and token, .*; give compressed",
    ),
    ("ct-nvfp4", "gptq", {}, r"_proj has quantized activations or floats, and GPTQ has integer weights alone"),
    ("ct-pack-w4afp8", "awq", {}, r"_proj is not of 4 bits with .*; give compressed-tensors"),
]


@pytest.mark.parametrize(("name", "layout", "shapes", "message"), REFUSALS)
def test_what_a_layout_cannot_say_is_refused(
    name: str, layout: str, shapes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model, _ = write_quantized(tmp_path / "model", SHAPES | shapes, FORMATS[name])
    with pytest.raises(UnsupportedModel, match=f"^model cannot be stored as {layout}: .*{message}"):
        convert(model, tmp_path / "hf", output_format=layout)
    assert not (tmp_path / "hf").exists()


def given_linear(name: str, num_out: int = 32, group_size: int = 32, bits: int = 4, smallest: int = 1) -> Any:
    """Asymmetric, in float16; smallest: of its zero points."""
    format = WeightFormat(kind=f"w{bits}a16", group_size=group_size, scale_dtype="float16", has_zeros=True)
    zero = torch.full((num_out, 64 // group_size), smallest, dtype=torch.uint8)
    zero[0] = 9
    return QuantizedLinear(name, format, num_out, 64, {"zero": zero if bits == 4 else (zero ^ 0x80).char()}.__getitem__)


UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj"
MODELS: list[tuple[str, list[Any], dict[str, Any], str]] = [
    ("awq", [given_linear(UP, num_out=12)], {}, f"{UP} has 12 rows, and AWQ packs eight in a word; give compressed"),
    ("awq", [given_linear(UP), given_linear(DOWN, group_size=64)], {}, "AWQ has one group size for all linears, and"),
    ("gptq", [given_linear(UP), given_linear(DOWN, group_size=16)], {}, "GPTQ has one group size for all linears, and"),
    ("gptq", [given_linear(UP), given_linear(DOWN, bits=8)], {}, f"{DOWN} is of 8 bits and others of 4, and GPTQ"),
    ("gptq", [given_linear(UP, smallest=0)], {}, f"{UP} has zero points of 0, and GPTQ stores one less; give awq"),
    ("gptq", [given_linear(UP, bits=8, smallest=0)], {}, f"{UP} has zero points of 0"),
    ("gptq", [given_linear(UP)], {"dense": [UP.replace("0", "1")]}, "mlp.up_proj is packed in some layers, and GPTQ"),
    ("awq", [given_linear("lm_head")], {}, "lm_head is packed, and AWQ leaves it as it is; give compressed-tensors"),
    *((name, [given_linear(UP)], {"kv_cache": KVCache("int8")}, f"{name.upper()} has no place for a KV cache in 8 bits")
      for name in ("awq", "gptq", "fp8")),
    ("awq", [given_linear(UP), given_linear(DOWN)], {"dense": ["lm_head", UP.replace("0", "1")]}, ""),
    ("gptq", [given_linear(UP), given_linear("lm_head")], {"dense": [UP.replace("up", "gate")]}, ""),
    ("gptq", [given_linear(UP), given_linear(DOWN)], {"dense": ["model.embed_tokens"]}, ""),
]  # fmt: skip


@pytest.mark.parametrize(("layout", "linears", "more", "message"), MODELS)
def test_a_layout_says_what_it_has_no_place_for(
    layout: str, linears: list[Any], more: dict[str, Any], message: str
) -> None:
    model = QuantizedModel(linears, **{"dense": [], "head": "lm_head", "attentions": {}, "kv_cache": KVCache()} | more)
    found = LAYOUTS[layout].refusal(model)
    assert found.startswith(message) if message else not found
    if found:
        assert "; give " in found


def test_what_is_not_packed_has_no_layout(tmp_path: Path) -> None:
    model = write_random_model(tmp_path / "model", SHAPES)
    with pytest.raises(UnsupportedModel, match="model has no packed weights to store as gptq; give --output_format hf"):
        convert(model, tmp_path / "hf", output_format="gptq")


@pytest.mark.parametrize(("shapes", "name"), [(gpt2.TINY, "h.0.attn.c_attn.weight"), (phi3.TINY, "self_attn.qkv_proj")])
def test_what_would_be_dequantized_is_refused(shapes: dict[str, Any], name: str, tmp_path: Path) -> None:
    """GPT-2 stores its products transposed; Phi-3 joins q, k and v, of which one is not packed here."""
    checkpoint = open_checkpoint(resolve(write_random_model(tmp_path / "model", shapes)))
    format = WeightFormat(kind="w8a16")
    formats = {each: format for each in checkpoint.recipes if each.endswith(("q_proj.weight", "k_proj.weight"))}
    with pytest.raises(
        UnsupportedModel, match=f"model cannot be stored packed: .*{re.escape(name)}.* would join parts"
    ):
        save_hugging_face(replace(checkpoint, formats=formats), tmp_path / "hf")
