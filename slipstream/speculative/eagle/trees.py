"""Which nodes of a tree of drafts EAGLE's layer computes, level by level, and which of their children are drafted.

    node 0     the last known token       its children: the tokens that the layer holds likeliest after it, by rank
    level 1    some of these children     computed together, each after its parent
    drafts     children of any node that was computed, those of the last level among them

A tree is written down (EAGLE 1), or grows where the layer is surest (EAGLE-2, arXiv:2406.16858): at each level the
likeliest ways down so far go on, and of all children in the end the likeliest are drafted.

Shape suffixes: S sequences, M nodes, K ranks, W nodes of a level, N drafts, C children of all nodes, node by node.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from slipstream.kernels.largest import first_largest, largest
from slipstream.speculative.choices import Choice, parents_of
from slipstream.speculative.drafter import DraftTensors

MOST_WAYS, DRAFTS_A_WAY = 8, 3  # of the likeliest drafts, which are mostly one way down


def width_for(num_drafts: int, depth: int) -> int:
    """Of trees that grow: no less than what has so many drafts."""
    width = min(MOST_WAYS, -(-num_drafts // DRAFTS_A_WAY))
    while width * (1 + width * (depth - 1)) < num_drafts:
        width += 1
    return width


class Grown(NamedTuple):
    """The nodes of S trees that are computed so far."""

    first: int  # of the last level
    num_nodes: int  # those behind these mean nothing
    token_ids: Tensor  # [S, M, K] of each one's children, the likeliest first
    scores: Tensor  # [S, M, K] log probability of the whole way down to each child


class Trees(ABC):
    num_ranks: int
    widths: Sequence[int]  # nodes of each level, the first of which is the root's
    num_drafts: int

    @property
    def num_nodes(self) -> int:
        """That are computed in all, the root among them."""
        return sum(self.widths)

    def narrowed(self, most: int) -> "Trees":
        """As much of them as so few drafts need."""
        return self

    @abstractmethod
    def level(self, depth: int, grown: Grown) -> Tensor | None:
        """Which children become the nodes of the level after that depth, [S, W]; None after the last level.

        Child `rank` of a node has the number node · num_ranks + rank.
        """

    @abstractmethod
    def drafts(self, grown: Grown, levels: Sequence[Tensor]) -> DraftTensors:
        """levels: of the nodes behind the root, as `level` gives them."""


class Written(Trees):
    """A tree of choices, the same for all."""

    def __init__(self, choices: Sequence[Choice], device: torch.device) -> None:
        """choices: parents before their children."""
        self.num_ranks, self.num_drafts = 1 + max(max(choice) for choice in choices), len(choices)
        with_children = {choice[:-1] for choice in choices}
        nodes = {choice: node for node, choice in enumerate(sorted(with_children, key=lambda each: (len(each), each)))}

        def children(chosen: Sequence[Choice]) -> Tensor:
            numbers = [nodes[each[:-1]] * self.num_ranks + each[-1] for each in chosen]
            return torch.tensor(numbers, device=device)

        deepest = max(map(len, nodes))
        levels = [[choice for choice in nodes if len(choice) == depth] for depth in range(1, deepest + 1)]
        self.widths = 1, *map(len, levels)
        self._levels = [children(level) for level in levels]
        self._drafted, self._parents = children(choices), torch.tensor(parents_of(choices), device=device)

    def level(self, depth: int, grown: Grown) -> Tensor | None:
        if depth == len(self._levels):
            return None
        return self._levels[depth].expand(len(grown.token_ids), -1)

    def drafts(self, grown: Grown, levels: Sequence[Tensor]) -> DraftTensors:
        token_ids_SN = grown.token_ids.flatten(1)[:, self._drafted]
        return DraftTensors(token_ids_SN, self._parents.expand_as(token_ids_SN))


class Growing(Trees):
    """The num_drafts likeliest children, of trees that at each of `depth` levels go on from the `width` likeliest."""

    def __init__(self, width: int, depth: int, num_drafts: int) -> None:
        self.num_ranks, self._depth = width, depth
        self.widths = 1, *[width] * (depth - 1)
        self.num_drafts = min(num_drafts, self.num_nodes * width)

    def narrowed(self, most: int) -> Trees:
        width = min(self.num_ranks, width_for(most, min(self._depth, most)))
        return self if width == self.num_ranks and most >= self._depth else Growing(width, min(self._depth, most), most)

    def level(self, depth: int, grown: Grown) -> Tensor | None:
        if depth + 1 == self._depth:
            return None
        scores_SC = grown.scores[:, grown.first : grown.num_nodes].flatten(1)
        _, best_SW = largest(scores_SC, self.num_ranks)
        return best_SW + grown.first * self.num_ranks

    def drafts(self, grown: Grown, levels: Sequence[Tensor]) -> DraftTensors:
        """The likeliest first. A child is never likelier than its parent, and comes after it where it is as likely."""
        scores_SC = grown.scores[:, : grown.num_nodes].flatten(1)
        _, order_SN = first_largest(scores_SC, min(self.num_drafts, scores_SC.shape[1]))
        token_ids_SN = grown.token_ids.flatten(1).gather(1, order_SN)
        # Which draft each child is, counted as nodes are, and which child each node is; the root is none.
        numbers_SN = torch.arange(1, 1 + order_SN.shape[1], device=order_SN.device).expand_as(order_SN)
        draft_of_SC = torch.zeros_like(scores_SC, dtype=torch.int64).scatter(1, order_SN, numbers_SN)
        nodes_SN = order_SN // self.num_ranks
        if not levels:
            return DraftTensors(token_ids_SN, torch.zeros_like(nodes_SN))
        drafts_SM = functional.pad(draft_of_SC.gather(1, torch.cat(list(levels), 1)), (1, 0))
        return DraftTensors(token_ids_SN, drafts_SM.gather(1, nodes_SN))
