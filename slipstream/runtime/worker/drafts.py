"""What is drafted for each slot, where the model is: a plan says how many drafts a step verifies, not which.

Shape suffixes: S sequences, N drafts, M nodes (a sequence's last known token and its drafts), T tokens of the step.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from slipstream.kernels.attention.tree import WORD
from slipstream.kernels.sampling import NOTHING_TO_SAMPLE
from slipstream.runtime.transfer import on_device
from slipstream.runtime.worker.inputs import draft_name
from slipstream.runtime.worker.memory import zeros
from slipstream.schema.kv import KVGroup
from slipstream.schema.request import GenerateRequest
from slipstream.schema.step import PENDING, SequenceStep, StepPlan
from slipstream.speculative.accept import Accepted, accept
from slipstream.speculative.drafter import (
    AnyDrafter,
    DeviceDrafter,
    Draft,
    Drafter,
    DraftTensors,
    KVDrafter,
    Running,
    Verified,
)
from slipstream.speculative.tree import ancestors, chain_parents, check_parents, depths

_ROOT = (1, 0)  # a column before, none after: the root is its own parent, and its token is not looked at


class Drafted(NamedTuple):
    """The trees of a step's sequences, in their order; where the model is."""

    num_nodes: list[int]  # of each, its last token included: so many rows of logits it has
    token_ids: Tensor  # [S, M]
    parents: Tensor  # [S, M]


def tree_kernels(device: torch.device) -> Any:
    """The module of them for a GPU; elsewhere torch does what they do."""
    if device.type != "cuda":
        return None
    from slipstream.kernels.triton import trees

    return trees


