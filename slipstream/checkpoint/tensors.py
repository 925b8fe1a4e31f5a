"""The weights of a Hugging Face folder: one safetensors file, or many with an index, behind one interface."""

from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import torch

from slipstream.engine.bounded_json import read_json
from slipstream.engine.tensor_file import TensorFile
from slipstream.errors import CorruptFile, ModelError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
INDEX_LIMIT = 100 << 20  # bytes; the index of a 1T-parameter mixture of experts has about 10 MB
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")


class TensorSource(Protocol):
    """Named tensors to be read one at a time: a TensorFile, a ShardedTensors or a GGUFModel."""

    def names(self) -> list[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> torch.dtype: ...

    def read(self, name: str) -> torch.Tensor: ...

    def close(self) -> None: ...


class ShardedTensors:
    """All tensors of a folder: of model.safetensors, else those its index lists, else of every *.safetensors there."""

    def __init__(self, folder: Path) -> None:
        self.path = folder
        self._files: list[TensorFile] = []
        try:
            self._file_of = self._open_files(folder)
        except BaseException:
            self.close()
            raise

    @classmethod
    def open(cls, folder: str | Path) -> Self:
        """Map and check all shards. Raises CorruptFile, or ModelError where the folder holds no safetensors."""
        return cls(Path(folder))

    def names(self) -> list[str]:
        return list(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._file_of[name].shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._file_of[name].dtype(name)

    def read(self, name: str) -> torch.Tensor:
        """A view of the shard's mapping, as TensorFile.read gives it."""
        return self._file_of[name].read(name)

    def close(self) -> None:
        for file in self._files:
            file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _open_files(self, folder: Path) -> dict[str, TensorFile]:
        if (folder / SINGLE_FILE).exists():
            return self._open_all([folder / SINGLE_FILE])
        if (folder / INDEX_FILE).exists():
            return self._open_indexed(folder / INDEX_FILE)
        paths = sorted(folder.glob("*.safetensors"))
        if not paths:
            raise _no_weights(folder)
        return self._open_all(paths)

    def _open(self, path: Path) -> TensorFile:
        self._files.append(TensorFile.open(path))
        return self._files[-1]

    def _open_all(self, paths: list[Path]) -> dict[str, TensorFile]:
        file_of: dict[str, TensorFile] = {}
        for path in paths:
            file = self._open(path)
            for name in file.names():
                if name in file_of:
                    raise CorruptFile(f"Tensor {name!r} is in both {file_of[name].path} and {path}.")
                file_of[name] = file
        return file_of

    def _open_indexed(self, index: Path) -> dict[str, TensorFile]:
        """Only what the index lists counts, as in Transformers; what else a shard holds is left alone."""
        weight_map = read_json(index, INDEX_LIMIT).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CorruptFile(f"{index} has no weight_map from tensor names to files.")
        for shard in weight_map.values():
            _check_shard_name(index, shard)
        shards = {}
        for shard in sorted(set(weight_map.values())):
            if not (index.parent / shard).is_file():
                raise ModelError(f"{index} lists the file {shard!r}, which is not in the folder.")
            shards[shard] = self._open(index.parent / shard)
        listed = {shard: set(file.names()) for shard, file in shards.items()}
        for name, shard in weight_map.items():
            if name not in listed[shard]:
                raise CorruptFile(f"{index} lists tensor {name!r} in {shard!r}, which does not hold it.")
        return {name: shards[shard] for name, shard in weight_map.items()}


def _check_shard_name(index: Path, shard: Any) -> None:
    """Check the name alone: in the cache of the Hub the file itself is a link that leaves the folder."""
    plain = isinstance(shard, str) and shard.endswith(".safetensors") and shard.isprintable()
    if not plain or len(shard.encode()) > 255 or any(mark in shard for mark in "/\\:"):
        raise CorruptFile(
            f"{index} lists the file {str(shard)[:80]!r}; it must be the plain name of a .safetensors file."
        )


def _no_weights(folder: Path) -> ModelError:
    pickled = next((path.name for pattern in PICKLED for path in sorted(folder.glob(pattern))), None)
    if pickled:
        return ModelError(
            f"{folder} holds only pickled weights ({pickled}), which Slipstream never loads; "
            "convert them to safetensors."
        )
    return ModelError(
        f"{folder} holds no weights; there must be a {SINGLE_FILE}, a {INDEX_FILE} or other *.safetensors."
    )
