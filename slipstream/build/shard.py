"""Tensor parallelism: the graph of one step becomes that of one rank, which has a part of the weights.

How each weight and each op is shared out is decided here and nowhere else, from the captured graph. Three things can be
said of a value of a rank: it is whole (the same on all ranks), it is split (the rank has some of its columns), or it is
partial (the sum over the ranks is the value). The rules, after Megatron-LM (arXiv:1909.08053):

    linear        of a whole x whose columns may be split: some of its rows; gives a split value
                  of a split x: the columns of the weight that belong to it; gives a partial value, the bias on rank 0
    attention     whole heads: those of the query, and the KV heads that they read, which several ranks may share
    experts       of each expert some of its intermediate columns, or else some experts whole; gives a partial value
    embedding     some of the rows of the table; gives a partial value
    head          some of the vocabulary, joined again at the end
    what works column by column (activations, rope, products of two split values) leaves a value split

A linear is split where all that read it can go on with its columns: attention, the next linear, the end. Wherever an op
needs what is not there, the value is made whole before it: partial ones are added up (all_reduce), split ones are put
together (all_gather). So a model of a user's own is right whatever it does, and split where its parts are the usual.
Nothing here knows of fused or packed products: fusions and lowering come after, on the rank's own graph.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

from slipstream.build.cuts import Cut, cut_format
from slipstream.build.rewrite import NewNames
from slipstream.engine.graph import Attribute, Graph, Node
from slipstream.engine.shapes import infer_types
from slipstream.errors import BuildError

Range = tuple[int, int]

ONE_GROUP_SIZE = {"nvfp4a16"}  # formats whose groups cannot be made smaller

_ELEMENTWISE = {"silu", "gelu", "scale", "soft_cap"}
_BY_HEADS = {"rope", "rope_pairs"}
_NORMS = {"rms_norm", "layer_norm"}


@dataclass(frozen=True)
class Split:
    """How the columns of a value are shared out: a range of `units` for each rank; a unit is a head, or a column.

    order_of: the weight in act-order (build/cuts.py) that reads these columns, which counts them.
    """

    ranges: tuple[Range, ...]
    units: int
    order_of: str = ""

    @property
    def is_shared(self) -> bool:
        """Whether ranks have units in common: KV heads, where there are more ranks than those."""
        return sum(stop - start for start, stop in self.ranges) > self.units


@dataclass(frozen=True)
class Partial:
    pass


State = Split | Partial | None  # None: whole


class Shard:
    name = "shard"
    benefit = "each rank has a part of the weights, and computes a part of each product"

    def __init__(self, rank: int, size: int, moe_ep_size: int = 1) -> None:
        """moe_ep_size: 1, or `size` where experts are shared out whole."""
        self.rank, self.size, self._has_whole_experts = rank, size, moe_ep_size > 1
        self.cuts: dict[str, Cut] = {}  # of the weights that a rank has in part
        self.kv_heads: dict[str, Range] = {}  # of the caches that it has in part

    def run(self, graph: Graph) -> int:
        """How many weights are shared out."""
        sharding = _Sharding(graph, self.rank, self.size, has_whole_experts=self._has_whole_experts)
        for node in list(graph.nodes):
            sharding.add(node)
        sharding.finish()
        self.cuts, self.kv_heads = sharding.cuts, sharding.kv_heads
        return len(self.cuts)


class _Sharding:
    def __init__(self, graph: Graph, rank: int, size: int, *, has_whole_experts: bool) -> None:
        self.cuts: dict[str, Cut] = {}
        self.kv_heads: dict[str, Range] = {}
        self._graph, self._rank, self._size = graph, rank, size
        self._whole = dict(graph.types)  # types before anything is split
        self._users, self._producers = graph.users(), graph.producers()
        self._new_names = NewNames(graph.types)
        self._nodes: list[Node] = []
        self._states: dict[str, State] = {}
        self._made_whole: dict[str, str] = {}  # a value → what it is after its parts have met
        self._read_whole: set[str] = set()  # weights
        self._query_heads = {
            str(node.inputs[1]): int(self._columns(node.inputs[0])) // int(self._whole[str(node.inputs[1])].shape[4])
            for node in graph.nodes
            if node.op == "attention"
        }  # by the cache that they attend to
        self._rules: dict[str, Callable[[Node], None]] = {
            "linear": self._add_linear,
            "attention": self._add_attention,
            "kv_write": self._add_kv_write,
            "experts": self._add_whole_experts if has_whole_experts else self._add_experts,
            "embedding": self._add_embedding,
            "head_linear": self._add_head_linear,
            "join_heads": self._add_join_heads,
            "mul": self._add_pair,
            "add": self._add_pair,
            "normalize_rows": self._keep,
            **dict.fromkeys(_ELEMENTWISE, self._add_elementwise),
            **dict.fromkeys(_BY_HEADS | _NORMS, self._add_by_heads),
        }

    def add(self, node: Node) -> None:
        self._rules.get(node.op, self._add_whole)(node)

    def finish(self) -> None:
        graph = self._graph
        graph.outputs = tuple(self._in_one(name) for name in graph.outputs)
        for name in self._read_whole & self.cuts.keys():
            raise BuildError(
                f"{name} is read in two ways of which only one can be shared out over ranks; build with --tp_size 1."
            )
        for name, cut in self.cuts.items():
            shape, kind = self._shape(name), self._whole[name]
            size = (cut.stop - cut.start,)
            graph.weights[name] = replace(kind, shape=(*shape[: cut.dim], *size, *shape[cut.dim + 1 :]))
            if name in graph.formats:
                graph.formats[name] = cut_format(graph.formats[name], shape, cut)
        graph.equal = {
            name: kept for name, kept in graph.equal.items() if self.cuts.get(name) == self.cuts.get(kept)
        }  # fmt: skip
        graph.nodes[:] = self._nodes
        graph.types = infer_types(graph)

    # --- ops ---

    def _add_whole(self, node: Node) -> None:
        """An op that is computed on every rank alike."""
        inputs = tuple(name and self._in_one(name) for name in node.inputs)
        self._read_whole |= {name for name in inputs if name in self._graph.weights}
        self._nodes.append(replace(node, inputs=inputs))

    def _keep(self, node: Node) -> None:
        """Rows of a weight on their way to a linear, which decides what becomes of them."""
        self._nodes.append(node)

    def _add_linear(self, node: Node) -> None:
        (x, weight, bias), (output,) = node.inputs, node.outputs
        state = self._state(x)
        if isinstance(state, Split) and self._can_take(state, str(weight)):
            self._cut(str(weight), 1, self._columns_of(str(x), state), state.order_of)
            here = bias if self._rank == 0 else None
            self._nodes.append(replace(node, inputs=(x, weight, here)))
            self._states[output] = Partial()
            return
        wanted, stored = self._wanted(output), self._stored(str(weight))
        if wanted is None or stored is None:
            self._read_whole |= {name for name in (stored, bias) if name in self._graph.weights}
            inputs = (self._in_one(str(x)), weight, bias)
            self._nodes.append(replace(node, inputs=inputs))
            return
        rows = self._columns_of(output, wanted)
        for name in (stored, bias):
            if name is not None:
                self._cut(name, 0, rows, wanted.order_of)
        self._nodes.append(replace(node, inputs=(self._in_one(str(x)), weight, bias)))
        self._states[output] = wanted

    def _can_take(self, state: Split, weight: str) -> bool:
        """Whether a linear of this weight reads its columns as they are split."""
        formats = self._graph.formats
        if weight not in self._graph.weights or state.is_shared:
            return False
        order = formats[weight].order if weight in formats else ""
        expected = formats[state.order_of].order if state.order_of else ""
        return order == expected and self._leaves_groups(state, weight)

    def _leaves_groups(self, state: Split, weight: str) -> bool:
        """Whether no rank would have groups of another size than the weight's format can have."""
        format, shape = self._graph.formats.get(weight), self._shape(weight)
        if format is None or format.kind not in ONE_GROUP_SIZE:
            return True
        unit = shape[1] // state.units
        cuts = (Cut(1, start * unit, stop * unit) for start, stop in state.ranges)
        return all(cut_format(format, shape, cut) == format for cut in cuts)

    def _add_attention(self, node: Node) -> None:
        q, kv, *step, slopes, sinks, scales = node.inputs
        heads, _ = self._heads(str(kv))
        for name in (slopes, sinks):
            if name is not None and heads is not None:
                self._cut(name, 0, heads.ranges[self._rank])
        self._nodes.append(replace(node, inputs=(self._as(str(q), heads), kv, *step, slopes, sinks, scales)))
        self._states[node.outputs[0]] = heads

    def _add_kv_write(self, node: Node) -> None:
        k, v, kv, *rest = node.inputs
        _, heads = self._heads(str(kv))
        if heads is not None:
            kind = self._whole[str(kv)]
            start, stop = self.kv_heads[str(kv)] = heads.ranges[self._rank]
            self._graph.inputs[str(kv)] = replace(kind, shape=(*kind.shape[:3], stop - start, kind.shape[4]))
        planes = (name and self._as(name, heads) for name in (k, v))
        self._nodes.append(replace(node, inputs=(*planes, kv, *rest)))

    def _add_experts(self, node: Node) -> None:
        x, shares, ids, gate, up, down, gate_bias, up_bias, down_bias = node.inputs
        weights, routed = (str(gate), str(up), str(down)), (self._in_one(str(x)), shares, ids)
        formats = self._graph.formats
        if any(name in formats and formats[name].order for name in weights):
            for name in weights:
                formats.pop(name, None)  # experts in act-order run dense (build/lower.py)
        split = self._by_columns(str(down))
        if split is None or any(name not in self._graph.weights for name in weights):
            self._add_whole(node)
            return
        columns = split.ranges[self._rank]
        self._cut(str(down), 2, columns)
        for name in weights[:2]:  # one op has them all: in one format (build/lower.py)
            self._cut(name, 1, columns, like=self._groups_of(str(down)))
        for bias in (gate_bias, up_bias):
            if bias is not None:
                self._cut(bias, 1, columns)
        here = down_bias if self._rank == 0 else None
        self._nodes.append(replace(node, inputs=(*routed, *weights, gate_bias, up_bias, here)))
        self._states[node.outputs[0]] = Partial()

    def _add_whole_experts(self, node: Node) -> None:
        """A rank's experts alone, over all tokens: what the others have adds nothing here."""
        x, shares, ids, *weights = node.inputs
        num_experts = self._shape(str(weights[0]))[0]
        if num_experts < self._size or any(name not in self._graph.weights for name in weights[:3]):
            raise BuildError(f"moe_ep_size is {self._size}, but a layer has {num_experts} experts; lower it.")
        start, stop = self._evenly(num_experts)[self._rank]
        for name in weights:
            if name is not None:
                self._cut(name, 0, (start, stop))
        (here,) = self._new_names.of("local_experts", 1)
        self._nodes.append(Node("local_experts", (ids,), (here,), {"first": start, "count": stop - start}))
        self._nodes.append(replace(node, inputs=(self._in_one(str(x)), shares, here, *weights)))
        self._states[node.outputs[0]] = Partial()

    def _add_embedding(self, node: Node) -> None:
        table, ids = (str(name) for name in node.inputs)
        if ids != "step.token_ids" or table not in self._graph.weights or self._shape(table)[0] < self._size:
            self._add_whole(node)
            return
        rows = self._evenly(self._shape(table)[0])[self._rank]
        self._cut(table, 0, rows)
        self._nodes.append(Node("embedding_part", node.inputs, node.outputs, {"first": rows[0]}))
        self._states[node.outputs[0]] = Partial()

    def _add_head_linear(self, node: Node) -> None:
        weight, state = node.inputs[1], self._state(node.inputs[0])
        if not isinstance(state, Split) or state.units != node.attributes["num_heads"]:
            self._add_whole(node)
            return
        start, stop = state.ranges[self._rank]
        rows = self._shape(str(weight))[0] // state.units
        self._cut(str(weight), 0, (start * rows, stop * rows))
        self._nodes.append(replace(node, attributes=node.attributes | {"num_heads": stop - start}))
        self._states[node.outputs[0]] = state

    def _add_join_heads(self, node: Node) -> None:
        state, other = (self._state(name) for name in node.inputs)
        if not isinstance(state, Split) or state != other or state.units != node.attributes["num_heads"]:
            self._add_whole(node)
            return
        start, stop = state.ranges[self._rank]
        self._nodes.append(replace(node, attributes=node.attributes | {"num_heads": stop - start}))
        self._states[node.outputs[0]] = state

    def _add_pair(self, node: Node) -> None:
        """Sums and products of split values; sums of partial ones that nobody else reads, to add them up once."""
        state, other = (self._state(name) for name in node.inputs)
        is_last = all(self._users[str(name)] == [node] for name in node.inputs)
        if state is None or state != other or (state == Partial() and (node.op == "mul" or not is_last)):
            self._add_whole(node)
            return
        self._nodes.append(node)
        self._states[node.outputs[0]] = state

    def _add_elementwise(self, node: Node) -> None:
        state = self._state(node.inputs[0])
        if state == Partial() and node.op != "scale":
            self._add_whole(node)
            return
        self._nodes.append(node)
        self._states[node.outputs[0]] = state

    def _add_by_heads(self, node: Node) -> None:
        x = str(node.inputs[0])
        state = self._state(x)
        if not isinstance(state, Split) or self._columns(x) // state.units % self._head_size(node):
            self._add_norm_of_heads(node)
            return
        self._read_whole |= {name for name in node.inputs if name in self._graph.weights}
        self._nodes.append(node)
        self._states[node.outputs[0]] = state

    def _add_norm_of_heads(self, node: Node) -> None:
        """A norm over all heads at once is computed whole; each rank goes on with its own heads."""
        (output,) = node.outputs
        wanted = self._wanted(output) if node.op in _NORMS else None
        if wanted is None or wanted.units == self._columns(output):
            self._add_whole(node)
            return
        whole = self._new_names.of(node.op, 1)
        self._add_whole(replace(node, outputs=whole))
        self._take(whole[0], self._columns_of(output, wanted), self._columns(output), output)
        self._states[output] = wanted

    # --- values ---

    def _in_one(self, name: str) -> str:
        """The whole of a value, on every rank."""
        state = self._states.get(name)
        if state is None:
            return name
        if name not in self._made_whole:
            if isinstance(state, Partial):
                self._made_whole[name] = self._make("all_reduce", name, {})
            else:
                if state.is_shared or state.order_of:
                    raise BuildError(f"{name} has no order in which ranks could put it together; use --tp_size 1.")
                unit = self._columns(name) // state.units
                sizes = [(stop - start) * unit for start, stop in state.ranges]
                self._made_whole[name] = self._make("all_gather", name, {"sizes": sizes})
        return self._made_whole[name]

    def _as(self, name: str, wanted: Split | None) -> str:
        """A value split as wanted; one that is not is made whole, and each rank takes its columns."""
        if wanted is None:
            return self._in_one(name)
        if self._states.get(name) == wanted:
            return name
        (output,) = self._new_names.of("part", 1)
        self._take(self._in_one(name), self._columns_of(name, wanted), self._columns(name), output)
        return output

    def _take(self, whole: str, part: Range, num_columns: int, output: str) -> None:
        """These columns of a value that is whole, as views of it."""
        sizes = {"before": part[0], "here": part[1] - part[0], "after": num_columns - part[1]}
        sizes = {where: size for where, size in sizes.items() if size}
        outputs = tuple(output if where == "here" else self._new_names.of("rest", 1)[0] for where in sizes)
        self._nodes.append(Node("split", (whole,), outputs, {"sizes": list(sizes.values())}))

    def _make(self, op: str, name: str, attributes: dict[str, Attribute]) -> str:
        (output,) = self._new_names.of(op, 1)
        self._nodes.append(Node(op, (name,), (output,), attributes))
        return output

    def _state(self, name: str | None) -> State:
        return self._states.get(str(name))

    def _columns(self, name: str | None) -> int:
        return int(self._whole[str(name)].shape[1])

    def _columns_of(self, name: str, split: Split) -> Range:
        """This rank's columns of a value that is split."""
        unit = self._columns(name) // split.units
        start, stop = split.ranges[self._rank]
        return start * unit, stop * unit

    # --- weights ---

    def _shape(self, weight: str) -> tuple[int, ...]:
        return tuple(int(size) for size in self._whole[weight].shape)

    def _stored(self, name: str) -> str | None:
        """The weight behind the operand of a linear; None where its rows are not that weight's."""
        maker = self._producers.get(name)
        if maker is not None and maker.op == "normalize_rows":
            return self._stored(str(maker.inputs[0]))
        return name if name in self._graph.weights else None

    def _groups_of(self, weight: str) -> tuple[int, int] | None:
        """group_size and input_group_size of a weight that was cut."""
        format = self._graph.formats.get(weight)
        if format is None:
            return None
        format = cut_format(format, self._shape(weight), self.cuts[weight])
        return format.group_size, format.input_group_size

    def _cut(
        self, weight: str, dim: int, part: Range, order_of: str = "", like: tuple[int, int] | None = None
    ) -> None:  # fmt: skip
        cut = Cut(dim, *part, order_of, like)
        if self.cuts.setdefault(weight, cut) != cut:
            raise BuildError(
                f"{weight} is read in two ways that share it out differently over ranks; build with --tp_size 1."
            )

    # --- how values are to be split ---

    def _wanted(self, value: str) -> Split | None:
        """How all that read a value can take its columns; None where one cannot, or where they differ."""
        if value in self._graph.outputs:
            is_logits = value == self._graph.outputs[0] and value not in self._users
            return self._evenly_split(self._columns(value)) if is_logits else None
        found = {self._wanted_by(node, value) for node in self._users.get(value, [])}
        return found.pop() if len(found) == 1 else None

    def _wanted_by(self, node: Node, value: str) -> Split | None:
        x = node.inputs[0]
        if node.op == "kv_write":
            return self._heads(str(node.inputs[2]))[1] if value in node.inputs[:2] else None
        if node.op == "attention":
            return self._heads(str(node.inputs[1]))[0]
        if node.op == "linear":
            return self._by_columns(str(node.inputs[1])) if value == x else None
        if node.op in _NORMS:
            # One over all heads (OLMo 2) is computed whole: the weights before it are shared out all the same.
            found = self._wanted(node.outputs[0])
            is_by_heads = found is not None and found.units < self._columns(value) and not found.is_shared
            return found if is_by_heads or self._head_size(node) < self._columns(value) else None
        if node.op in _ELEMENTWISE | _BY_HEADS | {"mul", "head_linear", "join_heads"}:
            return self._wanted(node.outputs[0])
        return None

    def _head_size(self, node: Node) -> int:
        """Columns that an op of heads computes together."""
        if node.op == "rope":
            return int(str(node.attributes["head_dim"]))
        return self._shape(str(node.inputs[1]))[0] if node.op in _NORMS else 2 * self._columns(node.inputs[1])

    def _heads(self, kv: str) -> tuple[Split | None, Split | None]:
        """How the heads of queries, and those of a cache, are shared out; None for a cache with one head."""
        readers = {node.op for node in self._users[kv]}
        if readers != {"attention", "kv_write"}:  # an op of a user's own, which may need all heads
            return None, None
        num_heads, num_kv_heads = self._query_heads[kv], int(self._whole[kv].shape[3])
        queries, keys = head_ranges(num_heads, num_kv_heads, self._size)
        return Split(tuple(queries), num_heads), Split(tuple(keys), num_kv_heads) if num_kv_heads > 1 else None

    def _by_columns(self, weight: str) -> Split | None:
        """How the columns of a weight are shared out: evenly, but through no group that shares a scale if possible."""
        if weight not in self._graph.weights:
            return None
        width, format = self._shape(weight)[-1], self._graph.formats.get(weight)
        if format is None:
            return self._evenly_split(width)
        unit = math.lcm(format.group_size or 1, format.input_group_size or 1)
        if -(-width // unit) < self._size:
            unit = 8 // format.bits
        if width < unit * self._size or (format.kind in ONE_GROUP_SIZE and unit != format.group_size):
            return None
        ranges = tuple(
            (start * unit, min(stop * unit, width)) for start, stop in self._evenly(-(-width // unit))
        )  # fmt: skip
        return Split(ranges, width, weight if format.order else "")

    def _evenly_split(self, size: int) -> Split | None:
        return Split(self._evenly(size), size) if size >= self._size else None

    def _evenly(self, size: int) -> tuple[Range, ...]:
        ends = [rank * size // self._size for rank in range(self._size + 1)]
        return tuple(pairwise(ends))


def head_ranges(num_heads: int, num_kv_heads: int, size: int) -> tuple[list[Range], list[Range]]:
    """For each rank its heads of queries and of keys and values.

    KV heads go whole to one rank, with the queries that read them; more ranks than these share them evenly. Raises
    BuildError where that cannot be.
    """
    if not _can_share(num_heads, num_kv_heads, size):
        sizes = [str(each) for each in range(1, num_heads + 1) if _can_share(num_heads, num_kv_heads, each)]
        raise BuildError(
            f"tp_size is {size}, but {num_heads} heads, with {num_kv_heads} of keys and values, cannot be shared out "
            f"over so many ranks; it must be {', '.join(sizes)}."
        )
    if size > num_kv_heads:
        each, group = num_heads // size, size // num_kv_heads
        return [(r * each, (r + 1) * each) for r in range(size)], [(r // group, r // group + 1) for r in range(size)]
    ends, queries = [rank * num_kv_heads // size for rank in range(size + 1)], num_heads // num_kv_heads
    of_cache = list(pairwise(ends))
    return [(start * queries, stop * queries) for start, stop in of_cache], of_cache


def _can_share(num_heads: int, num_kv_heads: int, size: int) -> bool:
    return size <= num_kv_heads or (size % num_kv_heads == 0 and num_heads % size == 0)
