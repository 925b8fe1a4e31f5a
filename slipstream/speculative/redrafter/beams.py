"""The beam search of ReDrafter's head: the likeliest ways to go on, of equal length.

Shape suffixes: S sequences, H hidden size, B beams, K tokens of each that are looked at, L tokens of a beam so far, N
tokens of all beams.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from slipstream.kernels.largest import largest
from slipstream.speculative.drafter import DraftTensors
from slipstream.speculative.redrafter.head import Head

MOST_LIKELY = 50  # tokens after a beam, beyond which none is looked at; probabilities are of these alone


def beam_search(
    head: Head, embed: Callable[[Tensor], Tensor], h_SH: Tensor, token_ids_S: Tensor, width: int, length: int
) -> Tensor:
    """After each last known token. embed: token ids [N] -> [N, H]. -> token ids [S, B, L], the likeliest beam first"""
    num, hidden_size = h_SH.shape
    last_SB, scores_SB = token_ids_S[:, None], torch.zeros(num, 1, device=h_SH.device)
    state_SBH, beams_SBL = torch.zeros_like(h_SH)[:, None], token_ids_S.new_empty(num, 1, 0)
    for _ in range(length):
        e_SBH = embed(last_SB.flatten()).view(num, -1, hidden_size)
        state_SBH = head.state(e_SBH, state_SBH)
        logits_SBD = head.logits(h_SH[:, None].expand_as(state_SBH), state_SBH).float()
        likely_SBK, drafted_SBK = largest(logits_SBD, min(MOST_LIKELY, logits_SBD.shape[2]))
        scores_SBK = scores_SB[:, :, None] + likely_SBK.log_softmax(2)
        scores_SB, places_SB = largest(scores_SBK.flatten(1), min(width, scores_SBK[0].numel()))
        before_SB1 = places_SB[:, :, None] // scores_SBK.shape[2]
        last_SB = head.token_ids(drafted_SBK).flatten(1).gather(1, places_SB)
        beams_SBL = beams_SBL.gather(1, before_SB1.expand(-1, -1, beams_SBL.shape[2]))
        beams_SBL = torch.cat((beams_SBL, last_SB[:, :, None]), 2)
        state_SBH = state_SBH.gather(1, before_SB1.expand(-1, -1, hidden_size))
    return beams_SBL


def merged_beams(beams_SBL: Tensor) -> DraftTensors:
    """Beams as one tree: as far as two begin alike, they are one. Waits for no device.

    Nodes come beam after beam, and behind them as many drafts of token 0 as were saved.
    """
    num, width, length = beams_SBL.shape
    is_alike_SBBL = (beams_SBL[:, :, None] == beams_SBL[:, None]).long().cumprod(3).bool()
    first_SBL = is_alike_SBBL.long().argmax(2)  # the first beam that begins as this one does, up to here
    is_first_SBL = first_SBL == torch.arange(width, device=beams_SBL.device)[:, None]
    nodes_SN = is_first_SBL.flatten(1).cumsum(1)  # where it is the first; the root is 0
    places_SBL = first_SBL * length + torch.arange(length, device=beams_SBL.device)
    nodes_SBL = nodes_SN.gather(1, places_SBL.flatten(1)).view_as(beams_SBL)
    parents_SBL = functional.pad(nodes_SBL[:, :, :-1], (1, 0))
    # What another beam has said before goes into a column behind the last.
    targets_SN = nodes_SN.where(is_first_SBL.flatten(1), width * length + 1) - 1

    def gathered(values_SBL: Tensor) -> Tensor:
        empty_SN = values_SBL.new_zeros(num, width * length + 1)
        return empty_SN.scatter(1, targets_SN, values_SBL.flatten(1))[:, :-1]

    return DraftTensors(gathered(beams_SBL), gathered(parents_SBL), nodes_SN[:, -1])
