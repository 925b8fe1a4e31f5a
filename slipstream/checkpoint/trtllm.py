"""A TensorRT-LLM checkpoint folder (docs/source/architecture/checkpoint.md) seen as a Hugging Face model.

config.json names an architecture, rank0.safetensors has its weights: transformer.layers.N.attention.qkv, dense, mlp.fc
(Hugging Face's gate), mlp.gate (its up) and mlp.proj. Float, or FP8 with weights_scaling_factor and
activation_scaling_factor. Weights that its weight-only kernels have shuffled for one GPU cannot be read back.
"""

import re
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slipstream.checkpoint.packed import PackedLinear, PackedTensors
from slipstream.checkpoint.quantized.linears import FP8, Parts
from slipstream.checkpoint.tensors import TensorSource
from slipstream.engine.tensor_file import TensorFile
from slipstream.errors import CorruptFile, UnsupportedModel
from slipstream.schema.format import WeightFormat
from slipstream.schema.model import Options

WEIGHTS_FILE = "rank0.safetensors"
# Architecture → Hugging Face's model_type and, where there is one, its name for q, k and v in one.
ARCHITECTURES: dict[str, tuple[str, str | None]] = {
    "LlamaForCausalLM": ("llama", None),
    "MistralForCausalLM": ("mistral", None),
    "BaichuanForCausalLM": ("baichuan", "W_pack"),
    "BaiChuanForCausalLM": ("baichuan", "W_pack"),
}
_LAYER = re.compile(r"transformer\.layers\.(\d{1,5})\.(.+)", re.ASCII)
_NAMES = {
    "transformer.vocab_embedding.weight": "model.embed_tokens.weight",
    "transformer.ln_f.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
}
_NAMES_IN_LAYER = {
    "input_layernorm": "input_layernorm",
    "post_layernorm": "post_attention_layernorm",
    "attention.dense": "self_attn.o_proj",
    "mlp.fc": "mlp.gate_proj",
    "mlp.gate": "mlp.up_proj",
    "mlp.proj": "mlp.down_proj",
}
_QKV = "attention.qkv"
_KV_SCALE = "attention.kv_cache_scaling_factor"


def is_tensorrt_llm(folder: Path, options: dict[str, Any]) -> bool:
    return "architecture" in options and "model_type" not in options and (folder / WEIGHTS_FILE).is_file()


def open_tensorrt_llm(folder: Path, values: dict[str, Any]) -> tuple[dict[str, Any], TensorSource]:
    """The options of a Hugging Face config.json, and tensors under Hugging Face's names."""
    options, fused, has_fp8 = _read_config(Options(values, f"{folder}/config.json"))
    options["dtype"] = values.get("dtype")
    file = TensorFile.open(folder / WEIGHTS_FILE)
    try:
        head_dim = options["head_dim"]
        sizes = [options[f"num_{kind}_heads"] * head_dim for kind in ("attention", "key_value", "key_value")]
        tensors = _Renamed(file, sizes, fused)
        if tensors.num_cache_scales:
            warnings.warn(
                f"{folder} has {tensors.num_cache_scales} scales of a quantized KV cache, which are not used: the "
                "cache keeps the engine's dtype.",
                stacklevel=2,
            )
        return options, _packed(tensors) if has_fp8 else tensors
    except BaseException:
        file.close()
        raise


