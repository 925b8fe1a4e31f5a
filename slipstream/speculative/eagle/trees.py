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

from slipstream.kernels.largest import largest
from slipstream.speculative.choices import Choice, parents_of
from slipstream.speculative.drafter import DraftTensors


class Grown(NamedTuple):
    """The nodes of S trees that are computed so far."""

    first: int  # of the last level
    num_nodes: int  # those behind these mean nothing
    token_ids: Tensor  # [S, M, K] of each one's children, the likeliest first
    scores: Tensor  # [S, M, K] log probability of the whole way down to each child


class Level(NamedTuple):
    """Which children become nodes: child `rank` of node `parent`."""

    parents: Tensor  # [S, W]
    ranks: Tensor  # [S, W]


class Trees(ABC):
    num_ranks: int
    num_nodes: int  # that are computed in all, the root among them
    num_drafts: int

    @abstractmethod
    def level(self, depth: int, grown: Grown) -> Level | None:
        """What comes after the level of that depth; None after the last."""

    @abstractmethod
    def drafts(self, grown: Grown, levels: Sequence[Level]) -> DraftTensors:
        """levels: of the nodes behind the root."""


class Written(Trees):
    """A tree of choices, the same for all."""

    def __init__(self, choices: Sequence[Choice], device: torch.device) -> None:
        """choices: parents before their children."""
        self.num_ranks, self.num_drafts = 1 + max(max(choice) for choice in choices), len(choices)
        with_children = {choice[:-1] for choice in choices}
        nodes = {choice: node for node, choice in enumerate(sorted(with_children, key=lambda each: (len(each), each)))}
        self.num_nodes = len(nodes)

        def children(chosen: Sequence[Choice]) -> Level:
            numbers = torch.tensor([[nodes[each[:-1]] for each in chosen], [each[-1] for each in chosen]])
            return Level(*numbers.to(device)[:, None])

        deepest = max(map(len, nodes))
        self._levels = [
            children([choice for choice in nodes if len(choice) == depth]) for depth in range(1, deepest + 1)
        ]
        self._drafted, self._parents = children(choices), torch.tensor(parents_of(choices), device=device)

    def level(self, depth: int, grown: Grown) -> Level | None:
        if depth == len(self._levels):
            return None
        return Level(*(numbers.expand(len(grown.token_ids), -1) for numbers in self._levels[depth]))

    def drafts(self, grown: Grown, levels: Sequence[Level]) -> DraftTensors:
        nodes_N, ranks_N = (numbers[0] for numbers in self._drafted)
        token_ids_SN = grown.token_ids[:, nodes_N, ranks_N]
        return DraftTensors(token_ids_SN, self._parents.expand_as(token_ids_SN))


class Growing(Trees):
    """The num_drafts likeliest children, of trees that at each of `depth` levels go on from the `width` likeliest."""

    def __init__(self, width: int, depth: int, num_drafts: int) -> None:
        self.num_ranks, self._depth = width, depth
        self.num_nodes = 1 + width * (depth - 1)
        self.num_drafts = min(num_drafts, self.num_nodes * width)

    def level(self, depth: int, grown: Grown) -> Level | None:
        if depth + 1 == self._depth:
            return None
        scores_SC = grown.scores[:, grown.first : grown.num_nodes].flatten(1)
        _, best_SW = largest(scores_SC, self.num_ranks)
        return Level(grown.first + best_SW // self.num_ranks, best_SW % self.num_ranks)

    def drafts(self, grown: Grown, levels: Sequence[Level]) -> DraftTensors:
        """The likeliest first. A child is never likelier than its parent, and comes after it where it is as likely."""
        scores_SC = grown.scores[:, : grown.num_nodes].flatten(1)
        order_SN = scores_SC.sort(descending=True, stable=True).indices[:, : self.num_drafts]
        token_ids_SN = grown.token_ids.flatten(1).gather(1, order_SN)
        # Which draft each child is, counted as nodes are, and which child each node is; the root is none.
        numbers_SN = torch.arange(1, 1 + order_SN.shape[1], device=order_SN.device).expand_as(order_SN)
        draft_of_SC = torch.zeros_like(scores_SC, dtype=torch.int64).scatter(1, order_SN, numbers_SN)
        nodes_SN = order_SN // self.num_ranks
        if not levels:
            return DraftTensors(token_ids_SN, torch.zeros_like(nodes_SN))
        as_children_SM = torch.cat([level.parents * self.num_ranks + level.ranks for level in levels], 1)
        drafts_SM = functional.pad(draft_of_SC.gather(1, as_children_SM), (1, 0))
        return DraftTensors(token_ids_SN, drafts_SM.gather(1, nodes_SN))
