"""Tensor parallelism: the ranks of an engine compute together what one computes alone, each with a part of the weights.

The runner walks slipstream/models; what is added there is tested here.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import slipstream.kernels  # noqa: F401 - registers the ops
from slipstream.build import BuildPlan, plan_build, write_engine
from slipstream.build.example import trace
from slipstream.build.rewrite import Symbol, ops
from slipstream.build.shard import Shard, head_ranges
from slipstream.checkpoint import Checkpoint, open_checkpoint, resolve
from slipstream.checkpoint.random import write_random_model
from slipstream.engine.folder import open_engine
from slipstream.errors import BuildError, EngineError
from slipstream.models import known_models, llama, mixtral, model_file
from slipstream.schema.build import BuildConfig
from slipstream.schema.format import QUANTIZES_ACTIVATIONS
from slipstream.schema.mapping import Mapping
from tests.checkpoint.naive_formats import FORMATS
from tests.checkpoint.test_formats import write_quantized
from tests.engine.support import changed_engine
from tests.ranks import logits_on_ranks

TOLERANCE = 2e-5  # absolute, float32 logits: sums of two parts instead of one
CHUNKS = [list(range(3, 110, 9)), [77], [5, 6, 7]]
# Heads of the formats' models: two of them are a block of 128 columns.
SHAPES = llama.TINY | {"hidden_size": 160, "intermediate_size": 224, "head_dim": 64, "num_hidden_layers": 1}
# One for each way in which numbers can be packed; tests/checkpoint reads all that are published into these.
PACKED = [
    "awq", "gptq-4-act-order", "gptq-4-one-group", "gptq-8-act-order", "ct-pack-8-channel", "ct-int-w8a8",
    "ct-int-w8a8-static", "ct-float-dynamic", "ct-float-block", "ct-naive-float", "modelopt-nvfp4",
]  # fmt: skip
IN_PARTS = ("attention.o_proj.weight", "mlp.down_proj.weight")  # whose columns the ranks share out


def checkpoint_of(folder: Path, options: dict[str, Any]) -> Checkpoint:
    return open_checkpoint(resolve(write_random_model(folder, options)))


def planned(checkpoint: Checkpoint, tp_size: int, **changes: Any) -> BuildPlan:
    changes = {"disabled_passes": ("last_token",)} | changes  # logits of every token are compared
    return plan_build(checkpoint, BuildConfig(max_batch_size=2, max_num_tokens=64, tp_size=tp_size, **changes))


def logits(checkpoint: Checkpoint, folder: Path, tp_size: int, pp_size: int = 1, **changes: Any) -> Tensor:
    engine = folder / f"engine-{tp_size}-{pp_size}"
    write_engine(planned(checkpoint, tp_size, pp_size=pp_size, **changes), engine, measure_kernels=False)
    return logits_on_ranks(engine, Mapping(tp_size, pp_size), CHUNKS)


def assert_same(found: Tensor, expected: Tensor) -> None:
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)
    assert torch.equal(found.argmax(1), expected.argmax(1)), "greedy tokens"


@pytest.mark.parametrize("name", known_models())
def test_two_ranks_are_as_one(name: str, tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path / "model", model_file(name).TINY)
    alone = logits(checkpoint, tmp_path, 1)
    assert_same(logits(checkpoint, tmp_path, 2), alone)
    assert torch.equal(logits(checkpoint, tmp_path, 1, pp_size=2), alone), "stages compute what one rank does"


@pytest.mark.parametrize(
    ("name", "size"), [("llama", 4), ("deepseek_v3", 4), ("gpt_oss", 4), ("olmo2", 4), ("gpt2", 3)]
)
def test_more_ranks_than_kv_heads_share_these_and_heads_need_not_divide(name: str, size: int, tmp_path: Path) -> None:
    changes = {"gpt2": {"vocab_size": 131}}.get(name, {})
    checkpoint = checkpoint_of(tmp_path / "model", model_file(name).TINY | changes)
    assert_same(logits(checkpoint, tmp_path, size), logits(checkpoint, tmp_path, 1))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True}),
        ("baichuan", {"max_position_embeddings": None}),  # ALiBi
        ("falcon", {"alibi": True}),
    ],
)
def test_what_changes_the_numbers_of_a_model(name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    options = {key: value for key, value in (model_file(name).TINY | changes).items() if value is not None}
    checkpoint = checkpoint_of(tmp_path / "model", options)
    assert_same(logits(checkpoint, tmp_path, 2), logits(checkpoint, tmp_path, 1))


def rounded_in_parts(checkpoint: Checkpoint) -> Checkpoint:
    """Where a step measures the scale of its activations, each rank does it for the columns that it has."""
    formats = {
        name: replace(format, input_group_size=checkpoint.shapes[name][1] // 2)
        if name.endswith(IN_PARTS)
        and format.kind in QUANTIZES_ACTIVATIONS
        and not (format.input_scale or format.input_group_size)
        else format
        for name, format in checkpoint.formats.items()
    }
    return replace(checkpoint, formats=formats)


@pytest.mark.parametrize("name", PACKED)
def test_every_format_is_shared_out_as_it_is_packed(name: str, tmp_path: Path) -> None:
    model, _ = write_quantized(tmp_path / "model", SHAPES, FORMATS[name])
    checkpoint = open_checkpoint(resolve(model))
    assert_same(logits(checkpoint, tmp_path, 2), logits(rounded_in_parts(checkpoint), tmp_path, 1))
    products = planned(checkpoint, 2).graph.count_ops()
    assert sum(count for op, count in products.items() if op.startswith("linear_")) == 4, "and stays packed"


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", ["awq", "gptq-8-act-order", "ct-pack-8-channel", "ct-naive-float"])
def test_packed_experts(name: str, size: int, tmp_path: Path) -> None:
    model, _ = write_quantized(tmp_path / "model", mixtral.TINY | {"num_hidden_layers": 1}, FORMATS[name])
    checkpoint = open_checkpoint(resolve(model))
    assert_same(logits(checkpoint, tmp_path, size), logits(checkpoint, tmp_path, 1))


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_each_rank_has_some_experts_whole(name: str, tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path / "model", model_file(name).TINY)
    assert_same(logits(checkpoint, tmp_path, 2, moe_ep_size=2), logits(checkpoint, tmp_path, 1))


@pytest.mark.parametrize("name", ["awq", "gptq-8-act-order", "ct-naive-float"])
def test_packed_experts_whole(name: str, tmp_path: Path) -> None:
    model, _ = write_quantized(tmp_path / "model", mixtral.TINY | {"num_hidden_layers": 1}, FORMATS[name])
    checkpoint = open_checkpoint(resolve(model))
    assert_same(logits(checkpoint, tmp_path, 2, moe_ep_size=2), logits(checkpoint, tmp_path, 1))


def test_a_cache_in_8_bits(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path / "model", llama.TINY)
    found, expected = (logits(checkpoint, tmp_path, size, kv_cache_dtype="fp8") for size in (2, 1))
    # What differs in the last bit may be rounded to the next of E4M3's numbers.
    torch.testing.assert_close(found, expected, atol=2e-2, rtol=0)


def test_each_rank_has_its_part_alone(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path / "model", llama.TINY)
    parts, whole = planned(checkpoint, 2).ranks, planned(checkpoint, 1).ranks[0]
    norms = sum(64 * 4 for name in whole.graph.weights if name.endswith("norm.weight"))
    assert all(rank.memory["weights"] - norms - 32 == (whole.memory["weights"] - norms - 32) // 2 for rank in parts)


def test_a_step_meets_twice_a_layer_and_at_its_ends(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path / "model", llama.TINY)
    counts = planned(checkpoint, 2, disabled_passes=()).graph.count_ops()
    assert (counts["all_reduce"], counts["all_gather"]) == (2 * 3 + 1, 1)
    assert counts["add_rms_norm"] == 2 * 3, "the sum that meets is fused as any other"


def test_for_gpus_ranks_meet_in_the_norm(tmp_path: Path) -> None:
    """What such a graph computes is shown by its references, on a CPU."""
    checkpoint = checkpoint_of(tmp_path / "model", llama.TINY)
    config = BuildConfig(max_batch_size=2, max_num_tokens=64, tp_size=2, disabled_passes=("last_token",))
    plan = plan_build(checkpoint, config, device="cuda")
    counts = plan.graph.count_ops()
    assert (counts["all_reduce"], counts["reduce_add_rms_norm"]) == (1, 2 * 3), "the table of tokens has no norm"
    write_engine(plan, tmp_path / "for-gpus", measure_kernels=False)
    found = logits_on_ranks(tmp_path / "for-gpus", Mapping(2), CHUNKS)
    assert_same(found, logits(checkpoint, tmp_path, 1))


@pytest.mark.parametrize(
    ("heads", "sizes"),
    [
        ((8, 4, 2), ([(0, 4), (4, 8)], [(0, 2), (2, 4)])),
        ((8, 2, 4), ([(0, 2), (2, 4), (4, 6), (6, 8)], [(0, 1), (0, 1), (1, 2), (1, 2)])),
        ((9, 3, 2), ([(0, 3), (3, 9)], [(0, 1), (1, 3)])),
    ],
)
def test_heads_of_each_rank(heads: tuple[int, int, int], sizes: Any) -> None:
    assert head_ranges(*heads) == sizes


def test_sizes_that_cannot_be_end_in_a_sentence(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path / "model", llama.TINY)
    with pytest.raises(BuildError, match=r"tp_size is 3, but 4 heads, with 2 of keys and values, .* be 1, 2, 4\."):
        planned(checkpoint, 3)
    with pytest.raises(BuildError, match=r"tp_size is 0; it must be from 1 to 1024"):
        planned(checkpoint, 0)


def test_what_no_rule_knows_is_whole_on_every_rank() -> None:
    """A model of a user's own: its values meet before an op that needs all of them."""

    def block(x: Symbol, up: Symbol, norm: Symbol, down: Symbol) -> Symbol:
        wide = ops.silu(ops.linear(x, up))
        return ops.linear(ops.rms_norm(wide, norm, eps=1e-5, weight_offset=0.0), down)

    graph = trace(block, {"x": ("T", 8)}, {"up": (6, 8), "norm": (6,), "down": (8, 6)})
    Shard(0, 2).run(graph)
    assert [node.op for node in graph.nodes] == ["linear", "silu", "rms_norm", "linear", "all_gather"]
    assert graph.weights["up"].shape == (6, 8)


