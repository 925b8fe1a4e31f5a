"""How a step ends where drafts are verified or made. Nothing here waits for the device or depends on what it holds, so
all of it can be recorded with the step.

    chosen tokens ── accept ── accepted nodes move behind their root ── a drafter's own KV follows ── next drafts

Rows of a step that are text after it, and what follows each, for a drafter with a layer of its own:

    rows     of a prompt            of a tree whose root is "on", where "the rug" is accepted
             the   cat   sat        on     a     the   cat    rug
    next     cat   sat   on         the    –     rug   –      lies
    place    0     1     2          3            4            5      as in a chain: there its keys and values lie, too

Shape suffixes: S sequences of the step (of those that do not sample, numbers mean nothing), M nodes, T rows of the
step, R rows of logits, N drafts, F numbers of hidden states, B blocks; 3 of each row: what follows it, its place, its
KV slot.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from slipstream.kernels.attention.metadata import STEP_SHAPES, StepTensors
from slipstream.kernels.collectives import Ranks
from slipstream.runtime.transfer import on_device
from slipstream.runtime.worker.drafts import Drafts
from slipstream.runtime.worker.followed import Followed
from slipstream.runtime.worker.groups import ONE_A_GROUP, group_input
from slipstream.runtime.worker.inputs import NO_TEXT
from slipstream.schema.kv import KVGroup
from slipstream.schema.step import SequenceStep, StepPlan
from slipstream.speculative.accept import Accepted
from slipstream.speculative.drafter import Computed, DeviceDrafter, Ends, LayerDrafter, ModelDrafter, TextDrafter

Inputs = Mapping[str, Tensor]
KV = Sequence[Tensor]  # [2, blocks, tokens_per_block, heads, head_dim] of each place in a group; integers for FP8


class EndingPlan(NamedTuple):
    """What is known of a step's ending before it."""

    num_nodes: int  # of the trees that are verified, the root among them
    max_drafts: int  # that are made on the device for the next step
    asked: tuple[int, ...] | None = None  # the sequences that they are made for; None: all
    is_followed: bool = False  # by a drafter that is a model, which has not computed all rows


CATCHING_UP = EndingPlan(0, 0, is_followed=True)  # of a step that a drafter alone computes, which is a model


class Ended(NamedTuple):
    accepted: Accepted
    num_drafts: Tensor  # [S] that were made on the device

    def packed(self) -> Tensor:
        """All of it in one tensor, [S, 2 + 3 M]."""
        counts_S, *others = self.accepted
        return torch.cat((counts_S[:, None], self.num_drafts[:, None], *others), 1)

    @classmethod
    def unpacked(cls, packed_SX: Tensor) -> "Ended":
        num_nodes = (packed_SX.shape[1] - 2) // 3
        counts_S1, num_drafts_S1, *others = packed_SX.split([1, 1, num_nodes, num_nodes, num_nodes], 1)
        return cls(Accepted(counts_S1[:, 0], *others), num_drafts_S1[:, 0])


