"""What a group of products reaches: as far as its changes go in the whole block, and no node more is run."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from slipstream.checkpoint import open_checkpoint, resolve
from slipstream.checkpoint.random import write_random_model
from slipstream.engine.graph import Node
from slipstream.models import deepseek_v3, falcon, gemma2, gpt2, llama, qwen3_moe
from slipstream.quantize.groups import groups_of
from slipstream.quantize.names import DEFAULT_EXCLUDE, quantized_names
from slipstream.quantize.reach import reach_of
from slipstream.quantize.stream import Stream, captured_graph

MODELS = [llama, gemma2, gpt2, falcon, qwen3_moe, deepseek_v3]


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__.rpartition(".")[2])
def test_what_is_run_of_a_block_is_what_the_whole_block_computes(tmp_path: Path, model: Any) -> None:
    write_random_model(tmp_path, model.TINY)
    texts = torch.randint(3, 100, (2, 12), generator=torch.Generator().manual_seed(0))
    checkpoint = open_checkpoint(resolve(tmp_path), "float32")
    with torch.inference_mode():
        stream = Stream(checkpoint, captured_graph(checkpoint), [texts], torch.device("cpu"))
        names = quantized_names(stream.graph, DEFAULT_EXCLUDE)
        for block in stream.blocks[:-1]:
            weights = stream.weights(block)
            for group in groups_of(block, stream.graph, names):
                seen: dict[str, Tensor] = {}

                def watch(node: Node, inputs: Any, seen: dict[str, Tensor] = seen) -> None:
                    seen.update(
                        {name: each for name, each in zip(node.inputs, inputs, strict=True) if each is not None}
                    )

                changed = weights | {name: 1.5 * weights[name] for name in group.weights}
                whole = stream.run(block, changed, 0, watch=watch) | seen
                reach = reach_of(block, stream.graph, group)
                given = stream.run(reach.before, weights, 0)
                found = stream.run(reach.moved, changed, 0, given=given)
                assert found and found.keys() == reach.moved.needed
                for name, made in found.items():
                    torch.testing.assert_close(made, whole[name])
            stream.advance(block, weights)
    checkpoint.close()


def test_where_it_ends(tmp_path: Path) -> None:
    """At attention's result, at the product's own, at the MLP's: before each is added to what came in."""
    write_random_model(tmp_path, llama.TINY)
    checkpoint = open_checkpoint(resolve(tmp_path), "float32")
    graph = captured_graph(checkpoint).graph
    stream = Stream(checkpoint, captured_graph(checkpoint), [], torch.device("cpu"))
    block = stream.blocks[1]
    groups = groups_of(block, graph, quantized_names(graph, DEFAULT_EXCLUDE))
    reached = [reach_of(block, graph, group).moved.nodes for group in groups]
    assert [[node.op for node in nodes].count("linear") for nodes in reached] == [4, 1, 3, 1]
    assert not any(node.op == "add" for nodes in reached for node in nodes)
    assert [str(nodes[-1].inputs[1]).split(".")[-2] for nodes in reached] == [
        "o_proj", "o_proj", "down_proj", "down_proj",
    ]  # fmt: skip
    checkpoint.close()
