"""Engines gone wrong in ways that a stranger might try: what tests/engine/fuzz.py opens.

A mutant is made from a seed and a number alone, so a finding is reproduced by them. Half of the changed graphs are made
to agree with themselves again (types, weights, memory, digest), as a careful author would: those reach the deepest.
"""

import contextlib
import json
import math
import os
import random
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slipstream.engine.check import problem_of_call
from slipstream.engine.graph import DTYPES, Graph, TensorType, graph_from_json
from slipstream.engine.memory import plan_memory
from slipstream.engine.shapes import infer_node
from slipstream.engine.tensor_file import DTYPE_NAMES
from slipstream.engine.tensor_file import DTYPES as FILE_DTYPES
from slipstream.errors import BuildError
from slipstream.kernels.registry import Argument, known_ops
from tests.engine.support import digest_of, read_header

NAMES = [
    "", "magic", "os.system", "__import__", "__import__('os')", "x; import os", "a\nb", "x" * 300, "é", "\ud800",
    "../x", "kv.0", "kv.1", "kv.99", "step.slots", "step.slots.1", "step.block_tables", "step.token_ids",
    "step.positions.for_sinks", "step.logit_rows", "linear", "concat", "float32", "int64", "float8_e5m2", "T", "N", "R",
    "Z",
]  # fmt: skip
NUMBERS = [
    0, 1, -1, 2, 3, 4, 7, 8, 16, 24, 32, 64, 128, 4096, 1_000_003, 2**31 - 1, 2**31, 2**40, 2**47, 2**62, 2**63,
    10**400, 0.5, 1e308, math.nan, math.inf, True, False, None,
]  # fmt: skip
SIZES = [1, 2, 3, 4, 7, 8, 16, 24, 32, 48, 64, 96, 128, 130, 256, 1_000_003, 2**40, "T", "S", "S1", "B", "R", "N"]
MOST_BYTES = 4 << 20  # of weights that a mutant may bring


@dataclass
class Parts:
    """An engine folder as values: what is written is what they say, whether it fits together or not."""

    config: dict[str, Any]
    header: dict[str, Any]
    graph: dict[str, Any]
    data: bytes

    @classmethod
    def of(cls, engine: Path) -> "Parts":
        header, data = read_header(engine / "rank0.engine")
        graph = json.loads(header["__metadata__"].pop("graph"))
        header["__metadata__"].pop("captured")  # for people, and long
        return cls(json.loads((engine / "config.json").read_text()), header, graph, data)

    def write(self, folder: Path) -> None:
        text = json.dumps(self.graph)
        with contextlib.suppress(TypeError, AttributeError, KeyError):  # a header without metadata, in one way or other
            self.header["__metadata__"]["graph"] = text
            self.config["graph_sha256"] = digest_of(text)
        header = json.dumps(self.header).encode()
        (folder / "rank0.engine").write_bytes(struct.pack("<Q", len(header)) + header + self.data)
        (folder / "config.json").write_text(json.dumps(self.config))


def write_mutant(engine: Path, folder: Path, rng: random.Random) -> str:
    """Write a changed copy of an engine; gives the kind of change."""
    shutil.copytree(engine, folder)
    kind = rng.choices([*KINDS], [weight for weight, _ in KINDS.values()])[0]
    _, change = KINDS[kind]
    change(rng, folder)
    return kind


def _of_parts(*edits: Callable[[random.Random, Parts], None]) -> Callable[[random.Random, Path], None]:
    def change(rng: random.Random, folder: Path) -> None:
        parts = Parts.of(folder)
        for edit in edits:
            edit(rng, parts)
        parts.write(folder)

    return change


# ----- values


def hostile(rng: random.Random) -> Any:
    one = rng.choice([NAMES, NUMBERS])
    return rng.choice(
        [
            lambda: rng.choice(one),
            lambda: [rng.choice(one) for _ in range(rng.randrange(4))],
            lambda: {rng.choice(NAMES): rng.choice(one)},
            lambda: _nested(rng.choice([2, 10, 200])),
        ]
    )()


def _nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


