"""Drafts of Medusa's heads: each says what it holds likely so far ahead, and a tree says which of these to combine.

    hidden state where the last token was chosen ──┬── head 0 ── a, b, c, …   the token after it
                                                   └── head 1 ── x, y, z, …   the one after that
    choices [0] [0,0] [1] [0,1] …                  a    a x    b    a y

A choice is the rank of a token in each head on its way down; the first are the likeliest. Heads may bring the tree that
was measured for them. The tree of 63, for the others, is the one that Medusa's authors measured for Vicuna 7B
(FasterDecoding/Medusa, medusa_choices.py), and what TensorRT-LLM is told as --medusa_choices. Drafts are verified as
any: there is no typical acceptance, which would change texts.

Shape suffixes: S sequences, H hidden size, K ranks, N heads, then drafts.
"""

from dataclasses import dataclass

import torch

from slipstream.engine.shared import head_of_tokens, products_in_bytes
from slipstream.kernels.largest import largest
from slipstream.schema.speculative import Speculation
from slipstream.speculative.choices import Choice, fitting, parents_of, read_choices
from slipstream.speculative.drafter import LAST, DeviceDrafter, DraftTensors, Ends, Target, read_options
from slipstream.speculative.head_file import head_folder
from slipstream.speculative.medusa.head import CHOICES_FILE, load

MC_SIM_7B_63 = """
0 00 1 01 2 000 10 02 3 03 4 04 20 05 001 5 06 6 07 010 11 7 08 002 30 09 8 9 100 020 12 003 40 21 004 005 0000 011 006
030 50 13 007 008 009 60 040 14 70 012 200 31 22 80 050 15 101 021 90 060 0001 16 070
"""


@dataclass(frozen=True)
class Options:
    model: str = ""  # a folder of heads; by default those that ship for the target
    choices: str = ""  # [[0], [0, 0], [1], ...] as JSON, or a file of it; by default the heads' own, or the tree of 63


class Drafter(DeviceDrafter):
    default_draft_len = 24
    can_branch = True
    reads_hidden = (LAST,)

    def __init__(self, speculation: Speculation, target: Target) -> None:
        super().__init__(speculation, target)
        options = read_options(Options, speculation)
        manifest = target.manifest
        folder, dtype = head_folder("medusa", options.model, manifest.name), getattr(torch, manifest.dtype)
        self._heads = load(
            folder, manifest.hidden_size, manifest.vocab_size, dtype, target.device,
            lambda token_ids_D: head_of_tokens(target.engine, token_ids_D, dtype, target.device),
            products_in_bytes(target.engine, target.device),
        )  # fmt: skip
        own = folder / CHOICES_FILE
        given = options.choices or (str(own) if own.is_file() else "")
        choices = read_choices(given) if given else default_choices()
        self._choices = fitting(choices, self._heads.num_heads, self._heads.num_tokens)[: self.max_draft_len]
        self.max_draft_len = len(self._choices)
        self._heads = self._heads.first(max(map(len, self._choices)))
        self._num_ranks = 1 + max(rank for choice in self._choices for rank in choice)
        head_and_rank = [[len(choice) - 1, choice[-1]] for choice in self._choices]
        self._drafted_N2 = torch.tensor(head_and_rank, device=target.device)
        self._parents_N = torch.tensor(parents_of(self._choices), device=target.device)

    @torch.inference_mode()
    def draft(self, ends: Ends, most: int) -> DraftTensors:
        assert ends.hidden is not None
        heads = self._heads.first(max(map(len, self._choices[:most])))
        _, ranked_NSK = largest(heads.logits(ends.hidden), self._num_ranks)
        heads_N, ranks_N = self._drafted_N2[:most].unbind(1)
        token_ids_SN = heads.token_ids(ranked_NSK[heads_N, :, ranks_N]).T
        return DraftTensors(token_ids_SN, self._parents_N[:most].expand_as(token_ids_SN))


def default_choices() -> list[Choice]:
    return [tuple(map(int, ranks)) for ranks in MC_SIM_7B_63.split()]
