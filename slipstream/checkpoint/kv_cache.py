"""How a model was published to keep its KV cache: in 8 bits, with scales (kernels/attention/cache.py) where it was
calibrated.

k_scale and v_scale are ModelOpt's and compressed-tensors' names, kv_scale is AutoFP8's, kv_cache_scaling_factor
TensorRT-LLM's; the last two are for keys and values both. Each is one number, or one a KV head.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor

from slipstream.checkpoint.tensors import TensorSource
from slipstream.engine.tensor_file import TensorEntry
from slipstream.errors import CorruptFile, ModelError
from slipstream.schema.build import KV_DTYPES
from slipstream.schema.model import DecoderConfig, Options

_PLANES = {"k_scale": (0,), "v_scale": (1,), "kv_scale": (0, 1), "kv_cache_scaling_factor": (0, 1)}
_OF_OTHERS = ("q_scale", "prob_scale", "output_scale")  # for attention that computes in 8 bits, which ours does not


@dataclass(frozen=True)
class KVCache:
    """dtype: one narrower than the model's, or "" where nothing is said. scales: of 8 bits, float32 [planes, heads] by
    layer, or {}.

    skip_layers: those that keep the dtype of the engine all the same.
    """

    dtype: str = ""
    scales: Mapping[int, Tensor] = field(default_factory=dict)
    skip_layers: Sequence[int] = ()

    def layers(self, num_layers: int) -> list[int]:
        """Those in that dtype."""
        return [layer for layer in range(num_layers) if self.dtype and layer not in self.skip_layers]

    def chosen(self, asked: str, dtype: str, model: str, narrower: Iterable[str] = ()) -> Self:
        """As asked: auto, fp8, int8, the dtype of a model, which is "", or one of those narrower. Raises ModelError."""
        known = {"auto": self.dtype, **KV_DTYPES, dtype: "", **{name: name for name in narrower}}
        if asked not in known:
            raise ModelError(f"kv_cache_dtype is {asked!r}; for {model} in {dtype} it must be {', '.join(known)}.")
        found = self if known[asked] == self.dtype else type(self)(known[asked])
        if found.dtype == KV_DTYPES["int8"] and not found.scales:
            raise ModelError(
                f"A KV cache in int8 needs scales found by calibration, which {model} does not have; "
                "give --kv_cache_dtype fp8, which needs none."
            )
        return found

    def entries(self) -> list[TensorEntry]:
        """As our checkpoints store them: kv.3.k_scale [heads], kv.3.v_scale."""
        return [
            (f"kv.{layer}.{letter}_scale", tuple(scale_K.shape), torch.float32, partial(torch.clone, scale_K))
            for layer, scales_PK in self.scales.items()
            for letter, scale_K in zip("kv", scales_PK, strict=False)
        ]


@dataclass(frozen=True)
class PublishedCache:
    """The same before the model's shape is known. scales: by layer and plane."""

    dtype: str = ""
    scales: Mapping[tuple[int, int], Tensor] = field(default_factory=dict)
    skip_layers: Sequence[int] = ()

    def of_model(self, config: DecoderConfig, where: str) -> KVCache:
        """Raises CorruptFile unless there is a scale for each layer in 8 bits and plane, or none at all."""
        if not self.scales:
            return KVCache(self.dtype, {}, self.skip_layers)
        found = {}
        for layer in KVCache(self.dtype, {}, self.skip_layers).layers(config.num_layers):
            planes = []
            for plane in range(config.kv_planes):
                scale = self.scales.get((layer, plane))
                if scale is None or scale.numel() not in (1, config.num_kv_heads):
                    what = f"{'keys' if plane == 0 else 'values'} in layer {layer}"
                    raise CorruptFile(f"{where} lacks the scale of {what}, one number or one for each KV head.")
                planes.append(scale.flatten().float().expand(config.num_kv_heads))
            found[layer] = torch.stack(planes)
            if not ((found[layer] > 0) & (found[layer] < 1e30)).all():
                raise CorruptFile(f"{where} has a scale of keys or values in layer {layer} that is not above 0.")
        return KVCache(self.dtype, found, self.skip_layers)


def scale_names(names: Iterable[str]) -> set[str]:
    """Those of them that are scales of a quantized cache or of what reads it."""
    return {name for name in names if name.rpartition(".")[2] in (*_PLANES, *_OF_OTHERS)}


def read_scales(tensors: TensorSource, dtype: str, skip_layers: Sequence[int] = ()) -> PublishedCache:
    """dtype: what the config says. Scales that it says nothing of are E4M3's, as AutoFP8 leaves them."""
    scales: dict[tuple[int, int], Tensor] = {}
    for name in sorted(scale_names(tensors.names())):
        *owners, leaf = name.split(".")
        layer = next((int(part) for part in owners if part.isdecimal() and len(part) < 6), None)
        if layer is not None:
            scales |= {(layer, plane): tensors.read(name) for plane in _PLANES.get(leaf, ())}
    return PublishedCache(dtype or (KV_DTYPES["fp8"] if scales else ""), scales, skip_layers)


def announced_dtype(values: Mapping[str, Any], where: str) -> str:
    """What a quantization_config, or the section `quantization` in it, says of the cache; "" for nothing."""
    section = values.get("quantization")
    options = Options(dict(section if isinstance(section, dict) else values), where)
    if options.choice("kv_cache_quant_algo", ("FP8", None)) == "FP8":  # ModelOpt
        return KV_DTYPES["fp8"]
    if not isinstance(values.get("kv_cache_scheme"), dict):  # AutoFP8 has a word there
        return ""
    scheme = options.section("kv_cache_scheme")
    assert scheme is not None
    scheme.choice("num_bits", (8,), 8)
    scheme.choice("symmetric", (True,), True)
    scheme.choice("dynamic", (False,), False)
    scheme.choice("strategy", ("tensor", "attn_head"), "tensor")
    scheme.skip("actorder", "block_structure", "group_size", "observer", "observer_kwargs", "scale_dtype", "zp_dtype")
    kind = scheme.choice("type", ("float", "int"), "int")
    scheme.finish("the KV cache of compressed-tensors")
    return KV_DTYPES["fp8" if kind == "float" else "int8"]
