"""The tensors of all ranks as one model: what tensor parallelism has split is put together again.

Each rank has a share of the rows of the linears that begin a block (qkv, mlp.fc, mlp.gate) and of the head, a share of
the columns of those that end it (dense, mlp.proj), and a copy of everything else.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from slipstream.engine.tensor_file import TensorFile
from slipstream.errors import CorruptFile, ModelError

MAX_RANKS = 256
BY_ROWS = re.compile(r"(lm_head|transformer\.layers\.\d+\.mlp\.(fc|gate))\.(weight|bias)", re.ASCII)
BY_COLUMNS = re.compile(r"transformer\.layers\.\d+\.(attention\.dense|mlp\.proj)\.weight", re.ASCII)
QKV = re.compile(r"transformer\.layers\.\d+\.attention\.qkv\.(weight|bias)", re.ASCII)
EXPERTS_FC = re.compile(r"transformer\.layers\.\d+\.mlp\.fc\.weight", re.ASCII)
VOCABULARY = ("transformer.vocab_embedding.weight", "lm_head.weight")


@dataclass(frozen=True)
class Split:
    """How a folder's tensors are shared among its ranks."""

    tp_size: int
    qkv_rows: tuple[int, int, int]
    vocab_size: int  # the last rank's share of a vocabulary may be padded
    embedding_dim: int | None = None  # along which the embedding is split; None: each rank has all of it
    has_experts: bool = False  # mlp.fc and mlp.proj have a first dimension of experts; fc is two linears of equal size

    def of(self, name: str, num_dims: int) -> tuple[int | None, tuple[int, ...]]:
        """The dimension along which a tensor is split, if any, and what its parts have of it, relative to each other:
        a rank has its share of each part."""
        if QKV.fullmatch(name):
            return 0, self.qkv_rows
        if self.has_experts and num_dims == 3:
            return (1, (1, 1)) if EXPERTS_FC.fullmatch(name) else (2, (1,))
        if BY_ROWS.fullmatch(name):
            return 0, (1,)
        if BY_COLUMNS.fullmatch(name):
            return 1, (1,)
        return (self.embedding_dim if name == VOCABULARY[0] else None), (1,)


class RankTensors:
    def __init__(self, files: list[TensorFile], split: Split, adds_one_to_norms: bool) -> None:
        self._files, self._split, self._adds_one_to_norms = files, split, adds_one_to_norms
        first = files[0]
        for number, file in enumerate(files):
            if set(file.names()) != set(first.names()):
                raise CorruptFile(f"rank{number}.safetensors has not the same tensors as rank0.safetensors.")
            for name in first.names():
                if file.shape(name) != first.shape(name) or file.dtype(name) != first.dtype(name):
                    raise CorruptFile(
                        f"{name} has another shape in rank{number}.safetensors than in rank0.safetensors."
                    )

    @classmethod
    def open(cls, folder: Path, split: Split, *, adds_one_to_norms: bool) -> Self:
        files: list[TensorFile] = []
        try:
            for rank in range(split.tp_size):
                if not rank_file(folder, rank).is_file():
                    raise ModelError(f"{rank_file(folder, rank)} is missing; tp_size is {split.tp_size}.")
                files.append(TensorFile.open(rank_file(folder, rank)))
            return cls(files, split, adds_one_to_norms)
        except BaseException:
            for file in files:
                file.close()
            raise

    def names(self) -> list[str]:
        return self._files[0].names()

    def shape(self, name: str) -> tuple[int, ...]:
        shape = list(self._files[0].shape(name))
        dim, _ = self._split.of(name, len(shape))
        if dim is not None and dim < len(shape):
            shape[dim] *= len(self._files)
            if dim == 0 and self._is_padded(name, shape[0]):
                shape[0] = self._split.vocab_size
        return tuple(shape)

    def dtype(self, name: str) -> torch.dtype:
        return self._files[0].dtype(name)

    def read(self, name: str) -> Tensor:
        tensors = [file.read(name) for file in self._files]
        tensor = self._join(name, tensors) if len(tensors) > 1 else tensors[0]
        return tensor - 1 if self._adds_one_to_norms and name.endswith(("norm.weight", "ln_f.weight")) else tensor

    def close(self) -> None:
        for file in self._files:
            file.close()

    def _join(self, name: str, tensors: list[Tensor]) -> Tensor:
        dim, shares = self._split.of(name, tensors[0].dim())
        if dim is None or dim >= tensors[0].dim():
            if not all(torch.equal(_bytes(tensor), _bytes(tensors[0])) for tensor in tensors):
                raise CorruptFile(f"{name} is not the same in all ranks, and is none of the tensors that are split.")
            return tensors[0]
        size = tensors[0].shape[dim]
        if any(size * share % sum(shares) for share in shares):
            raise CorruptFile(f"{name} is {list(tensors[0].shape)} in each rank; by the config it is cut otherwise.")
        parts = [tensor.split([size * share // sum(shares) for share in shares], dim) for tensor in tensors]
        whole = torch.cat([part for of_all_ranks in zip(*parts, strict=True) for part in of_all_ranks], dim)
        is_padded = dim == 0 and self._is_padded(name, len(whole))
        return whole[: self._split.vocab_size] if is_padded else whole

    def _is_padded(self, name: str, num_rows: int) -> bool:
        return name in VOCABULARY and 0 < num_rows - self._split.vocab_size < len(self._files)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.flatten().view(torch.uint8)


def rank_file(folder: Path, rank: int) -> Path:
    return folder / f"rank{rank}.safetensors"
