"""MXFP4 experts as gpt-oss stores them (OCP Microscaling Formats 1.0): blocks of 32 FP4 numbers with one power of two.

They are dequantized when read, an expert at a time, into bfloat16, which holds every such number exactly.
"""

import torch
from torch import Tensor

from slipstream.checkpoint.quantized.linears import Parts
from slipstream.checkpoint.tensors import TensorSource
from slipstream.errors import CorruptFile
from slipstream.schema.model import Options

BLOCK_SIZE = 32
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


class MXFP4Experts:
    """Another source, in which X stands for X_blocks uint8 [E, N, K / 32, 16] and X_scales uint8 [E, N, K / 32].

    X is [E, K, N]: gpt-oss stores the experts it does not quantize transposed.
    """

    def __init__(self, tensors: TensorSource, options: Options) -> None:
        options.skip("modules_to_not_convert", "dequantize")
        options.finish("MXFP4")
        self._tensors = tensors
        parts = Parts(tensors)
        self._experts: dict[str, tuple[int, int, int]] = {}
        for name in parts.owners("_blocks"):
            num_experts, num_out, num_blocks, _ = parts.shape(f"{name}_blocks", 4)
            parts.use(f"{name}_blocks", (num_experts, num_out, num_blocks, BLOCK_SIZE // 2), (torch.uint8,))
            parts.use(f"{name}_scales", (num_experts, num_out, num_blocks), (torch.uint8,))
            self._experts[name] = (num_experts, num_blocks * BLOCK_SIZE, num_out)
        self._plain = [name for name in parts.names if name not in parts.used]
        for name in self._plain:
            if name in self._experts:
                raise CorruptFile(f"The model holds both {name} and {name}_blocks, which are the same weight.")

    def names(self) -> list[str]:
        return [*self._plain, *self._experts]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._experts[name] if name in self._experts else self._tensors.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return torch.bfloat16 if name in self._experts else self._tensors.dtype(name)

    def read(self, name: str) -> Tensor:
        if name not in self._experts:
            return self._tensors.read(name)
        out_EKN = torch.empty(self._experts[name], dtype=torch.bfloat16)
        blocks_ENGB, scales_ENG = self._tensors.read(f"{name}_blocks"), self._tensors.read(f"{name}_scales")
        for out_KN, blocks_NGB, scales_NG in zip(out_EKN, blocks_ENGB, scales_ENG, strict=True):
            out_KN.copy_(dequantize(blocks_NGB, scales_NG).t())
        return out_EKN

    def close(self) -> None:
        self._tensors.close()


def dequantize(blocks_NGB: Tensor, scales_NG: Tensor) -> Tensor:
    """bfloat16 [N, K]: in each byte the number of the lower four bits is first; a scale s is the factor 2^(s - 127)."""
    pairs_NGB2 = torch.stack([blocks_NGB & 15, blocks_NGB >> 4], 3)
    values_NGK = torch.tensor(E2M1)[pairs_NGB2.flatten(2).int()]
    return torch.ldexp(values_NGK, scales_NG[:, :, None].int() - 127).flatten(1).bfloat16()
