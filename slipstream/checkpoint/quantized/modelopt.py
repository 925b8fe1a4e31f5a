"""NVIDIA ModelOpt's Hugging Face export: hf_quant_config.json, or the same below quantization_config."""

from slipstream.checkpoint.packed import PackedLinear
from slipstream.checkpoint.quantized.linears import Parts, eight_bit_linear
from slipstream.schema.model import Options

FP8, FP8_PER_CHANNEL, FP8_BLOCKS = "FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_BLOCK_SCALES"
ALGORITHMS = (FP8, FP8_PER_CHANNEL, FP8_BLOCKS)
BLOCK = (128, 128)


def read(options: Options, parts: Parts) -> dict[str, PackedLinear]:
    options.skip("producer", "quant_library", "quant_library_version")
    section = options.section("quantization") or options
    algorithm = section.choice("quant_algo", (*ALGORITHMS, None))
    section.skip("config_groups", "exclude_modules", "group_size", "ignore", "kv_cache_quant_algo", "kv_cache_scheme")
    for each in (section, options):
        each.finish("ModelOpt")
    linears = {}
    for owner in parts.owners(".weight_scale"):
        linears[f"{owner}.weight"] = eight_bit_linear(
            parts, owner, "fp8", f"{owner}.weight_scale", block=BLOCK if algorithm == FP8_BLOCKS else None,
            input_group_size=BLOCK[1] if algorithm == FP8_BLOCKS else 0,
            input_scale=parts.scalar(f"{owner}.input_scale") if algorithm == FP8 else 0.0,
        )  # fmt: skip
    return linears
