"""Weights that keep the numbers of a GGUF file: blocks as parts, a file as a checkpoint, and as an engine of a CPU."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from slipstream.build import build
from slipstream.checkpoint import Checkpoint, open_checkpoint, resolve
from slipstream.checkpoint.convert import in_own_bits
from slipstream.checkpoint.gguf import GGMLType, GGUFFile
from slipstream.checkpoint.gguf.blocks import FORMATS, part_of
from slipstream.checkpoint.random import write_random_model
from slipstream.engine.folder import open_engine
from slipstream.errors import ModelError
from slipstream.kernels.linear.parts import dense_weight
from slipstream.models import llama
from slipstream.schema.build import BuildConfig
from tests.checkpoint.llama_cpp import write_as_llama_cpp
from tests.checkpoint.tiny_gguf import write_gguf
from tests.oracle import GraphRunner
from tests.seed import SEED

SHAPES = llama.TINY | {
    "hidden_size": 64, "intermediate_size": 96, "head_dim": 32, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_hidden_layers": 2, "tie_word_embeddings": True,
}  # fmt: skip
TOKEN_IDS = list(range(3, 120, 7))


def naive_block(block: bytes, ggml_type: GGMLType) -> list[float]:
    """As ggml-quants.c: dequantize_row_q4_0, dequantize_row_q4_1, dequantize_row_q8_0."""
    scale = float(np.frombuffer(block, np.float16, 1)[0])
    if ggml_type == GGMLType.Q8_0:
        return [scale * number for number in np.frombuffer(block, np.int8, 32, 2).tolist()]
    if ggml_type == GGMLType.Q4_0:
        return [scale * ((block[2 + i % 16] >> 4 * (i // 16)) % 16 - 8) for i in range(32)]
    minimum = float(np.frombuffer(block, np.float16, 1, 2)[0])
    return [scale * ((block[4 + i % 16] >> 4 * (i // 16)) % 16) + minimum for i in range(32)]


@pytest.mark.parametrize("ggml_type", FORMATS, ids=lambda each: each.name)
def test_parts_of_a_block_are_its_numbers(ggml_type: GGMLType) -> None:
    print(f"seed {SEED}")
    random, format = np.random.default_rng(SEED), FORMATS[ggml_type]
    num_bytes = gguf.GGML_QUANT_SIZES[ggml_type][1]
    blocks = random.integers(256, size=(5, 3, num_bytes)).astype(np.uint8)
    scales = random.standard_normal((5, 3, 2)).astype(np.float16)
    blocks[..., : 4 if format.has_zeros else 2] = scales[..., : 2 if format.has_zeros else 1].view(np.uint8)
    expected = [[x for block in row for x in naive_block(block.tobytes(), ggml_type)] for row in blocks]
    parts = {part: part_of(torch.from_numpy(blocks), format, part) for part in format.parts(5, 96)}
    found = dense_weight(format, parts, 96)
    torch.testing.assert_close(found.double(), torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=1e-6)
    theirs = gguf.dequantize(blocks.reshape(5, -1), ggml_type)
    assert torch.equal(found, torch.from_numpy(theirs)), "to the last bit"
    for part, (shape, dtype) in format.parts(5, 96).items():
        assert (tuple(parts[part].shape), parts[part].dtype) == (shape, getattr(torch, dtype)), part


def write_packed(folder: Path, types: dict[str, GGMLType], default: GGMLType, **changes: object) -> Path:
    """A random llama as llama.cpp stores it, matrices as blocks: of `types` by name, or of the other type."""
    write_random_model(folder / "hf", SHAPES | changes, seed=5)
    file = GGUFFile.open(write_as_llama_cpp(folder / "hf", folder / "plain.gguf"))
    metadata = {name: value for name, value in file.metadata.items() if name != "general.architecture"}
    tensors = {name: file.read(name).float().numpy() for name in file.names()}
    stored = {name: types.get(name, default) for name, tensor in tensors.items() if tensor.ndim == 2}
    tensors |= {name: gguf.quantize(tensors[name], ggml_type) for name, ggml_type in stored.items()}
    return write_gguf(folder / "model.gguf", tensors, metadata, stored)


def opened(path: Path) -> Checkpoint:
    return open_checkpoint(resolve(path), "float32")


def test_a_file_in_its_own_bits_is_the_file_dequantized(tmp_path: Path) -> None:
    """Also where rows are reordered on the way, and where a type has no format of ours."""
    types = {
        "token_embd.weight": GGMLType.Q8_0,
        "blk.1.attn_v.weight": GGMLType.Q5_0,
        "blk.0.ffn_up.weight": GGMLType.F16,
    }
    path = write_packed(tmp_path, types, GGMLType.Q4_1)
    dense, packed = opened(path), in_own_bits(opened(path))
    kinds = [format.kind for format in packed.formats.values()]
    assert (kinds.count("w4a8"), kinds.count("w8a8"), len(kinds)) == (2 * 7 - 2, 1, 2 * 7 - 1)
    assert not dense.formats
    for name in dense.shapes:
        assert torch.equal(dense.read(name), packed.read(name)), name


def logits_of_transformers(path: Path) -> Tensor:
    """Of the file as it is dequantized there, with what products read rounded to 8 bits in groups of 32."""

    def round_input(_: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
        groups = inputs[0].unflatten(-1, (-1, 32))
        scales = groups.abs().amax(-1, keepdim=True) / 127
        return ((groups / scales).round() * scales).flatten(-2)

    config = AutoConfig.from_pretrained(path.parent / "hf")
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, config=config, dtype=torch.float32)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(round_input)
    with torch.no_grad():
        return model.eval()(torch.tensor([TOKEN_IDS])).logits[0]


@pytest.mark.parametrize("default", FORMATS, ids=lambda each: each.name)
@pytest.mark.parametrize("is_tied", [True, False])
def test_an_engine_keeps_the_bits_and_the_logits(default: GGMLType, is_tied: bool, tmp_path: Path) -> None:
    path = write_packed(tmp_path, {"token_embd.weight": GGMLType.Q8_0}, default, tie_word_embeddings=is_tied)
    config = BuildConfig(quantization="gguf", max_batch_size=4, max_num_tokens=64)
    build(opened(path), tmp_path / "engine", config)
    expected = logits_of_transformers(path)
    assert expected.std() > 0.1
    # A number between two of an activation's steps may round the other way than there.
    torch.testing.assert_close(GraphRunner(tmp_path / "engine").logits(TOKEN_IDS), expected, atol=3e-2, rtol=0)

    engine = open_engine(tmp_path / "engine")
    ops = engine.graph.count_ops()
    assert (ops["linear_panels"], ops["embedding_panels"]) == (4 * 2 + 1, 1)
    packed = [name for name in engine.weights.names() if ".weight." in name]
    sizes = [engine.weights.read(name).nbytes for name in packed]
    stored = GGUFFile.open(path)
    matrices = sum(stored.blocks(name).nbytes for name in stored.names() if len(stored.shape(name)) == 2)
    assert sum(sizes) == matrices, "as many bytes as in the file"


def test_files_of_other_kinds_and_gpus_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    config = BuildConfig(quantization="gguf", max_batch_size=4, max_num_tokens=64)
    with pytest.raises(ModelError, match="is no GGUF file; quantization gguf is for these"):
        build(open_checkpoint(resolve(tiny_model)), tmp_path / "engine", config)
    with pytest.raises(ModelError, match="gguf, which runs on a CPU; leave it out on a GPU"):
        build(open_checkpoint(resolve(tiny_model)), tmp_path / "engine", config, device="cuda")
