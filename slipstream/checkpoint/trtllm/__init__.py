"""TensorRT-LLM checkpoint folders (docs/source/architecture/checkpoint.md): config.json and a file for each rank.

architectures  its config as Hugging Face's options, its names as our weights
ranks          the files of all ranks as one, before tensor parallelism split them
heads          what they may hold beside the model, for who drafts

Float, or FP8 with weights_scaling_factor and activation_scaling_factor.
"""

import warnings
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slipstream.checkpoint.kv_cache import read_scales, scale_names
from slipstream.checkpoint.packed import PackedLinear, PackedTensors
from slipstream.checkpoint.quantized.linears import FP8, Parts
from slipstream.checkpoint.tensors import TensorSource
from slipstream.checkpoint.trtllm.architectures import HEADS, read_config
from slipstream.checkpoint.trtllm.ranks import RankTensors, rank_file
from slipstream.errors import UnsupportedModel
from slipstream.schema.format import WeightFormat
from slipstream.schema.model import Options
from slipstream.schema.weights import WeightTable


def is_tensorrt_llm(folder: Path, options: dict[str, Any]) -> bool:
    return "architecture" in options and "model_type" not in options and rank_file(folder, 0).is_file()


def open_tensorrt_llm(folder: Path, values: dict[str, Any]) -> tuple[dict[str, Any], TensorSource, WeightTable]:
    """The options of a Hugging Face config.json, the tensors, and how their names relate to our weights.

    Raises UnsupportedModel for what is not known, CorruptFile where the files do not fit together.
    """
    architecture, options, split, algorithm, kv_dtype = read_config(Options(values, f"{folder}/config.json"))
    tensors = RankTensors.open(folder, split, adds_one_to_norms=architecture.adds_one_to_norms)
    try:
        options["dtype"] = values.get("dtype")
        options["tie_word_embeddings"] = "lm_head.weight" not in tensors.names()
        linears: dict[str, PackedLinear] = {}
        parts = Parts(tensors)
        if algorithm == "FP8":
            linears = _fp8_linears(parts)
        elif algorithm is not None:
            _check_is_float(folder, tensors, algorithm)
        hidden = parts.used | scale_names(tensors.names()) | _of_head(tensors.names(), values["architecture"])
        return options, PackedTensors(tensors, linears, hidden, read_scales(tensors, kv_dtype)), architecture.weights
    except BaseException:
        tensors.close()
        raise


def _of_head(names: Iterable[str], architecture: str) -> set[str]:
    head = HEADS.get(architecture)
    return set() if head is None else {name for name in names if name.startswith(head.prefix)}


def _fp8_linears(parts: Parts) -> dict[str, PackedLinear]:
    linears = {}
    for owner in parts.owners(".weights_scaling_factor"):
        num_out, num_in = parts.shape(f"{owner}.weight", 2)
        weight = parts.use(f"{owner}.weight", (num_out, num_in), (FP8,))
        scale = parts.scalar(f"{owner}.weights_scaling_factor")
        format = WeightFormat(kind="fp8", input_scale=parts.scalar(f"{owner}.activation_scaling_factor"))
        reads: dict[str, Callable[[], Tensor]] = {
            "packed": weight,
            "scale": partial(torch.full, (num_out, 1), scale, dtype=torch.float32),
        }
        linears[f"{owner}.weight"] = PackedLinear(format, (num_out, num_in), reads)
    if not linears:
        raise UnsupportedModel("quant_algo is FP8, but no tensor is called weights_scaling_factor; export it again.")
    return linears


def _check_is_float(folder: Path, tensors: RankTensors, algorithm: str) -> None:
    """W8A16, W4A16: convert_checkpoint.py stores what its kernels read; quantize.py leaves it to trtllm-build."""
    if not all(tensors.dtype(name).is_floating_point for name in tensors.names()):
        raise UnsupportedModel(
            f"{folder}: its {algorithm} weights are shuffled for the kernels of one kind of GPU and cannot be read "
            "back; convert the model without --use_weight_only, or give the model it was made of."
        )
    warnings.warn(
        f"{folder} leaves {algorithm} to trtllm-build, its weights are floats; here they stay floats.", stacklevel=2
    )
