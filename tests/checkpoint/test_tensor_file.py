"""TensorFile against the safetensors library, the streaming writer, and every rule of the header by its message."""

import json
import os
import struct
from pathlib import Path

import pytest
import safetensors.torch
import torch

from slipstream.engine.tensor_file import DTYPES, TensorFile, write_tensor_file
from slipstream.errors import CorruptFile, ModelError


def tensors_of_every_dtype() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    bytes_ = torch.randint(0, 2, (3, 8), dtype=torch.uint8)
    tensors = {name: bytes_.repeat(1, dtype.itemsize).view(dtype) for name, dtype in DTYPES.items()}
    return tensors | {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 4), "odd": torch.ones(5, dtype=torch.uint8)}


def write_raw(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    raw = [tensor.contiguous().view(-1).view(torch.uint8) for tensor in (left, right)]
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(*raw)


def test_reads_what_the_library_writes(tmp_path: Path) -> None:
    tensors = tensors_of_every_dtype()
    safetensors.torch.save_file(tensors, tmp_path / "x.safetensors", {"format": "pt"})
    with TensorFile.open(tmp_path / "x.safetensors") as file:
        assert file.metadata == {"format": "pt"}
        assert set(file.names()) == set(tensors)
        for name, tensor in tensors.items():
            assert file.shape(name) == tuple(tensor.shape)
            assert file.dtype(name) == tensor.dtype
            assert same(file.read(name), tensor)


def test_the_library_reads_what_the_writer_writes(tmp_path: Path) -> None:
    tensors = tensors_of_every_dtype()
    path, written = tmp_path / "x.safetensors", []
    entries = [(name, tensor.shape, tensor.dtype, lambda t=tensor: t) for name, tensor in tensors.items()]
    write_tensor_file(path, entries, {"key": "é"}, written.append)
    assert sum(written) == sum(tensor.nbytes for tensor in tensors.values())
    assert (8 + struct.unpack("<Q", path.read_bytes()[:8])[0]) % 64 == 0
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.safetensors"]
    loaded = safetensors.torch.load_file(path)
    assert all(same(loaded[name], tensor) for name, tensor in tensors.items())
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == {"key": "é"}
    with TensorFile.open(path) as file:
        for name, tensor in tensors.items():
            assert file.read(name).data_ptr() % tensor.dtype.itemsize == 0
            assert same(file.read(name), tensor)


def test_read_is_a_private_view_that_outlives_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file({"a": torch.zeros(1000)}, path)
    before = path.read_bytes()
    file = TensorFile.open(path)
    first, second = file.read("a"), file.read("a")
    assert first.data_ptr() == second.data_ptr()
    first.fill_(7)
    file.close()
    assert second.eq(7).all()
    assert path.read_bytes() == before


def test_unaligned_data_is_copied(tmp_path: Path) -> None:
    header = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    header += b" " * (-(8 + len(header)) % 4 + 1)
    path = write_raw(tmp_path / "x.safetensors", header, struct.pack("<2f", 1.5, -2.0))
    tensor = TensorFile.open(path).read("a")
    assert tensor.tolist() == [1.5, -2.0]
    assert tensor.data_ptr() % 4 == 0


def test_a_failed_write_leaves_nothing_and_the_old_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"old")

    def fail() -> torch.Tensor:
        raise KeyboardInterrupt

    entries = [("a", (2,), torch.float32, lambda: torch.zeros(2)), ("b", (2,), torch.float32, fail)]
    with pytest.raises(KeyboardInterrupt):
        write_tensor_file(path, entries, {})
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.safetensors"]
    assert path.read_bytes() == b"old"


def test_the_writer_holds_tensors_to_what_was_announced(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a was announced as torch.float32 \[2\] and made as torch.float16 \[2\]"):
        write_tensor_file(tmp_path / "x", [("a", (2,), torch.float32, lambda: torch.zeros(2).half())], {})
    with pytest.raises(ValueError, match="Two tensors are named a"):
        write_tensor_file(tmp_path / "x", [("a", (2,), torch.float32, lambda: torch.zeros(2))] * 2, {})


def entry(begin: int = 0, end: int = 8, shape: object = (2,), dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"[]", "must be an object"),
        (b"{", "not valid JSON"),
        (b'{"a\xff":1}', "not valid JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"x": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{}}', "'a' occurs twice"),
        ({"__metadata__": {"a": 1}}, "not an object of strings"),
        ({"__metadata__": []}, "not an object of strings"),
        ({"a": []}, "tensor 'a' is not described by"),
        ({"a": entry() | {"more": 1}}, "tensor 'a' is not described by"),
        ({"a": entry(dtype="F4")}, "tensor 'a' has the dtype 'F4'; known are F64, F32"),
        ({"a": entry(dtype=["F32"])}, "tensor 'a' has the dtype"),
        ({"a": entry(shape=[-2])}, "tensor 'a' has a shape"),
        ({"a": entry(shape=[2.0])}, "tensor 'a' has a shape"),
        ({"a": entry(shape=[True, 2])}, "tensor 'a' has a shape"),
        ({"a": entry(shape=[1] * 8 + [2])}, "tensor 'a' has a shape"),
        ({"a": entry(shape=[0, 2**62, 2**62], end=0)}, "tensor 'a' has a shape"),
        ({"a": entry(shape=2)}, "tensor 'a' has a shape"),
        ({"a": entry(shape=[3])}, "tensor 'a' has 12 bytes by its shape and dtype, but its data_offsets span 8"),
        ({"a": entry(begin=8, end=0)}, "tensor 'a' has 8 bytes by its shape"),
        ({"a": entry() | {"data_offsets": [0, 8, 8]}}, "tensor 'a' has data_offsets"),
        ({"a": entry() | {"data_offsets": [-8, 0]}}, "tensor 'a' has data_offsets"),
        ({"a": entry(end=16, shape=[4])}, "'a' ends at byte 16 of a data section of 8"),
        ({"a": entry(), "b": entry()}, "'b' begins at byte 0 and overlaps"),
        ({"a": entry(4, 8, [1])}, "'a' begins at byte 4 and leaves a hole"),
        ({"a": entry(0, 4, [1])}, "4 bytes after its last tensor"),
    ],
)
def test_refuses(tmp_path: Path, header: object, message: str) -> None:
    path = write_raw(tmp_path / "bad.safetensors", header, bytes(8))
    with pytest.raises(CorruptFile, match=message) as caught:
        TensorFile.open(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "only 0 bytes"),
        (b"1234567", "only 7 bytes"),
        (struct.pack("<Q", 2**63) + b"{}", "claims a header of 9223372036854775808 bytes; it can have at most 2"),
        (struct.pack("<Q", 3) + b"{}", "claims a header of 3 bytes"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
    ],
)
def test_refuses_files_without_a_header(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "bad.safetensors").write_bytes(data)
    with pytest.raises(CorruptFile, match=message):
        TensorFile.open(tmp_path / "bad.safetensors")


def test_refuses_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is not a file"):
        TensorFile.open(tmp_path)
    with pytest.raises(ModelError, match="is not a file"):
        TensorFile.open(tmp_path / "none")


def test_a_file_larger_than_the_memory_is_mapped(tmp_path: Path) -> None:
    """As the engine of a 70B is on most machines. A hole in a file takes no disk."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    shape = [2, memory]
    header = json.dumps({"x": {"dtype": "U8", "shape": shape, "data_offsets": [0, 2 * memory]}}).encode()
    path = tmp_path / "large.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + 2 * memory)
    with TensorFile.open(path) as opened:
        assert list(opened.shape("x")) == shape
        assert opened.read("x")[1, -1] == 0