class Drafts:
    """Of all slots. Without a drafter there are none."""

    def __init__(
        self,
        drafter: AnyDrafter | None,
        vocab_size: int,
        num_slots: int,
        device: torch.device,
        texts: Callable[[int], Sequence[int]],
        last_token_X: Tensor,
        *,
        max_len: int = 0,
        can_branch: bool = False,
    ) -> None:
        """texts: of each slot the tokens that are known on the host. last_token: of each slot, and of NO_SLOT. max_len,
        can_branch: of the drafter, also where another rank has it."""
        self._drafter = drafter
        self._on_host = drafter if isinstance(drafter, Drafter) else None
        self._on_device = drafter if isinstance(drafter, DeviceDrafter) else None
        self._with_kv = drafter if isinstance(drafter, KVDrafter) else None
        self._vocab_size, self._device, self._texts = vocab_size, device, texts
        self._may_look = device.type == "cpu"  # at what tensors hold: a GPU would be waited for
        self.max_len, self.can_branch = max_len, can_branch
        self.num_mask_words = -(-(1 + self.max_len) // WORD)

        def of_slots(*shape: int) -> Tensor:
            return torch.zeros((num_slots + 1, *shape), dtype=torch.int64, device=device)  # the last is of NO_SLOT

        self._token_ids, self._parents = of_slots(self.max_len), of_slots(self.max_len)
        # Of drafts that may branch, and their roots: how far a node is from the root, and what is above it.
        self._depths, self._masks = of_slots(1 + self.max_len), of_slots(1 + self.max_len, self.num_mask_words)
        self.kernels = tree_kernels(device)
        # How far each slot's last step got: there late steps begin.
        self._last_token_X, self.num_accepted_X = last_token_X, of_slots()
        self._is_taking = [False] * num_slots
        self._known: list[Sequence[int]] = [()] * num_slots  # tokens that each text had when it came
        self._told = [0] * num_slots  # tokens of each that the drafter was told of, where it was not asked since
        self.group = 0  # whose KV blocks the drafter is lent

    def lend(self, groups: Sequence[KVGroup]) -> None:
        """A drafter's own KV lies in the blocks of the group that sees most."""
        self.group = min(range(len(groups)), key=lambda index: (groups[index].window != 0, -groups[index].window))
        if self._with_kv is not None:
            self._with_kv.lend_blocks(groups[self.group].window)

    def attach(self, running: Running) -> None:
        """The engine's weights are there."""
        assert self._drafter is not None
        self._drafter.attach(running)

    def allocate_kv(self, num_blocks: int, tokens_per_block: int) -> list[Tensor]:
        """The drafter's own cache, if it has one: where the model's blocks are copied, its are too."""
        if self._with_kv is None:
            return []
        total = num_blocks + -(-self._with_kv.num_beyond // tokens_per_block) * len(self._token_ids)
        kv = [
            zeros((own.num_planes, total, tokens_per_block, own.num_heads, own.head_dim), own.dtype, self._device)
            for own in self._with_kv.own_kv
        ]
        self._with_kv.take_kv(kv, num_blocks)
        return kv

    def add(self, slot: int, request: GenerateRequest, output_token_ids: tuple[int, ...]) -> None:
        if self._drafter is None:
            return
        self._known[slot] = (*request.prompt_token_ids, *output_token_ids)
        self._told[slot] = 0
        # A user's function is called once a token, in their order, as it may expect. Last tokens have none after them.
        self._is_taking[slot] = not request.sampling.logits_processors and request.max_tokens > 1
        if self._on_host is not None and self._is_taking[slot]:
            self._on_host.start(slot, self._known[slot], request)
        if self._on_device is not None:
            self._on_device.start(slot, self._known[slot], request)

    def remove(self, slot: int) -> None:
        if self._on_host is not None:
            self._on_host.stop(slot)

    def known(self, slot: int) -> Sequence[int]:
        """The tokens that its text had when it came."""
        return self._known[slot]

    @property
    def reads_ends(self) -> bool:
        return self._drafter is not None and self._drafter.reads_ends

    @property
    def can_be_late(self) -> bool:
        """Whether all that is drafted comes from the device, and the host need not know where."""
        return self._on_device is not None

    @property
    def can_be_recorded(self) -> bool:
        return self._on_device is None or self._on_device.can_be_recorded

    @property
    def bytes_per_token(self) -> int:
        """Of a block, for the drafter's own KV."""
        return 0 if self._with_kv is None else sum(own.bytes_per_token for own in self._with_kv.own_kv)

    def asked(self, plan: StepPlan) -> tuple[int, ...]:
        """The sequences of a step that are to have drafts in the next."""
        return tuple(
            index
            for index, step in enumerate(plan.sequences)
            if step.sample and step.max_drafts and self._is_taking[step.slot]
        )

    @property
    def are_made_on_host(self) -> bool:
        return self._on_host is not None

    def propose(self, steps: Sequence[SequenceStep], accepted: Accepted, hidden_SH: Tensor | None = None) -> list[int]:
        """How many drafts each of these sequences, all of which sample, has for its next step.

        A drafter on the host makes them now; of one on the device, how many are wanted of those that it made. hidden:
        where the last token of each was chosen. Raises ValueError for what a drafter may not propose.
        """
        wanted = [step.max_drafts * self._is_taking[step.slot] for step in steps]
        if self._on_host is None:
            return wanted
        num_drafts = [0] * len(steps)
        for step in steps:
            if not step.max_drafts and not self._told[step.slot]:
                self._told[step.slot] = step.start + len(step.token_ids)
        asked = [index for index, most in enumerate(wanted) if most]
        if not asked:
            return num_drafts
        positions_S = on_device([step.start + len(step.token_ids) for step in steps], torch.int64, self._device)
        verified = Verified(
            [step.slot for step in steps], [step.max_drafts for step in steps], accepted.counts, accepted.token_ids,
            positions_S + accepted.counts - 1, accepted.chosen, hidden_SH,
        )  # fmt: skip
        if len(asked) < len(steps):
            verified = self._only(asked, verified)
        drafts = self._on_host.draft(self._with_missed([steps[index] for index in asked], verified))
        for index, draft in zip(asked, drafts, strict=True):
            num_drafts[index] = min(len(draft.token_ids), steps[index].max_drafts)
        tensors = self._checked(drafts)
        if any(num_drafts):
            self.keep(on_device(verified.slots, torch.int64, self._device), tensors)
        return num_drafts

    def keep(self, slots_S: Tensor, drafts: DraftTensors) -> None:
        """For the next step of these slots. What nobody looks at is kept within its bounds."""
        if self.kernels is not None:
            self.kernels.keep(slots_S, drafts.token_ids, drafts.parents, self._tables(), self._vocab_size)
            return
        padding = (0, self.max_len - drafts.token_ids.shape[1])
        token_ids_SN = functional.pad(drafts.token_ids.clamp(0, self._vocab_size - 1), padding)
        parents_SN = torch.arange(self.max_len, device=self._device).expand_as(token_ids_SN)
        if self.can_branch:
            parents_SN = functional.pad(drafts.parents.clamp(min=0), padding).minimum(parents_SN)
        self._token_ids[slots_S], self._parents[slots_S] = token_ids_SN, parents_SN
        if self.can_branch:
            parents_SM = functional.pad(parents_SN, _ROOT)
            self._depths[slots_S], self._masks[slots_S] = depths(parents_SM), ancestors(parents_SM)

    def _only(self, indexes: list[int], verified: Verified) -> Verified:
        index_S = on_device(indexes, torch.int64, self._device)
        slots, max_drafts = ([values[index] for index in indexes] for values in (verified.slots, verified.max_drafts))
        others = {name: x[index_S] for name, x in verified._asdict().items() if isinstance(x, Tensor)}
        return verified._replace(slots=slots, max_drafts=max_drafts, **others)

    def _with_missed(self, steps: Sequence[SequenceStep], verified: Verified) -> Verified:
        """What was said in steps that asked for no drafts comes first. All of it is known by now."""
        missed = list[list[int]]()
        for step in steps:
            told, self._told[step.slot] = self._told[step.slot], 0
            end = step.start + len(step.token_ids)
            missed.append(list(self._texts(step.slot)[told:end]) if told else [])
        if not any(missed):
            return verified
        said = [[*before, *now] for before, now in zip(missed, verified.lists(), strict=True)]
        counts, most = [len(token_ids) for token_ids in said], max(map(len, said))
        rows = [[*token_ids, *[0] * (most - len(token_ids))] for token_ids in said]
        return verified._replace(
            counts=on_device(counts, torch.int64, self._device), token_ids=on_device(rows, torch.int64, self._device)
        )

    def _checked(self, drafts: Sequence[Draft]) -> DraftTensors:
        rows = []
        for token_ids, parents in drafts:
            parents = chain_parents(len(token_ids)) if parents is None else parents
            self._check(token_ids, parents)
            padding = [0] * (self.max_len - len(token_ids))
            rows.append([[*token_ids, *padding], [*parents, *padding]])
        return DraftTensors(*on_device(rows, torch.int64, self._device).unbind(1))

    def _check(self, token_ids: Sequence[int], parents: Sequence[int]) -> None:
        """What comes from outside may not reach the model's tables unseen."""
        if len(token_ids) > self.max_len:
            raise ValueError(f"the drafter proposed {len(token_ids)} tokens, more than {self.max_len}")
        for token_id in token_ids:
            if not 0 <= token_id < self._vocab_size:
                raise ValueError(
                    f"the drafter proposed token {token_id}; the vocabulary is 0 to {self._vocab_size - 1}"
                )
        if len(parents) != len(token_ids):
            raise ValueError(f"the drafter proposed {len(token_ids)} tokens and {len(parents)} parents")
        check_parents(parents)
        if list(parents) != chain_parents(len(parents)) and not self.can_branch:
            raise ValueError("the drafter proposed branches; its class must say can_branch = True")

    def fill(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the step's token ids name, in place. Returns what attention needs besides, where drafts may branch."""
        if not self.max_len:
            return {}
        token_ids_T, slots_T = inputs["step.token_ids"], inputs["token_slots"]
        if self.kernels is not None:
            return self._fill(self.kernels, inputs)
        is_draft_T = token_ids_T < PENDING
        if self._may_look and not bool(is_draft_T.any()):
            shape = (len(token_ids_T), self.num_mask_words)
            return {"step.tree_masks": token_ids_T.new_full(shape, -1)} if self.can_branch else {}
        nodes_T = (1 + draft_name(token_ids_T)).where(is_draft_T, 0).clamp(max=self.max_len)
        drafts_T = self._token_ids[slots_T, (nodes_T - 1).clamp(min=0)]
        token_ids_T.copy_(drafts_T.where(is_draft_T, token_ids_T))
        if not self.can_branch:
            return {}
        positions_T = inputs["step.positions"]  # as if drafts were chains: each node's place in the cache
        positions_T += (self._depths[slots_T, nodes_T] - nodes_T).where(is_draft_T, 0)
        inputs["row_positions"].copy_(1 + positions_T[inputs["step.logit_rows"]])
        return {"step.tree_masks": self._masks[slots_T, nodes_T].where(is_draft_T[:, None], -1)}

    def _fill(self, kernels: Any, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        positions_T = inputs["step.positions"]
        masks_TW = kernels.fill(
            inputs["step.token_ids"], inputs["token_slots"], positions_T, self._tables(), draft_name(0)
        )
        if masks_TW is None:
            return {}
        torch.add(positions_T[inputs["step.logit_rows"]], 1, out=inputs["row_positions"])
        return {"step.tree_masks": masks_TW}

    def accepted(self, slots_S: Tensor, rows_S: Tensor, sizes_S: Tensor, num_nodes: int, chosen_R: Tensor) -> Accepted:
        """Of the drafts of each slot those that were chosen. rows, sizes: its first row of logits, and its nodes."""
        if self.kernels is not None:
            left = self._last_token_X, self.num_accepted_X
            return Accepted(*self.kernels.accept(chosen_R, rows_S, sizes_S, slots_S, num_nodes, self._tables(), *left))
        nodes_M = torch.arange(num_nodes, device=self._device)
        rows_SM = (rows_S[:, None] + nodes_M).clamp(max=len(chosen_R))
        chosen_SM = functional.pad(chosen_R, (0, 1), value=NOTHING_TO_SAMPLE)[rows_SM]
        accepted = accept(chosen_SM, *self.trees(slots_S, num_nodes), sizes_S)
        before_S = accepted.counts - 1
        self._last_token_X[slots_S] = accepted.token_ids.gather(1, before_S[:, None])[:, 0]
        self.num_accepted_X[slots_S] = before_S
        return accepted

    def _tables(self) -> Any:
        assert self.kernels is not None
        return self.kernels.TreeTables(self._token_ids, self._parents, self._depths, self._masks, self.can_branch)

    def trees(self, slots_S: Tensor, num_nodes: int) -> tuple[Tensor, Tensor]:
        """The first nodes of each slot's drafts after their root: tokens and parents, [S, M]."""
        token_ids_SN, parents_SN = self._token_ids[slots_S, : num_nodes - 1], self._parents[slots_S, : num_nodes - 1]
        return functional.pad(token_ids_SN, _ROOT), functional.pad(parents_SN, _ROOT)

    def verified_by(self, steps: Sequence[SequenceStep]) -> Drafted | None:
        """What these sequences have drafts of, if any has."""
        num_drafts = [step.num_drafts for step in steps]
        if not any(num_drafts):
            return None
        slots_S = on_device([step.slot for step in steps], torch.int64, self._device)
        return Drafted([1 + count for count in num_drafts], *self.trees(slots_S, 1 + max(num_drafts)))
