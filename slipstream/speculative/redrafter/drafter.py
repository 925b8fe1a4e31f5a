"""Drafts of ReDrafter's head: beams after each accepted token, merged into a tree.

    beams   the cat sat │ the cat ran │ a dog ran      the head's, after the last known token (beams.py)
    tree    the cat sat  └ ran   a dog ran             what begins alike is one, so it is verified once

A beam search needs the hidden state where the last token was chosen, so drafts are verified before the next are made:
one beam search a step, whatever was accepted. The published code accepts by the beams' probabilities, each beam for
itself, which its authors say may change texts; here drafts are verified as any.

Shape suffixes: S sequences, H hidden size, B beams, L tokens of each.
"""

from dataclasses import dataclass

import torch

from slipstream.engine.shared import head_of_tokens, products_in_bytes
from slipstream.errors import UsageError
from slipstream.schema.speculative import MAX_DRAFT_LEN, Speculation
from slipstream.speculative.drafter import LAST, DeviceDrafter, DraftTensors, Ends, Running, Target, read_options
from slipstream.speculative.head_file import head_folder, torch_product
from slipstream.speculative.redrafter.beams import beam_search, merged_beams
from slipstream.speculative.redrafter.head import load


@dataclass(frozen=True)
class Options:
    model: str = ""  # a folder of a ReDrafter head; by default the one that ships for the target
    width: int = 0  # beams, and
    length: int = 0  # tokens of each; by default those that the head's folder names


class Drafter(DeviceDrafter):
    can_branch = True
    reads_hidden = (LAST,)
    reads_ends = True

    def __init__(self, speculation: Speculation, target: Target) -> None:
        super().__init__(speculation, target)
        options, manifest = read_options(Options, speculation), target.manifest
        folder, dtype = head_folder("redrafter", options.model, manifest.name), getattr(torch, manifest.dtype)
        self._head = head = load(
            folder, manifest.hidden_size, manifest.vocab_size, dtype, target.device,
            lambda token_ids_D: head_of_tokens(target.engine, token_ids_D, dtype, target.device),
            products_in_bytes(target.engine, target.device) or torch_product,
        )  # fmt: skip
        self._width, self._length = options.width or head.width, options.length or head.length
        most = self._width * self._length
        if most > MAX_DRAFT_LEN:
            raise UsageError(
                f"speculative has width · length = {most} drafts a step; lower them to at most {MAX_DRAFT_LEN}, such "
                "as width 5, length 5."
            )
        self.max_draft_len = min(speculation.max_draft_len or most, most)

    def attach(self, running: Running) -> None:
        self._embed = running.embed

    @torch.inference_mode()
    def draft(self, ends: Ends, most: int) -> DraftTensors:
        assert ends.hidden is not None
        length = min(self._length, most)
        beams_SBL = beam_search(self._head, self._embed, ends.hidden, ends.token_ids, self._width, length)
        tree = merged_beams(beams_SBL)
        return tree._replace(
            token_ids=tree.token_ids[:, : self.max_draft_len], parents=tree.parents[:, : self.max_draft_len]
        )
