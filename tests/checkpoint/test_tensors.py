"""ShardedTensors: the three layouts of a folder, and the indexes it refuses."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

from slipstream.checkpoint.tensors import ShardedTensors
from slipstream.errors import CorruptFile, ModelError


def save(path: Path, **tensors: float) -> None:
    safetensors.torch.save_file({name: torch.tensor([value]) for name, value in tensors.items()}, path)


def write_index(folder: Path, weight_map: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_one_file_wins_over_the_rest(tmp_path: Path) -> None:
    save(tmp_path / "model.safetensors", a=1.0)
    save(tmp_path / "other.safetensors", b=2.0)
    with ShardedTensors.open(tmp_path) as tensors:
        assert tensors.names() == ["a"]
        assert (tensors.shape("a"), tensors.dtype("a"), tensors.read("a").item()) == ((1,), torch.float32, 1.0)


def test_index_names_the_shards_and_links_may_leave_the_folder(tmp_path: Path) -> None:
    """The layout of the Hub's cache: snapshots/<commit>/x.safetensors -> ../../blobs/<hash>."""
    folder, blobs = tmp_path / "snapshots" / "1", tmp_path / "blobs"
    folder.mkdir(parents=True)
    blobs.mkdir()
    save(blobs / "hash", a=1.0, extra=3.0)
    save(folder / "model-2.safetensors", b=2.0)
    (folder / "model-1.safetensors").symlink_to(Path("../../blobs/hash"))
    write_index(folder, {"b": "model-2.safetensors", "a": "model-1.safetensors"})
    with ShardedTensors.open(folder) as tensors:
        assert {name: tensors.read(name).item() for name in tensors.names()} == {"b": 2.0, "a": 1.0}


def test_without_an_index_all_files_count(tmp_path: Path) -> None:
    save(tmp_path / "x.safetensors", a=1.0)
    save(tmp_path / "y.safetensors", b=2.0)
    assert ShardedTensors.open(tmp_path).names() == ["a", "b"]
    save(tmp_path / "z.safetensors", a=3.0)
    with pytest.raises(CorruptFile, match="'a' is in both"):
        ShardedTensors.open(tmp_path)


UNSAFE = ["../x", "/x", "d/x", "d\\x", "C:x", "x" * 300, "x\0"]


@pytest.mark.parametrize("name", [*(f"{name}.safetensors" for name in UNSAFE), "x.bin", "", "..", 3, None])
def test_index_may_only_name_plain_files(tmp_path: Path, name: object) -> None:
    write_index(tmp_path, {"a": name})
    with pytest.raises(CorruptFile, match=r"must be the plain name of a .safetensors file"):
        ShardedTensors.open(tmp_path)


def test_index_and_shards_must_agree(tmp_path: Path) -> None:
    save(tmp_path / "x.safetensors", a=1.0)
    write_index(tmp_path, {"a": "x.safetensors", "b": "x.safetensors"})
    with pytest.raises(CorruptFile, match=r"lists tensor 'b' in 'x.safetensors', which does not hold it"):
        ShardedTensors.open(tmp_path)
    write_index(tmp_path, {"a": "y.safetensors"})
    with pytest.raises(ModelError, match=r"lists the file 'y.safetensors', which is not in the folder"):
        ShardedTensors.open(tmp_path)
    for empty in ({}, [], None):
        write_index(tmp_path, empty)
        with pytest.raises(CorruptFile, match="has no weight_map"):
            ShardedTensors.open(tmp_path)


def test_pickles_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="holds no weights"):
        ShardedTensors.open(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(ModelError, match=r"only pickled weights \(pytorch_model.bin\), which Slipstream never loads"):
        ShardedTensors.open(tmp_path)
