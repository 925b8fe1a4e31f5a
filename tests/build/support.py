"""Running graphs at any stage of a build on random numbers, so that a rewrite can be compared with what it replaced."""

import copy

import torch
from torch import Tensor

from slipstream.engine.choices import Choices
from slipstream.engine.graph import Graph
from slipstream.kernels.registry import known_ops
from slipstream.runtime.worker.graphs import compile_graph

CPU = torch.device("cpu")
# Two sequences over pages of any size >= 2: a chunk of 3 tokens after 1 in the cache, and a generation row after 1.
SIZES = {"T": 4, "S": 2, "S1": 3, "B": 2, "R": 2, "N": 5}


def step_values(block_size: int) -> dict[str, Tensor]:
    """Valid attention metadata; block_size is 2 or at least 4."""
    tables = torch.tensor([[3, 1], [4, 0]])
    places = [(0, 1), (0, 2), (0, 3), (1, 1)]
    slots = [int(tables[sequence, p // block_size]) * block_size + p % block_size for sequence, p in places]
    return {
        "token_ids": torch.tensor([5, 3, 0, 7]),
        "positions": torch.tensor([1, 2, 3, 1]),
        "slots": torch.tensor(slots),
        "query_starts": torch.tensor([0, 3, 4]),
        "kv_lens": torch.tensor([4, 2]),
        "block_tables": tables,
        "logit_rows": torch.tensor([2, 3]),
    }


def random_values(graph: Graph, seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(inputs, weights) of the right shapes; the numbers of a name are the same in any graph that has it."""
    kv = [kind for name, kind in graph.inputs.items() if name.startswith("kv") and name != "kv_lens"]
    step = step_values(int(kv[0].shape[2]) if kv else 2)

    def make(name: str, shape: tuple[int | str, ...]) -> Tensor:
        leaf = name.removeprefix("step.")
        if leaf in step:
            return step[leaf].clone()
        generator = torch.Generator().manual_seed(seed + sum(ord(c) * (i + 1) for i, c in enumerate(name)))
        return torch.randn([SIZES[size] if isinstance(size, str) else size for size in shape], generator=generator)

    inputs = {name: make(name, kind.shape) for name, kind in graph.inputs.items()}
    weights = {name: make(graph.equal.get(name, name), kind.shape) / 2 for name, kind in graph.weights.items()}
    return inputs, weights


def evaluate(graph: Graph, inputs: dict[str, Tensor], weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The outputs by position, and the inputs afterwards (KV caches are written). `weights` are those before a fold."""
    inputs = {name: value.clone() for name, value in inputs.items()}
    known = dict(weights)
    for node in graph.prologue:
        values = [None if name is None else known[name] for name in node.inputs]
        op = known_ops()[node.op]
        takes_list = any(argument.kind == "Tensor[]" for argument in op.arguments)
        (known[node.outputs[0]],) = [op.reference(*([values] if takes_list else values), **node.attributes)]
    step = compile_graph(graph, {name: known[name] for name in graph.weights}, Choices("test"), CPU).run
    return {f"output {i}": value for i, value in enumerate(step(inputs))} | inputs


def assert_same(before: Graph, after: Graph, seed: int = 0, select: bool = False) -> None:
    """Both graphs give the same numbers; with `select`, the later one only those of the logit rows."""
    inputs, weights = random_values(before, seed)
    expected, actual = evaluate(before, inputs, weights), evaluate(after, inputs, weights)
    if select:
        expected["output 0"] = expected["output 0"][step_values(2)["logit_rows"]]
    assert expected.keys() == actual.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            actual[name], value, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


def copied(graph: Graph) -> Graph:
    return copy.deepcopy(graph)