def another(rng: random.Random, value: Any) -> Any:
    """A value near this one, or of another type altogether."""
    if rng.random() < 0.3:
        return hostile(rng)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return rng.choice([value + 1, value - 1, value * 2, value // 2, -value, rng.choice(NUMBERS)])
    if isinstance(value, float):
        return rng.choice([value * 2, -value, 0.0, 1, rng.choice(NUMBERS)])
    if isinstance(value, str):
        return rng.choice([rng.choice(NAMES), value + rng.choice(NAMES), value[:-1], rng.choice(sorted(DTYPES))])
    if isinstance(value, list) and value:
        changed = [*value]
        place = rng.randrange(len(changed))
        rng.choice([
            lambda: changed.__setitem__(place, another(rng, changed[place])), lambda: changed.pop(place),
            lambda: changed.insert(place, changed[place]), lambda: rng.shuffle(changed),
        ])()  # fmt: skip
        return changed
    return hostile(rng)


def edit_anywhere(rng: random.Random, values: Any) -> None:
    """Replace, remove, double or add something, somewhere in a JSON value."""
    owner = values
    while True:
        keys = list(owner) if isinstance(owner, dict) else list(range(len(owner)))
        if not keys:
            return
        key = rng.choice(keys)
        if not isinstance(owner[key], dict | list) or not owner[key] or rng.random() < 0.15:
            break
        owner = owner[key]
    match rng.randrange(6):
        case 0:
            del owner[key]
        case 1 if isinstance(owner, list):
            owner.insert(key, owner[key])
        case 1:
            owner[rng.choice(NAMES)] = owner[key]
        case _:
            owner[key] = another(rng, owner[key])


# ----- config.json and the header


def edit_config(rng: random.Random, parts: Parts) -> None:
    for _ in range(rng.randint(1, 3)):
        key = rng.choice([*parts.config])
        if isinstance(parts.config[key], dict | list) and rng.random() < 0.7:
            edit_anywhere(rng, parts.config[key])
        else:
            parts.config[key] = another(rng, parts.config[key])
        if rng.random() < 0.1:
            edit_anywhere(rng, parts.config)
        if not parts.config:
            return


def edit_header(rng: random.Random, parts: Parts) -> None:
    for _ in range(rng.randint(1, 3)):
        names = [name for name, entry in parts.header.items() if isinstance(entry, dict) and "shape" in entry]
        if not names or rng.random() < 0.2:
            edit_anywhere(rng, parts.header)
            continue
        entry = parts.header[rng.choice(names)]
        match rng.randrange(5):
            case 0:
                entry["dtype"] = rng.choice([*FILE_DTYPES, "F4", "U64", 1])
            case 1:
                rng.shuffle(entry["shape"]) if isinstance(entry["shape"], list) else None
            case 2:
                other = parts.header[rng.choice(names)]
                key = rng.choice(["shape", "dtype", "data_offsets"])
                entry[key], other[key] = other.get(key), entry.get(key)
            case _:
                edit_anywhere(rng, entry)


# ----- the graph


def edit_graph(rng: random.Random, parts: Parts) -> None:
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        with contextlib.suppress(KeyError, IndexError, TypeError, ValueError, AttributeError):  # of the edit before
            rng.choices([*_GRAPH_EDITS], [*_GRAPH_EDITS.values()])[0](rng, parts.graph)


def _op(rng: random.Random, graph: dict[str, Any]) -> None:
    node = rng.choice(graph["nodes"])
    mine = known_ops().get(node["op"])
    alike = [op.name for op in known_ops().values() if mine and len(op.tensor_arguments) == len(mine.tensor_arguments)]
    node["op"] = rng.choice(rng.choice([alike or NAMES, [*known_ops()], NAMES]))


def _attribute(rng: random.Random, graph: dict[str, Any]) -> None:
    node = rng.choice([node for node in graph["nodes"] if node.get("attributes")])
    name = rng.choice([*node["attributes"]])
    node["attributes"][name] = another(rng, node["attributes"][name])


def _input(rng: random.Random, graph: dict[str, Any]) -> None:
    node = rng.choice(graph["nodes"])
    place = rng.randrange(len(node["in"]))
    old = node["in"][place]
    alike = [name for name, kind in graph["types"].items() if kind == graph["types"].get(old)]
    node["in"][place] = rng.choice([rng.choice(alike or NAMES), rng.choice([*graph["types"]]), None, rng.choice(NAMES)])


def _arity(rng: random.Random, graph: dict[str, Any]) -> None:
    node, key = rng.choice(graph["nodes"]), rng.choice(["in", "out"])
    if rng.random() < 0.5:
        node[key].pop()
    else:
        node[key].append(rng.choice([*graph["types"], "more"]))


def _order(rng: random.Random, graph: dict[str, Any]) -> None:
    nodes = graph["nodes"]
    one, other = rng.randrange(len(nodes)), rng.randrange(len(nodes))
    match rng.randrange(4):
        case 0:
            del nodes[one]
        case 1:
            nodes[one], nodes[other] = nodes[other], nodes[one]
        case 2:
            nodes.insert(other, dict(nodes[one]))
        case 3:
            nodes.insert(other, nodes[one] | {"out": [f"copy_{one}.{i}" for i in range(len(nodes[one]["out"]))]})


def _new_node(rng: random.Random, graph: dict[str, Any]) -> None:
    """Any op on any values before it, and whoever reads a value like its own reads it."""
    nodes = graph["nodes"]
    place = rng.randrange(len(nodes) + 1)
    before = [*graph["inputs"], *graph["weights"], *(name for node in nodes[:place] for name in node["out"])]
    op = rng.choice([*known_ops().values()])
    inputs = [rng.choice([*before, None] if each.kind == "Tensor?" else before) for each in op.tensor_arguments]
    for index, argument in enumerate(op.tensor_arguments):
        expected = "step.logit_rows" if argument.name == "rows" else f"step.{argument.name}"
        if expected in graph["inputs"]:
            inputs[index] = expected
        elif argument.name == "kv":
            inputs[index] = rng.choice([name for name in graph["inputs"] if name.startswith("kv.")])
    number = rng.randrange(1000)
    outputs = [
        f"new_{number}.{index}" for index in range(rng.randint(1, 3) if op.num_outputs is None else op.num_outputs)
    ]
    attributes = {argument.name: _fresh(rng, argument) for argument in op.attributes}
    nodes.insert(place, {"op": op.name, "in": inputs, "out": outputs, "attributes": attributes})
    graph["types"] |= dict.fromkeys(outputs, graph["types"][rng.choice(before)])
    if outputs and place + 1 < len(nodes):
        reader = rng.choice(nodes[place + 1 :])
        reader["in"][rng.randrange(len(reader["in"]))] = outputs[0]


def _fresh(rng: random.Random, argument: Argument) -> Any:
    match argument.kind:
        case "float":
            return rng.choice([0.0, 1.0, -1.0, 1e-5, 1e30])
        case "bool":
            return rng.random() < 0.5
        case "str":
            return rng.choice(sorted(DTYPES))
        case "int[]":
            return [rng.choice([1, 8, 16, 32, 64]) for _ in range(rng.randint(1, 3))]
    return rng.choice([0, 1, 2, 3, 4, 8, 16, 32, 64, 2**20, 2**40, -1])


def _weight(rng: random.Random, graph: dict[str, Any]) -> None:
    name = rng.choice([*graph["weights"]])
    dtype, *shape = graph["weights"][name]
    match rng.randrange(4):
        case 0:
            dtype = rng.choice(sorted(DTYPES))
        case 1:
            rng.shuffle(shape)
        case 2:
            shape = another(rng, shape)
        case 3:
            shape[rng.randrange(len(shape))] = rng.choice(SIZES)
    graph["weights"][name] = graph["types"][name] = [dtype, *shape]


def _type(rng: random.Random, graph: dict[str, Any]) -> None:
    name = rng.choice([*graph["types"]])
    kind = another(rng, graph["types"][name])
    for owner in (graph["types"], graph["inputs"], graph["weights"]):
        if name in owner:
            owner[name] = kind


def _rename(rng: random.Random, graph: dict[str, Any]) -> None:
    """One value, everywhere."""
    old, new = json.dumps(rng.choice([*graph["types"]])), json.dumps(rng.choice([*NAMES, *graph["types"]]))
    changed = json.loads(json.dumps(graph).replace(old, new))
    graph.clear()
    graph.update(changed)


def _step_input(rng: random.Random, graph: dict[str, Any]) -> None:
    """An input that becomes a weight, or another input."""
    name = rng.choice([*graph["inputs"]])
    kind = [graph["inputs"][name][0], *rng.choices([1, 2, 4, 23, 64], k=len(graph["inputs"][name]) - 1)]
    if rng.random() < 0.5:
        del graph["inputs"][name]
        graph["weights"][name] = graph["types"][name] = kind
    else:
        new = rng.choice(NAMES)
        graph["inputs"][new] = graph["types"][new] = kind


_GRAPH_EDITS: dict[Callable[[random.Random, dict[str, Any]], None], int] = {
    _op: 3, _attribute: 5, _input: 5, _arity: 1, _order: 2, _new_node: 6, _weight: 4, _type: 2, _rename: 2,
    _step_input: 2, edit_anywhere: 2,
}  # fmt: skip


def make_agree(rng: random.Random, parts: Parts, keep_values: bool = False) -> None:
    """As far as the changed graph allows: values for its weights, its types as they come out, memory as planned."""
    with contextlib.suppress(Exception):
        _give_weights(rng, parts, keep_values)
        kinds = {name: ["float32"] for node in parts.graph["nodes"] for name in node["out"]}
        parts.graph["types"] = kinds | parts.graph["types"] | parts.graph["inputs"] | parts.graph["weights"]
        graph = graph_from_json(json.dumps(parts.graph))
        types = _types_so_far(graph)
        parts.graph["types"] |= {name: [kind.dtype, *kind.shape] for name, kind in types.items()}
        graph.types = types
        limits = {name: parts.config[name] for name in ("max_num_tokens", "max_batch_size")}
        parts.config["memory"] = plan_memory(graph, **limits)


def _types_so_far(graph: Graph) -> dict[str, TensorType]:
    """Of all values up to the first node that cannot be."""
    types = graph.inputs | graph.weights
    for node in graph.nodes:
        if problem_of_call(node) is not None:
            break
        try:
            types |= infer_node(node, types)
        except BuildError:
            break
    return types


def _give_weights(rng: random.Random, parts: Parts, keep_values: bool) -> None:
    stored = parts.header
    spans = {name: stored[name]["data_offsets"] for name in stored if name != "__metadata__"}
    metadata, data = stored["__metadata__"], bytearray()
    header: dict[str, Any] = {"__metadata__": metadata}
    names = {str(kind).removeprefix("torch."): name for kind, name in DTYPE_NAMES.items()}
    item_sizes = {str(kind).removeprefix("torch."): kind.itemsize for kind in DTYPE_NAMES}
    for name, (dtype, *shape) in parts.graph["weights"].items():
        size = math.prod(shape) * item_sizes[dtype]
        if size > MOST_BYTES:
            return
        begin, end = spans.get(name, (0, 0))
        old = parts.data[begin:end]
        is_whole = dtype.startswith(("int", "uint"))
        is_new = len(old) != size or (is_whole and not keep_values and rng.random() < 0.3)
        header[name] = {"dtype": names[dtype], "shape": shape, "data_offsets": [len(data), len(data) + size]}
        data += rng.randbytes(size) if is_new else old
    parts.header, parts.data = header, bytes(data)


# ----- bytes and files


def damage_bytes(rng: random.Random, folder: Path) -> None:
    path = folder / rng.choice(["config.json", "rank0.engine", "rank0.engine", "model.cache"])
    data = bytearray(path.read_bytes())
    for _ in range(rng.choice([1, 1, 2, 8])):
        place = int(rng.random() ** 2 * len(data))  # most damage is where the header is
        match rng.randrange(6):
            case 0:
                data[place : place + 1] = rng.randbytes(1)
            case 1:
                number = rng.choice([0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1, len(data)])
                place = rng.choice([0, place])
                data[place : place + 8] = struct.pack("<Q", number)
            case 2:
                del data[place:]
            case 3:
                data[place:place] = rng.randbytes(rng.randrange(1, 20))
            case 4:
                data += rng.randbytes(rng.randrange(1, 100))
            case 5:
                data[place : place + 1] = rng.choice(
                    [b'"', b"[" * 5000, b"{", b"]", b"\x00", b"\xff", b"9" * 5000, b",", b"e9"]
                )
    path.write_bytes(data)


def replace_file(rng: random.Random, folder: Path) -> None:
    path = folder / rng.choice(["config.json", "rank0.engine", "model.cache", "tokenizer"])
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    match rng.randrange(5):
        case 0:
            path.mkdir()
        case 1:
            os.mkfifo(path)
        case 2:
            path.write_bytes(b"")
        case _:
            targets = ["/dev/zero", "/dev/null", path.name, "..", "/proc/self/mem", "config.json", "rank0.engine"]
            path.symlink_to(rng.choice(targets))


KINDS: dict[str, tuple[int, Callable[[random.Random, Path], None]]] = {
    "config.json": (3, _of_parts(edit_config)),
    "header": (3, _of_parts(edit_header)),
    "graph": (4, _of_parts(edit_graph)),
    "graph, made to agree": (8, _of_parts(edit_graph, make_agree)),
    "graph and config.json, made to agree": (2, _of_parts(edit_config, edit_graph, make_agree)),
    "bytes": (3, damage_bytes),
    "files": (1, replace_file),
}
