"""The shape of drafts: which follows which, and what each may see.

    token    a  b  c  d        a follows the last known token (the root), and so does c
    parent   0  1  0  3        as nodes are counted: the root is 0, the first draft 1
    depth    1  2  1  2

A chain is the tree whose every draft follows the one before it. Parents come before their children, so the first few
drafts of a tree are a tree as well: a step that has no room for all of them takes as many as it has.

Shape suffixes: S sequences, N drafts, M nodes (the root and N drafts), W words of 64 bits.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from slipstream.kernels.attention.tree import WORD


def chain_parents(num_drafts: int) -> list[int]:
    return list(range(num_drafts))


class Merged(NamedTuple):
    token_ids: list[int]
    parents: list[int]
    ends: list[int]  # of each way, its last node


def merged(ways: Iterable[Sequence[int]]) -> Merged:
    """Ways down from the root as one tree: as far as two begin alike, they are one."""
    tree = Merged([], [], [])
    nodes: dict[tuple[int, int], int] = {}  # by the node before, and the token
    for way in ways:
        node = 0
        for token_id in way:
            place = (node, token_id)
            if place not in nodes:
                tree.token_ids.append(token_id)
                tree.parents.append(node)
                nodes[place] = len(tree.token_ids)
            node = nodes[place]
        tree.ends.append(node)
    return tree


def check_parents(parents: Sequence[int]) -> None:
    """Raises ValueError unless each draft follows the root or a draft before it."""
    for draft, parent in enumerate(parents, 1):
        if not 0 <= parent < draft:
            raise ValueError(f"draft {draft} follows node {parent}; a parent comes before its children (0 is the root)")


def depths(parents_SM: Tensor) -> Tensor:
    """How far each node is from the root, which is its own parent. -> [S, M]"""
    depths_SM = (torch.arange(parents_SM.shape[1], device=parents_SM.device) > 0).long().expand_as(parents_SM)
    above_SM = parents_SM
    for _ in range((parents_SM.shape[1] - 1).bit_length()):
        depths_SM = depths_SM + depths_SM.gather(1, above_SM)
        above_SM = above_SM.gather(1, above_SM)
    return depths_SM


def ancestors(parents_SM: Tensor) -> Tensor:
    """The nodes on each node's way to the root, both included, a bit each: bit i of word w is node 64 · w + i.

    -> int64 [S, M, W]
    """
    num_nodes = parents_SM.shape[1]
    nodes_M = torch.arange(num_nodes, device=parents_SM.device)
    words_MW = torch.zeros(num_nodes, -(-num_nodes // WORD), dtype=torch.int64, device=parents_SM.device)
    words_MW[nodes_M, nodes_M // WORD] = torch.ones_like(nodes_M) << nodes_M % WORD
    masks_SMW, above_SM = words_MW.expand(len(parents_SM), -1, -1), parents_SM
    for _ in range((num_nodes - 1).bit_length()):  # each turn looks twice as far up
        masks_SMW = masks_SMW | masks_SMW.gather(1, above_SM[:, :, None].expand_as(masks_SMW))
        above_SM = above_SM.gather(1, above_SM)
    return masks_SMW