def test_a_weight_that_is_read_in_two_ways_is_refused() -> None:
    def block(x: Symbol, a: Symbol) -> Symbol:
        return ops.linear(ops.silu(ops.linear(ops.silu(ops.linear(x, a)), a)), a)

    graph = trace(block, {"x": ("T", 8)}, {"a": (8, 8)})
    with pytest.raises(BuildError, match="a is read in two ways that share it out differently over ranks"):
        Shard(0, 2).run(graph)


@pytest.mark.parametrize("sizes", [[128], [32, 96], [64, 64, 64]])
def test_columns_that_are_not_those_of_the_rank_are_refused(sizes: list[int], tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path / "model", llama.TINY)
    write_engine(planned(checkpoint, 2), tmp_path / "engine", measure_kernels=False)

    def change(graph: dict[str, Any]) -> None:
        (node,) = (node for node in graph["nodes"] if node["op"] == "all_gather")
        node["attributes"]["sizes"] = sizes

    def agree(manifest: dict[str, Any]) -> None:
        manifest["ranks"][0]["graph_sha256"] = manifest["graph_sha256"]

    changed = changed_engine(tmp_path / "engine", tmp_path / "changed", graph=change, manifest=agree)
    with pytest.raises(
        EngineError, match=r"puts \[.*\] columns together, of which rank 0 of 2 has 64|one of the sizes"
    ):
        open_engine(changed)


@pytest.mark.parametrize(
    "ranks",
    [
        [], [{}, {}], [{"num_kv_heads": 1}], [{"graph_sha256": "a", "memory": {}}] * 2, 3,
        [{"num_kv_heads": 1, "layers": [2, 4], "graph_sha256": "a", "memory": {}}] * 2,
    ],
)  # fmt: skip
def test_a_manifest_must_say_what_each_rank_has(ranks: Any, tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path / "model", llama.TINY)
    write_engine(planned(checkpoint, 2), tmp_path / "engine", measure_kernels=False)
    changed = changed_engine(
        tmp_path / "engine", tmp_path / "changed", manifest=lambda manifest: manifest.update(ranks=ranks)
    )
    with pytest.raises(EngineError, match=r"config\.json: (ranks|layers) (must|is)"):
        open_engine(changed)
