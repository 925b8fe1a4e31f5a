"""Drafts of EAGLE's layer, which goes on where the model's own layers end: from its hidden states (head.py).

    place              0      1      2      3     the model's KV
    token              the    cat    sat    on  │ …
    hidden states      f0     f1     f2         │         of tokens that the model has computed
    row of the layer   f0,cat f1,sat f2,on      │         its KV, in the same blocks at the same places
                              says what may follow "on" ┴ f3', with each of these: the next level of the tree (trees.py)

The layer's KV lies in blocks of the same numbers as the model's: what is shared, copied, given up or found again there
is so here. A row holds the token after its own, so of a prefix that is found the last token is computed again (where
two texts part at the border of a block, its last row is that of the first one; drafts may be wrong, texts not). Of a
prompt only keys and values are computed. Nodes of a tree lie beyond the text's end, in what is left of its last block
and in blocks of the slot's own; the next rows overwrite them.

Shape suffixes: S sequences, T rows of a step, N any rows, H hidden size, Z, X and Y as in head.py, B blocks, M nodes of
a tree, W a level's, K ranks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from slipstream.engine.shared import head_of_tokens, products_in_bytes
from slipstream.errors import UsageError
from slipstream.kernels.activation import silu_and_mul
from slipstream.kernels.attention.paged import kv_write
from slipstream.kernels.attention.tree import WORD, tree_attention
from slipstream.kernels.largest import largest
from slipstream.kernels.linear.dense import linear
from slipstream.kernels.norm import add_rms_norm, rms_norm
from slipstream.kernels.registry import Op
from slipstream.kernels.rope import rope, rope_cos_sin, rope_kv_write
from slipstream.schema.speculative import MAX_DRAFT_LEN, Speculation
from slipstream.speculative.choices import fitting, read_choices
from slipstream.speculative.drafter import (
    Computed,
    DraftTensors,
    Ends,
    LayerDrafter,
    OwnKV,
    Running,
    Target,
    read_options,
)
from slipstream.speculative.eagle.head import Ops, Sizes, load
from slipstream.speculative.eagle.trees import Growing, Grown, Trees, Written, width_for
from slipstream.speculative.head_file import head_folder

MAX_TREE = 32


@dataclass(frozen=True)
class Options:
    model: str = ""  # a folder of an EAGLE head; by default the one that ships for the target
    choices: str = ""  # [[0], [0, 0], [1], ...] as JSON, or a file of it: a tree that does not grow
    depth: int = 5  # of one that grows, and
    width: int = 0  # how many of its likeliest ways go on at each level, and are looked at behind each node


class _Outline:
    """Of trees, what follows from their levels alone."""

    def __init__(self, trees: Trees, device: torch.device) -> None:
        self.trees = trees
        widths_L = torch.tensor(trees.widths, device=device)
        self.ends_L = widths_L.cumsum(0)
        self.depths_M = torch.arange(len(widths_L), device=device).repeat_interleave(widths_L)
        self.own_bits = _own_bits(trees.num_nodes, device)


@dataclass
class _Forest:
    """A tree a sequence, as far as it is computed: the first num_nodes nodes."""

    trees: Trees
    roots: Tensor  # [S] places
    block_tables: Tensor  # [S, B]
    starts: Tensor  # [levels, S + 1] of each tree's rows, where the last are of that level
    lengths: Tensor  # [levels, S] of each text, and of its tree as far as that level
    slots: Tensor  # [S, M] of keys and values
    positions: Tensor  # [S, M] in the text
    rotations: tuple[Tensor, Tensor]  # [S, M, half of a head] each: cosines and sines
    masks: Tensor  # [S, M, words] of tree_attention; until a node is there, its own bit alone
    queries: Tensor  # [S, M, X]
    token_ids: Tensor  # [S, M, K] of children, as Grown has them
    scores: Tensor  # [S, M, K]
    num_nodes: int = 0


class Drafter(LayerDrafter):
    default_draft_len = 24
    can_branch = True

    def __init__(self, speculation: Speculation, target: Target) -> None:
        super().__init__(speculation, target)
        options, manifest = read_options(Options, speculation), target.manifest
        sizes = Sizes(manifest.hidden_size, manifest.vocab_size, manifest.num_layers, target.max_seq_len)
        self._device, self._dtype = target.device, getattr(torch, manifest.dtype)
        self._num_rows = target.max_batch_size + 1  # of what is kept for each slot; the last is of no text
        self._last: list[Tensor] = []  # of each slot the last row, as Head.enter gives it: what drafts come after
        folder = head_folder("eagle", options.model, manifest.name)
        self._head = load(
            folder, sizes, self._dtype, target.device,
            lambda token_ids_D: head_of_tokens(target.engine, token_ids_D, self._dtype, target.device),
            OPS._replace(to_product=products_in_bytes(target.engine, target.device) or OPS.to_product),
        )  # fmt: skip
        self._config = config = self._head.config
        self._trees = self._make_trees(options)
        self.max_draft_len = self._trees.num_drafts
        self.reads_hidden = config.hidden_layers
        self.own_kv = (OwnKV(2, config.num_kv_heads, config.head_dim, self._dtype),)
        self.num_beyond = self._trees.num_nodes - 1
        self._outlines = {self.max_draft_len: _Outline(self._trees, target.device)}  # by drafts of each sequence
        self._inv_freq = config.inv_freq.to(target.device)
        self._block_size = manifest.tokens_per_block

    def _make_trees(self, options: Options) -> Trees:
        num_ids = self._config.num_drafted_ids
        if options.choices:
            choices = fitting(read_choices(options.choices), MAX_DRAFT_LEN, num_ids)
            return Written(choices[: self.max_draft_len], self._device)
        for name, value in (("depth", options.depth), ("width", options.width)):
            if value > MAX_TREE:
                raise UsageError(f"speculative has {name} {value}; it must be at most {MAX_TREE}.")
        width = min(options.width or width_for(self.max_draft_len, options.depth), num_ids)
        return Growing(width, options.depth, self.max_draft_len)

    def attach(self, running: Running) -> None:
        self._running = running

    def lend_blocks(self, window: int) -> None:
        self._window = window

    def take_kv(self, kv: Sequence[Tensor], num_blocks: int) -> None:
        (self._kv,), self._num_shared = kv, num_blocks

    @torch.inference_mode()
    def follow(self, computed: Computed) -> None:
        """Keys and values of the step's rows."""
        embedded_TH = self._embed(computed.next_ids.clamp(min=0))
        x_TZ, residual_TH = self._head.enter(embedded_TH, self._head.read(computed.hidden))
        self._write(x_TZ, self._rotation(computed.places), computed.kv_slots)
        if not self._last:
            self._last = [x.new_zeros(self._num_rows, x.shape[1]) for x in (x_TZ, residual_TH)]
        for last, rows in zip(self._last, (x_TZ, residual_TH), strict=True):
            last[computed.slots] = rows[computed.last]

    @torch.inference_mode()
    def draft(self, ends: Ends, most: int) -> DraftTensors:
        assert ends.block_tables is not None
        if most not in self._outlines:
            self._outlines[most] = _Outline(self._trees.narrowed(most), self._device)
        outline = self._outlines[most]
        trees = outline.trees
        forest = self._plant(outline, (ends.positions - 1).clamp(min=0), ends.block_tables, ends.slots)
        x_NZ, residual_NH = (last[ends.slots] for last in self._last)
        levels = list[Tensor]()
        while True:
            first = forest.num_nodes
            hidden_SWH = self._compute(forest, len(levels), x_NZ, residual_NH)
            grown = Grown(first, forest.num_nodes, forest.token_ids, forest.scores)
            is_deepest = len(levels) + 1 == most  # so few do not reach further
            level = None if is_deepest else trees.level(len(levels), grown)
            if level is None:
                return trees.drafts(grown, levels)
            x_NZ, residual_NH = self._descend(forest, first, level, hidden_SWH)
            levels.append(level)

    def _plant(self, outline: _Outline, roots_S: Tensor, tables_SB: Tensor, slots_S: Tensor) -> _Forest:
        """Trees whose roots are rows that are computed, at these places."""
        trees, num_trees = outline.trees, len(slots_S)
        num_nodes, num_ranks = trees.num_nodes, trees.num_ranks
        tables_SB = tables_SB.where(slots_S[:, None] >= 0, 0)  # what is no text writes into the null block
        tables_SB = self._with_blocks_ahead(roots_S, tables_SB, slots_S)
        places_SM = roots_S[:, None] + torch.arange(num_nodes, device=self._device)
        blocks_SM = tables_SB.gather(1, places_SM // self._block_size)

        positions_SM = roots_S[:, None] + outline.depths_M
        cos, sin = self._rotation(positions_SM.flatten())

        def empty(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(num_trees, num_nodes, *shape, dtype=dtype, device=self._device)

        return _Forest(
            trees=trees,
            roots=roots_S,
            block_tables=tables_SB,
            starts=torch.outer(outline.ends_L, torch.arange(num_trees + 1, device=self._device)),
            lengths=outline.ends_L[:, None] + roots_S,
            slots=blocks_SM * self._block_size + places_SM % self._block_size,
            positions=positions_SM,
            rotations=(cos.unflatten(0, (num_trees, -1)), sin.unflatten(0, (num_trees, -1))),
            masks=outline.own_bits.repeat(num_trees, 1, 1),
            queries=empty(self._config.num_heads * self._config.head_dim, dtype=self._dtype),
            token_ids=empty(num_ranks),
            scores=empty(num_ranks, dtype=torch.float32),
        )

    def _with_blocks_ahead(self, roots_S: Tensor, tables_SB: Tensor, slots_S: Tensor) -> Tensor:
        """Behind each root's block those that are its slot's own."""
        num_ahead = -(-self.num_beyond // self._block_size)
        places_B = torch.arange(tables_SB.shape[1] + num_ahead, device=self._device)
        ahead_SB = places_B - roots_S[:, None] // self._block_size - 1
        own_SB = self._num_shared + slots_S[:, None] % self._num_rows * num_ahead + ahead_SB.clamp(max=num_ahead - 1)
        return own_SB.where(ahead_SB >= 0, functional.pad(tables_SB, (0, num_ahead)))

    def _compute(self, forest: _Forest, depth: int, x_NZ: Tensor, residual_NH: Tensor) -> Tensor:
        """The next nodes of each tree, all of one depth: their children. -> hidden states [S, W, H]"""
        num_trees, first = len(forest.roots), forest.num_nodes
        forest.num_nodes = end = first + len(x_NZ) // num_trees
        cos, sin = (each[:, first:end].flatten(0, 1) for each in forest.rotations)
        if depth:
            q_NX, k_NY, v_NY = self._head.queries_keys_values(x_NZ)
            q_NX = _run(rope_kv_write, q_NX, k_NY, v_NY, cos, sin, self._kv, forest.slots[:, first:end].flatten(), None)
        else:
            q_NX = _run(rope, self._head.queries(x_NZ), cos, sin, self._config.head_dim)
        forest.queries[:, first:end] = q_NX.view(num_trees, end - first, -1)
        # All nodes so far ask, since the op takes a tree whole; the answers to those before are not looked at.
        attended_NX = _run(
            tree_attention, forest.queries[:, :end].flatten(0, 1), self._kv,
            forest.starts[depth], forest.lengths[depth], forest.block_tables,
            forest.positions[:, :end].flatten(), forest.roots, forest.masks[:, :end].flatten(0, 1), None, None, None,
            self._config.head_dim**-0.5, self._window, 0.0, self._config.head_dim,
        )  # fmt: skip
        attended_SMX = attended_NX.view(num_trees, end, -1)
        hidden_NH = self._head.leave(attended_SMX[:, first:].flatten(0, 1), residual_NH)
        logits_ND = self._head.logits(hidden_NH, self._running.head)
        scores_NK, drafted_NK = largest(logits_ND.log_softmax(1, torch.float32), forest.trees.num_ranks)
        forest.token_ids[:, first:end] = self._head.token_ids(drafted_NK).view(num_trees, end - first, -1)
        forest.scores[:, first:end] += scores_NK.view(num_trees, end - first, -1)
        return hidden_NH.view(num_trees, end - first, -1)

    def _descend(self, forest: _Forest, first: int, children_SW: Tensor, hidden_SWH: Tensor) -> tuple[Tensor, Tensor]:
        """What the nodes of the next level are made of. first: of those of this one, whose hidden states these are."""
        begin, end = forest.num_nodes, forest.num_nodes + children_SW.shape[1]
        parents_SW = children_SW // forest.trees.num_ranks
        forest.scores[:, begin:end] = forest.scores.flatten(1).gather(1, children_SW)[:, :, None]
        above_SWW = parents_SW[:, :, None].expand(-1, -1, forest.masks.shape[2])
        forest.masks[:, begin:end] |= forest.masks.gather(1, above_SWW)
        places_SWH = (parents_SW - first)[:, :, None].expand(-1, -1, hidden_SWH.shape[2])
        token_ids_SW = forest.token_ids.flatten(1).gather(1, children_SW)
        return self._head.enter(self._embed(token_ids_SW.flatten()), hidden_SWH.gather(1, places_SWH).flatten(0, 1))

    def _embed(self, token_ids_N: Tensor) -> Tensor:
        table = self._head.embedding
        return self._running.embed(token_ids_N) if table is None else functional.embedding(token_ids_N, table)

    def _rotation(self, places_N: Tensor) -> tuple[Tensor, Tensor]:
        return _run(rope_cos_sin, places_N, self._inv_freq, self._config.rope_scale)

    def _write(self, x_NZ: Tensor, rotation: tuple[Tensor, Tensor], slots_N: Tensor) -> None:
        k_NY, v_NY = self._head.keys_values(x_NZ)
        _run(kv_write, _run(rope, k_NY, *rotation, self._config.head_dim), v_NY, self._kv, slots_N, None)


def _own_bits(num_nodes: int, device: torch.device) -> Tensor:
    """[1, M, words] of each node its own bit among those of tree_attention's masks."""
    nodes_M = torch.arange(num_nodes, device=device)
    bits_1MW = torch.zeros(1, num_nodes, -(-num_nodes // WORD), dtype=torch.int64, device=device)
    bits_1MW[0, nodes_M, nodes_M // WORD] = 1 << nodes_M % WORD
    return bits_1MW


def _run(op: Op, x: Tensor, *rest: Any) -> Any:
    return _newest(op, x.device, x.dtype if x.is_floating_point() else torch.float32)(x, *rest)


@cache
def _newest(op: Op, device: torch.device, dtype: torch.dtype) -> Callable[..., Any]:
    """The newest kernel that runs there."""
    return list(op.candidates(device, dtype).values())[-1].function


OPS = Ops(
    to_product=lambda weight_NK, bias_N: lambda x_MK: _run(linear, x_MK, weight_NK, bias_N),
    norm=lambda x, weight, eps: _run(rms_norm, x, weight, eps, 0.0),
    add_norm=lambda x, residual, weight, eps: _run(add_rms_norm, x, residual, weight, eps, 0.0),
    gated=partial(_run, silu_and_mul),
)
