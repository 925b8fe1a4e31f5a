"""FP8 as DeepSeek and Hugging Face store it (quant_method "fp8"): E4M3 with one scale, or one a 128 × 128 block."""

from slipstream.checkpoint.packed import PackedLinear
from slipstream.checkpoint.quantized.linears import Parts, eight_bit_linear
from slipstream.errors import CorruptFile
from slipstream.schema.model import Options


def read(options: Options, parts: Parts) -> dict[str, PackedLinear]:
    is_static = options.choice("activation_scheme", ("dynamic", "static"), "dynamic") == "static"
    options.choice("fmt", ("e4m3",), "e4m3")
    options.choice("scale_fmt", ("float", "ue8m0"), "float")  # of the weights' scales, which are float32 all the same
    block = read_block(options, "weight_block_size")
    options.skip("dequantize", "ignored_layers", "modules_to_not_convert", "kv_cache_scheme", "quant_storage_dtype")
    options.finish("FP8")
    linears = {}
    for suffix in (".weight_scale_inv", ".weight_scale"):
        for owner in parts.owners(suffix):
            linears[f"{owner}.weight"] = eight_bit_linear(
                parts, owner, "fp8", owner + suffix, block=block, input_group_size=block[1] if block else 0,
                input_scale=parts.scalar(f"{owner}.input_scale") if is_static else 0.0,
            )  # fmt: skip
    return linears


def read_block(options: Options, name: str) -> tuple[int, int] | None:
    """[rows, columns] of a block that shares a scale."""
    value = options.value(name)
    if value is None:
        return None
    ok = isinstance(value, list) and len(value) == 2 and all(type(x) is int and 1 <= x <= 2**20 for x in value)
    if not ok:
        raise CorruptFile(f"{name} is {str(value)[:80]}; it must be two sizes, such as [128, 128].")
    return value[0], value[1]
