"""Which drafts are accepted: those that plain decoding would have said.

    tree         root ── a ── b         the root is the last known token; its row of logits tells what follows it
                   └─ c
    chosen       a       b    x         by each row, as in a step without drafts: same edits, filters, seed, position
    accepted     root, a, b, and x comes for free

A child is accepted where it is the token chosen at its parent. So a request's text is the one that it has without
drafts, token for token, at any temperature and whatever proposes: a bad draft costs time and nothing else.

It is also the rejection sampling of the literature, with its random numbers arranged in another way. A token is chosen
by Gumbel-max (kernels/sampling.py), where each token of the vocabulary has noise of its own and the largest sum wins.

- Drafts that are given (n-grams, the branches of a tree): a child x is accepted with p(x), and if it is not, what is
  left is p without x, renormalised, for the next sibling and in the end for the token that comes instead. The winner
  among the tokens left is the winner among all: the rule of siblings (EAGLE, arXiv:2401.15077; SpecInfer, 2305.09781).
- Drafts that a model draws from its own q, with the noise of the target's seed and position: the coupling of
  arXiv:2408.07978. Where p and q differ by d (total variation), a draft is accepted with at least (1 - d) / (1 + d).
  The chain rule of arXiv:2211.17192 reaches 1 - d, by draws that make a seed's text depend on the drafter.

Shape suffixes: S sequences, M nodes of a tree, the root among them.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from slipstream.kernels.sampling import NOTHING_TO_SAMPLE
from slipstream.speculative.tree import WORD, ancestors, depths


class Accepted(NamedTuple):
    """All int64, where the model is."""

    counts: Tensor  # [S] tokens that each sequence gains, at least 1: the accepted drafts and what the model says then
    token_ids: Tensor  # [S, M] they; only the first counts[s] mean something
    path: Tensor  # [S, M] the node whose row chose each: the root, then the accepted drafts; then the root again
    chosen: Tensor  # [S, M] by each node's row; NOTHING_TO_SAMPLE behind a tree's last node

    def last_nodes(self) -> Tensor:
        """[S] the node whose row chose each sequence's last token."""
        return self.path.gather(1, self.counts[:, None] - 1)[:, 0]


def accept(chosen_SM: Tensor, drafted_SM: Tensor, parents_SM: Tensor, num_nodes_S: Tensor) -> Accepted:
    """Walk each tree from the root along the tokens that were chosen. Waits for no device.

    drafted: the token at each node (the root's is not looked at). parents: each node's place in its tree, before its
    own; the root is its own parent. num_nodes: the root included; places after them are padding.
    """
    num_nodes = chosen_SM.shape[1]
    nodes_1M = torch.arange(num_nodes, device=chosen_SM.device)[None]
    # Where nothing can be chosen, the node is left for the next step, whose root it becomes: that tells the request.
    is_said_SM = (drafted_SM == chosen_SM.gather(1, parents_SM)) & (chosen_SM != NOTHING_TO_SAMPLE)
    is_said_SM = (is_said_SM & (nodes_1M < num_nodes_S[:, None])) | (nodes_1M == 0)
    above_SM, depths_SM = parents_SM, depths(parents_SM)
    for _ in range((num_nodes - 1).bit_length()):  # each turn looks twice as far up
        is_said_SM = is_said_SM & is_said_SM.gather(1, above_SM)
        above_SM = above_SM.gather(1, above_SM)
    last_S1 = depths_SM.where(is_said_SM, -1).argmax(1, keepdim=True)
    counts_S = 1 + depths_SM.gather(1, last_S1)[:, 0]
    masks_SMW = ancestors(parents_SM)
    words_SW = masks_SMW.gather(1, last_S1[:, :, None].expand(-1, 1, masks_SMW.shape[2]))[:, 0]
    is_on_path_SM = (words_SW[:, nodes_1M[0] // WORD] >> nodes_1M % WORD & 1).bool()
    places_SM = depths_SM.where(is_on_path_SM, num_nodes)  # the last column takes in what is on no path
    path_SM = chosen_SM.new_zeros(len(chosen_SM), num_nodes + 1).scatter(1, places_SM, nodes_1M.expand_as(places_SM))
    path_SM = path_SM[:, :num_nodes]
    verified_SM = chosen_SM.where(nodes_1M < num_nodes_S[:, None], NOTHING_TO_SAMPLE)
    return Accepted(counts_S, chosen_SM.gather(1, path_SM), path_SM, verified_SM)