class Ending:
    """drafter: one that drafts on the device, or None."""

    def __init__(
        self,
        drafts: Drafts,
        drafter: DeviceDrafter | None,
        groups: Sequence[KVGroup],
        tokens_per_block: int,
        device: torch.device,
        ranks: Ranks,
        followed: Followed | None,
    ) -> None:
        """followed: where the drafter is a model."""
        self._drafts, self._drafter, self._device, self._ranks = drafts, drafter, device, ranks
        self._groups, self._block_size = groups, tokens_per_block
        self._may_look = device.type == "cpu"  # at what tensors hold: a GPU would be waited for
        self._layer = drafter if isinstance(drafter, LayerDrafter) else None
        self._text = drafter if isinstance(drafter, TextDrafter) else None
        self._model, self._followed = drafter if isinstance(drafter, ModelDrafter) else None, followed
        self.known = drafts.known if self._layer else None  # as fill_inputs has it

    def missed(self, plan: StepPlan) -> list[SequenceStep]:
        """What a draft model has to read before this step, whose plan the tables have."""
        if self._followed is None:
            return []
        self._followed.enter(plan)
        return self._followed.missed(plan.sequences[index] for index in self._drafts.asked(plan))

    @property
    def can_catch_up(self) -> bool:
        return self._model is not None

    def catch_up(self, inputs: Inputs) -> None:
        """Read what was missed."""
        assert self._model is not None
        self._model.follow(self._step(inputs))

    def plan(self, plan: StepPlan) -> EndingPlan | None:
        """None of a step that verifies no drafts, and that none are made from here."""
        verified = max((step.num_drafts for step in plan.sequences), default=0)
        asked = self._drafts.asked(plan) if self._drafter is not None else ()
        is_followed = self._followed is not None and self._is_followed(plan, asked, self._followed)
        if not (verified or asked or self._layer or self._text):
            return None
        most = max((plan.sequences[index].max_drafts for index in asked), default=0)
        if self._may_look:  # a shorter step is a faster one there
            return EndingPlan(1 + verified, most, asked, is_followed)
        # So that steps are of few kinds, each of which has to be recorded: trees that are a root alone are verified as
        # others are, and at a text's end drafts are made for nobody.
        full = self.in_full() if verified or most else self.of_plain()
        if full is None:
            return None
        # Other ranks see drafts that are verified, and not that some are made: there is nothing to move with them then.
        is_shared = verified or self._ranks.size == 1
        return full._replace(num_nodes=full.num_nodes if is_shared else 1, is_followed=is_followed)

    def _is_followed(self, plan: StepPlan, asked: Sequence[int], followed: Followed) -> bool:
        """Whether drafts are asked for after rows that the draft model has not read."""
        is_followed = not all(followed.has_read(plan.sequences[index]) for index in asked)
        for index, step in enumerate(plan.sequences):
            followed.note(step, is_followed=is_followed, is_asked=index in asked)
        return is_followed

    def knows_after(self, plan: StepPlan) -> bool:
        """Of a step that was launched: whether the next needs no word of how far its drafts get."""
        return self._followed is None or self._followed.knows_after(plan)

    def of_plain(self) -> EndingPlan | None:
        """Of steps that neither verify nor make drafts."""
        return EndingPlan(1, 0) if self._layer or self._text else None

    def in_full(self) -> EndingPlan | None:
        """Of steps in which each sequence verifies drafts, and more are made; None where nothing is drafted."""
        most = self._drafts.max_len
        return EndingPlan(1 + most, most if self._drafter is not None else 0) if most else None

    def run(self, ending: EndingPlan, inputs: Inputs, token_ids_R: Tensor, hidden_TF: Tensor | None, kv: KV) -> Tensor:
        """Ended, packed. hidden: what the drafter asks for of the model."""
        slots_S, rows_S, sizes_S = (inputs[f"trees.{name}"] for name in ("slots", "rows", "sizes"))
        accepted = self._drafts.accepted(slots_S, rows_S, sizes_S, ending.num_nodes, token_ids_R)
        if ending.num_nodes > 1:
            self._compact(inputs, accepted, kv)
        last_S = inputs["trees.roots"] + accepted.last_nodes()
        if self._layer is not None:
            assert hidden_TF is not None
            self._layer.follow(self._computed(inputs, accepted, last_S, hidden_TF))
        if self._text is not None:
            self._text.read(inputs["token_slots"], inputs["step.positions"], inputs["step.token_ids"])
        if self._model is not None and ending.is_followed:
            self._model.follow(self._step(inputs))
        num_drafts_S = torch.zeros_like(last_S)
        if self._drafter is not None and ending.max_drafts:
            hidden_SF = None if hidden_TF is None else hidden_TF[last_S]
            num_drafts_S = self._draft(self._drafter, ending, self._ends(inputs, accepted, hidden_SF))
        return Ended(accepted, num_drafts_S).packed()

    def run_beside(self, ending: EndingPlan, inputs: Inputs, kv: KV) -> None:
        """On a rank that does not sample."""
        if ending.num_nodes > 1:
            num_sequences = len(inputs["trees.slots"])
            nothing_SM = torch.zeros(num_sequences, ending.num_nodes, dtype=torch.int64, device=self._device)
            self._compact(inputs, Accepted(nothing_SM[:, 0], nothing_SM, nothing_SM, nothing_SM), kv)

    def _compact(self, inputs: Inputs, accepted: Accepted, kv: KV) -> None:
        """The accepted nodes of each tree move to the places after its root, where those of a chain are."""
        if not self._drafts.can_branch:
            return
        counts_and_path = torch.cat((accepted.counts[:, None], accepted.path), 1)
        self._ranks.copy_first(counts_and_path)  # the others learn of it here
        counts_S1, path_SM = counts_and_path[:, :1], counts_and_path[:, 1:]
        if self._drafts.kernels is not None:
            for index, group in enumerate(self._groups):
                tables_SB, layers = inputs[group_input("step.block_tables", index)], kv[: len(group.layers)]
                places = inputs["step.tree_starts"], inputs["trees.sizes"]
                self._drafts.kernels.move(layers, counts_S1[:, 0], path_SM, *places, tables_SB)
            return
        nodes_M, size = torch.arange(path_SM.shape[1], device=self._device), self._block_size
        last_S1 = (inputs["trees.sizes"][:, None] - 1).clamp(min=0)
        places_SM = inputs["step.tree_starts"][:, None] + nodes_M.minimum(last_S1)
        for index, group in enumerate(self._groups):
            blocks_SM = inputs[group_input("step.block_tables", index)].gather(1, places_SM // size)
            targets_SM = blocks_SM * size + places_SM % size
            sources_SM = targets_SM.gather(1, path_SM)
            targets_C, sources_C = targets_SM.where(nodes_M < counts_S1, sources_SM).flatten(), sources_SM.flatten()
            if self._may_look:
                is_other_C = targets_C != sources_C
                targets_C, sources_C = targets_C[is_other_C], sources_C[is_other_C]
            for kv_PNBKD in kv[: len(group.layers)]:
                rows_PCKD = kv_PNBKD.flatten(1, 2)
                rows_PCKD[:, targets_C] = rows_PCKD[:, sources_C]

    def _step(self, inputs: Inputs) -> StepTensors:
        """In the blocks that the drafter is lent."""
        names, group = (f"step.{name}" for name in STEP_SHAPES), self._drafts.group
        return StepTensors(*(inputs[group_input(name, group) if name in ONE_A_GROUP else name] for name in names))

    def _computed(self, inputs: Inputs, accepted: Accepted, last_S: Tensor, hidden_TF: Tensor) -> Computed:
        """Which rows are text: those of prompts, and of each tree the root and what was accepted."""
        known_T, kv_slots_T = inputs["trees.next_ids"], inputs[group_input("step.slots", self._drafts.group)]
        num_rows, nodes_M = len(known_T), torch.arange(accepted.path.shape[1], device=self._device)
        hidden_TF = hidden_TF[:num_rows]  # a recorded step has more
        roots_S1 = inputs["trees.roots"][:, None]
        chain_SM = (roots_S1 + nodes_M).clamp(max=num_rows - 1)
        next_SM = accepted.token_ids.clamp(min=0)  # where nothing can be sampled, the request ends
        said_3SM = torch.stack((next_SM, inputs["step.tree_starts"][:, None] + nodes_M, kv_slots_T[chain_SM]))
        is_said_SM = (nodes_M < accepted.counts[:, None]) & (inputs["trees.slots"] >= 0)[:, None]
        rows_SM = (roots_S1 + accepted.path).where(is_said_SM, num_rows)  # others go into a column behind the last
        before_3T = torch.stack((known_T, inputs["step.positions"], kv_slots_T.where(known_T != NO_TEXT, 0)))
        numbers_3T = functional.pad(before_3T, (0, 1)).scatter(1, rows_SM.flatten().expand(3, -1), said_3SM.flatten(1))
        numbers_3T = numbers_3T[:, :num_rows]
        if self._may_look:
            is_text_T = numbers_3T[0] != NO_TEXT
            last_S = (is_text_T.cumsum(0)[last_S] - 1).clamp(min=0)
            numbers_3T, hidden_TF = numbers_3T[:, is_text_T], hidden_TF[is_text_T]
        next_T, places_T, kv_slots_T = numbers_3T
        return Computed(inputs["trees.slots"], last_S, next_T, places_T, kv_slots_T, hidden_TF)

    def _ends(self, inputs: Inputs, accepted: Accepted, hidden_SF: Tensor | None) -> Ends:
        last_token_S = accepted.token_ids.gather(1, accepted.counts[:, None] - 1)[:, 0].clamp(min=0)
        positions_S = inputs["step.tree_starts"] + accepted.counts
        tables_SB = inputs[group_input("step.block_tables", self._drafts.group)]
        before_S = accepted.token_ids.gather(1, (accepted.counts[:, None] - 2).clamp(min=0))[:, 0]
        previous_S = before_S.where(accepted.counts > 1, NO_TEXT)
        return Ends(inputs["trees.slots"], last_token_S, positions_S, hidden_SF, tables_SB, previous_S)

    def _draft(self, drafter: DeviceDrafter, ending: EndingPlan, ends: Ends) -> Tensor:
        """How many each sequence has now."""
        num_sequences, asked_S = len(ends.slots), None
        if ending.asked is not None and len(ending.asked) < num_sequences:
            asked_S = on_device(ending.asked, torch.int64, self._device)
            ends = Ends(*(None if x is None else x[asked_S] for x in ends))  # type: ignore[arg-type]
        drafts = drafter.draft(ends, ending.max_drafts)
        self._drafts.keep(ends.slots, drafts)
        counts_S = drafts.counts
        if counts_S is None:
            counts_S = torch.full_like(ends.slots, drafts.token_ids.shape[1])
        if asked_S is None:
            return counts_S
        return counts_S.new_zeros(num_sequences).index_copy(0, asked_S, counts_S)
