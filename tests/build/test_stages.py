"""Pipeline parallelism: where a graph is cut, and that the stages of a model compute together what one rank does.

tests/build/test_shard.py has every architecture, each over two stages.
"""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from slipstream.build.stages import evenly
from slipstream.checkpoint import open_checkpoint, resolve
from slipstream.errors import BuildError
from slipstream.models import llama, model_file
from tests.build.test_shard import assert_same, checkpoint_of, logits, planned
from tests.checkpoint.naive_formats import FORMATS
from tests.checkpoint.test_formats import write_quantized


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "deepseek_v3"])
def test_stages_of_ranks(name: str, tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path / "model", model_file(name).TINY)
    assert_same(logits(checkpoint, tmp_path, 2, pp_size=2), logits(checkpoint, tmp_path, 1))


def test_experts_and_stages(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path / "model", model_file("mixtral").TINY)
    assert_same(logits(checkpoint, tmp_path, 2, pp_size=2, moe_ep_size=2), logits(checkpoint, tmp_path, 1))


@pytest.mark.parametrize("name", ["awq", "gptq-4-act-order", "ct-float-dynamic"])
def test_packed_weights(name: str, tmp_path: Path) -> None:
    model, _ = write_quantized(tmp_path / "model", llama.TINY, FORMATS[name])
    checkpoint = open_checkpoint(resolve(model))
    assert_same(logits(checkpoint, tmp_path, 1, pp_size=3), logits(checkpoint, tmp_path, 1))


@pytest.mark.parametrize("changes", [{"tie_word_embeddings": True}, {"num_hidden_layers": 7}])
def test_many_stages(changes: dict[str, Any], tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path / "model", llama.TINY | changes)
    assert_same(logits(checkpoint, tmp_path, 1, pp_size=3), logits(checkpoint, tmp_path, 1))


def test_a_stage_has_its_own_layers_alone(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path / "model", llama.TINY | {"num_hidden_layers": 6, "vocab_size": 32})
    plan, whole = planned(checkpoint, 1, pp_size=3), planned(checkpoint, 1)
    assert [facts["layers"] for facts in plan.manifest.ranks] == [[4, 6], [2, 4], [0, 2]], "the last stage is rank 0's"
    for rank, (first, end) in zip(plan.ranks, ([4, 6], [2, 4], [0, 2]), strict=True):
        caches = {name for name in rank.graph.inputs if name.startswith("kv.")}
        assert caches == {f"kv.{layer}" for layer in range(first, end)}
    angles = 32  # of rotary embedding, which each stage computes
    parts = sum(rank.memory["weights"] for rank in plan.ranks)
    assert parts == whole.ranks[0].memory["weights"] + 2 * angles
    assert plan.manifest.of_rank(0).kv_bytes_per_token * 3 == whole.manifest.kv_bytes_per_token
    assert [rank.graph.count_ops().get("receive", 0) for rank in plan.ranks] == [1, 1, 0]
    assert [rank.graph.count_ops().get("send", 0) for rank in plan.ranks] == [0, 1, 1]


@pytest.mark.parametrize(
    ("sizes", "count", "starts"),
    [([1, 1, 1, 1], 2, (2,)), ([5, 1, 1, 1], 2, (1,)), ([1, 1, 1, 5], 2, (3,)), ([2, 2, 2, 2, 9], 3, (2, 4))],
)
def test_runs_are_even(sizes: list[int], count: int, starts: tuple[int, ...]) -> None:
    assert evenly(sizes, count) == starts


def test_runs_are_as_even_as_can_be() -> None:
    generator = torch.Generator().manual_seed(7)
    for _ in range(20):
        sizes = torch.randint(1, 20, (7,), generator=generator).tolist()
        found = largest(sizes, evenly(sizes, 3))
        assert found == min(largest(sizes, (a, b)) for a in range(1, 6) for b in range(a + 1, 7))


def largest(sizes: list[int], starts: tuple[int, ...]) -> int:
    return max(sum(sizes[start:stop]) for start, stop in pairwise((0, *starts, len(sizes))))


def test_sizes_that_cannot_be_end_in_a_sentence(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path / "model", llama.TINY)
    with pytest.raises(BuildError, match=r"pp_size is 4, but .* at most 3 stages, .* it must be from 1 to 3\."):
        planned(checkpoint, 1, pp_size=4)
    with pytest.raises(BuildError, match=r"pp_size is 0; it must be from 1 to 1024"):
        planned(checkpoint, 1, pp_size=0)
    with pytest.raises(BuildError, match=r"moe_ep_size is 4; it must be 1, or 2 as tp_size"):
        planned(checkpoint, 2, moe_ep_size=4)