def _read_config(options: Options) -> tuple[dict[str, Any], str | None, bool]:
    """Hugging Face's options, its name for q, k and v in one, and whether the linears are FP8."""
    model_type, fused = ARCHITECTURES[options.choice("architecture", tuple(ARCHITECTURES))]
    mapping = options.section("mapping") or Options({}, "mapping")
    for name in ("world_size", "tp_size", "pp_size", "cp_size"):
        mapping.choice(name, (1,), 1)
    quantization = options.section("quantization") or Options({}, "quantization")
    algorithm = quantization.choice("quant_algo", ("FP8", None))
    quantization.choice("kv_cache_quant_algo", ("FP8", "INT8", None))
    hidden_size, num_heads = options.integer("hidden_size"), options.integer("num_attention_heads")
    found = {
        "model_type": model_type,
        "hidden_size": hidden_size,
        "num_attention_heads": num_heads,
        "num_key_value_heads": options.integer("num_key_value_heads", num_heads),
        "head_dim": options.integer("head_size", hidden_size // num_heads),
        "num_hidden_layers": options.integer("num_hidden_layers"),
        "intermediate_size": options.integer("intermediate_size"),
        "vocab_size": options.integer("vocab_size"),
        "max_position_embeddings": options.integer("max_position_embeddings", 2048),
        "rms_norm_eps": options.real("norm_epsilon", 1e-5),
        "hidden_act": options.choice("hidden_act", ("silu",)),
        "tie_word_embeddings": options.boolean("tie_word_embeddings") | options.boolean("share_embedding_table"),
        "rope_theta": options.real("rotary_base", 10000.0),
        "rope_scaling": options.value("rotary_scaling"),
        "attention_bias": options.boolean("attn_bias"),
        "mlp_bias": options.boolean("mlp_bias"),
    }
    options.choice("position_embedding_type", ("rope_gpt_neox",))
    # What changes the numbers, and is not known: only its neutral value.
    for name in ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "output_multiplier_scale"):
        options.choice(name, (1, 1.0), 1)
    experts = options.section("moe")
    if experts is not None:
        experts.choice("num_experts", (0,), 0)
    # What says how its own engine is built, and nothing of the numbers.
    options.skip(
        "disable_weight_only_quant_plugin", "embedding_sharding_dim", "gpu_weights_percent", "layer_idx_offset",
        "logits_dtype", "producer", "qk_layernorm_type", "remove_duplicated_kv_heads", "runtime_defaults",
        "use_input_layernorm_in_first_layer", "use_last_layernorm", "use_parallel_embedding", "use_prompt_tuning",
    )  # fmt: skip
    options.finish("the reader of TensorRT-LLM checkpoints")
    given = {name: value for name, value in found.items() if value not in (None, False)}
    return given, fused, algorithm == "FP8"


class _Renamed:
    """The file's tensors under Hugging Face's names; q, k and v are rows of one tensor."""

    def __init__(self, file: TensorFile, sizes: list[int], fused: str | None) -> None:
        self._file, self._sizes, self._fused = file, sizes, fused
        self.num_cache_scales = 0
        self._places: dict[str, tuple[str, slice | None]] = {}
        for name in file.names():
            self._place(name)

    def _place(self, name: str) -> None:
        match = _LAYER.fullmatch(name)
        if match is None:
            self._places[_NAMES.get(name, name)] = (name, None)
            return
        layer, rest = match.groups()
        owner, _, leaf = rest.rpartition(".")
        if rest == _KV_SCALE:
            self.num_cache_scales += 1
        elif owner == _QKV and self._fused is None:
            start = 0
            for part, size in zip("qkv", self._sizes, strict=True):
                rows = slice(start, start + size) if leaf in ("weight", "bias") else None
                self._places[f"model.layers.{layer}.self_attn.{part}_proj.{leaf}"] = (name, rows)
                start += size
        else:
            theirs = f"self_attn.{self._fused}" if owner == _QKV else _NAMES_IN_LAYER.get(owner, owner)
            self._places[f"model.layers.{layer}.{theirs}.{leaf}"] = (name, None)

    def names(self) -> list[str]:
        return list(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        source, rows = self._places[name]
        shape = self._file.shape(source)
        if rows is None:
            return shape
        if not shape or shape[0] != sum(self._sizes):
            raise CorruptFile(f"{source} is {list(shape)}; by the config it has {sum(self._sizes)} rows.")
        return (rows.stop - rows.start, *shape[1:])

    def dtype(self, name: str) -> torch.dtype:
        return self._file.dtype(self._places[name][0])

    def read(self, name: str) -> Tensor:
        source, rows = self._places[name]
        tensor = self._file.read(source)
        return tensor if rows is None else tensor[rows]

    def close(self) -> None:
        self._file.close()


def _packed(tensors: _Renamed) -> PackedTensors:
    parts = Parts(tensors)
    linears = {}
    for owner in parts.owners(".weights_scaling_factor"):
        shape = parts.shape(f"{owner}.weight", 2)
        weight = parts.use(f"{owner}.weight", shape, (FP8,))
        scale = parts.scalar(f"{owner}.weights_scaling_factor")
        format = WeightFormat(kind="fp8", input_scale=parts.scalar(f"{owner}.activation_scaling_factor"))
        reads: dict[str, Callable[[], Tensor]] = {
            "packed": weight,
            "scale": partial(torch.full, (shape[0], 1), scale, dtype=torch.float32),
        }
        linears[f"{owner}.weight"] = PackedLinear(format, (shape[0], shape[1]), reads)
    if not linears:
        raise UnsupportedModel("quant_algo is FP8, but no tensor is called weights_scaling_factor; export it again.")
    return PackedTensors(tensors, linears, parts.used)
