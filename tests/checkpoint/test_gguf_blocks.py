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
from slipstream.checkpoint.gguf.blocks import TYPES, part_of
from slipstream.checkpoint.random import write_random_model
from slipstream.engine.folder import open_engine
from slipstream.errors import ModelError
from slipstream.kernels.linear.groups import per_column
from slipstream.kernels.linear.parts import dense_weight
from slipstream.models import llama
from slipstream.schema.build import BuildConfig
from tests.checkpoint.llama_cpp import write_as_llama_cpp
from tests.checkpoint.tiny_gguf import write_gguf
from tests.oracle import GraphRunner
from tests.seed import SEED

SHAPES = llama.TINY | {
    "hidden_size": 256, "intermediate_size": 512, "head_dim": 32, "num_attention_heads": 8, "num_key_value_heads": 2,
    "num_hidden_layers": 2, "tie_word_embeddings": True,
}  # fmt: skip
TOKEN_IDS = list(range(3, 120, 7))


HALVES = {  # type → where a block has its float16 numbers, and in which relation numbers have a mean of about 0
    GGMLType.Q4_0: {0: 1},
    GGMLType.Q4_1: {0: 1, 2: -7.5},
    GGMLType.Q5_0: {0: 1},
    GGMLType.Q5_1: {0: 1, 2: -15.5},
    GGMLType.Q8_0: {0: 1},
    GGMLType.Q2_K: {80: 1, 82: 1.5},
    GGMLType.Q3_K: {108: 1},
    GGMLType.Q4_K: {0: 1, 2: 7.5},
    GGMLType.Q5_K: {0: 1, 2: 15.5},
    GGMLType.Q6_K: {208: 1},
    GGMLType.IQ4_NL: {0: 1},
    GGMLType.IQ4_XS: {0: 1},
}
EXACT = (GGMLType.Q4_0, GGMLType.Q4_1, GGMLType.Q5_0, GGMLType.Q5_1, GGMLType.Q8_0, GGMLType.IQ4_NL)
AS_LARGE = (GGMLType.Q4_0, GGMLType.Q4_1, GGMLType.Q8_0)  # here as in the file
each_type = pytest.mark.parametrize("ggml_type", TYPES, ids=lambda each: each.name)


def any_blocks(ggml_type: GGMLType, num_rows: int, num_in: int, random: np.random.Generator) -> np.ndarray:
    """uint8 [num_rows, bytes]: whatever bytes there are, they are numbers; here with a standard deviation of 0.02."""
    columns, num_bytes = gguf.GGML_QUANT_SIZES[ggml_type]
    blocks = random.integers(256, size=(num_rows, num_in // columns, num_bytes)).astype(np.uint8)

    def scaled(scale: float) -> np.ndarray:
        for place, relation in HALVES[ggml_type].items():
            blocks[..., place : place + 2] = np.array([scale * relation], np.float16).view(np.uint8)
        return blocks.reshape(num_rows, -1)

    return scaled(0.02 / gguf.dequantize(scaled(1.0), ggml_type).std())


@each_type
def test_parts_of_a_block_are_its_numbers(ggml_type: GGMLType) -> None:
    print(f"seed {SEED}")
    random, format = np.random.default_rng(SEED), TYPES[ggml_type].format
    columns, num_bytes = gguf.GGML_QUANT_SIZES[ggml_type]
    blocks = any_blocks(ggml_type, 5, 3 * columns, random).reshape(5, 3, num_bytes)
    for place in HALVES[ggml_type]:
        blocks[..., place : place + 2] = random.standard_normal((5, 3, 1)).astype(np.float16).view(np.uint8)
    parts = {part: part_of(torch.from_numpy(blocks), ggml_type, part) for part in format.parts(5, 3 * columns)}
    found = dense_weight(format, parts, 3 * columns)
    theirs = torch.from_numpy(gguf.dequantize(blocks.reshape(5, -1), ggml_type))
    if ggml_type in EXACT:
        assert torch.equal(found, theirs), "to the last bit"
    shift = per_column(parts["shift"].float(), 3 * columns, format.group_size) if "shift" in parts else torch.zeros(1)
    assert ((found - theirs).abs() <= 2**-11 * (theirs.abs() + 2 * shift.abs())).all(), "the scales' rounding"
    for part, (shape, dtype) in format.parts(5, 3 * columns).items():
        assert (tuple(parts[part].shape), parts[part].dtype) == (shape, getattr(torch, dtype)), part


def write_packed(folder: Path, types: dict[str, GGMLType], default: GGMLType, **changes: object) -> Path:
    """A random llama as llama.cpp stores it, matrices as blocks: of `types` by name, or of the other type."""
    write_random_model(folder / "hf", SHAPES | changes, seed=5)
    file = GGUFFile.open(write_as_llama_cpp(folder / "hf", folder / "plain.gguf"))
    metadata = {name: value for name, value in file.metadata.items() if name != "general.architecture"}
    tensors = {name: file.read(name).float().numpy() for name in file.names()}
    stored = {name: types.get(name, default) for name, tensor in tensors.items() if tensor.ndim == 2}
    random = np.random.default_rng(5)
    for name, ggml_type in stored.items():
        if ggml_type in AS_LARGE or ggml_type not in TYPES:
            tensors[name] = gguf.quantize(tensors[name], ggml_type)
        else:  # gguf writes few of them
            tensors[name] = any_blocks(ggml_type, *tensors[name].shape, random)
    return write_gguf(folder / "model.gguf", tensors, metadata, stored)


def opened(path: Path) -> Checkpoint:
    return open_checkpoint(resolve(path), "float32")


def test_a_file_in_its_own_bits_is_the_file_dequantized(tmp_path: Path) -> None:
    """Also where rows are reordered on the way, and where a type has no format of ours."""
    types = {
        "token_embd.weight": GGMLType.Q8_0,
        "blk.1.attn_v.weight": GGMLType.Q5_0,
        "blk.1.attn_q.weight": GGMLType.TQ1_0,
        "blk.0.ffn_up.weight": GGMLType.F16,
    }
    path = write_packed(tmp_path, types, GGMLType.Q4_1)
    dense, packed = opened(path), in_own_bits(opened(path))
    kinds = [format.kind for format in packed.formats.values()]
    assert (kinds.count("w4a8"), kinds.count("w8a8"), len(kinds)) == (2 * 7 - 3, 2, 2 * 7 - 1)
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


@each_type
def test_an_engine_keeps_the_bits_and_the_logits(ggml_type: GGMLType, tmp_path: Path) -> None:
    is_tied = ggml_type in (GGMLType.Q4_1, GGMLType.Q5_K, GGMLType.Q6_K)
    table = {} if is_tied else {"token_embd.weight": GGMLType.Q8_0}
    path = write_packed(tmp_path, table, ggml_type, tie_word_embeddings=is_tied)
    config = BuildConfig(quantization="gguf", kv_cache_dtype="float32", max_batch_size=4, max_num_tokens=64)
    build(opened(path), tmp_path / "engine", config)
    expected = logits_of_transformers(path)
    assert expected.std() > 0.1
    # A number between two of an activation's steps may round the other way than there.
    torch.testing.assert_close(GraphRunner(tmp_path / "engine").logits(TOKEN_IDS), expected, atol=3e-2, rtol=0)

    engine = open_engine(tmp_path / "engine")
    ops = engine.graph.count_ops()
    assert ops["linear_panels"] + ops.get("linear_panels_silu_and_mul_quantize", 0) == 4 * 2 + 1
    assert ops["embedding_panels"] == 1
    if ggml_type not in AS_LARGE:
        return
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
