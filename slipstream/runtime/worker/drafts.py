"""What is drafted for each slot, where the model is: a plan says how many drafts a step verifies, not which.

Shape suffixes: S sequences, N drafts, M nodes (a sequence's last known token and its drafts), T tokens of the step.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from slipstream.kernels.attention.tree import WORD
from slipstream.runtime.transfer import on_device
from slipstream.runtime.worker.inputs import draft_name
from slipstream.runtime.worker.memory import zeros
from slipstream.runtime.worker.tables import BlockTables
from slipstream.schema.request import GenerateRequest
from slipstream.schema.step import PENDING, SequenceStep, StepPlan
from slipstream.speculative.accept import Accepted
from slipstream.speculative.drafter import Computed, Drafter, LayerDrafter, OwnKV, Running, Verified
from slipstream.speculative.tree import ancestors, chain_parents, check_parents, depths

_ROOT = (1, 0)  # a column before, none after: the root is its own parent, and its token is not looked at


class Drafted(NamedTuple):
    """The trees of a step's sequences, in their order; where the model is."""

    num_nodes: list[int]  # of each, its last token included: so many rows of logits it has
    token_ids: Tensor  # [S, M]
    parents: Tensor  # [S, M]
    is_branching: bool  # whether what is accepted may have to move in the cache


class Drafts:
    """Of all slots. Without a drafter there are none."""

    def __init__(
        self,
        drafter: Drafter | None,
        vocab_size: int,
        num_slots: int,
        device: torch.device,
        texts: Callable[[int], Sequence[int]],
        *,
        max_len: int = 0,
        can_branch: bool = False,
    ) -> None:
        """texts: of each slot the tokens that are known on the host. max_len, can_branch: of the drafter, also where
        another rank has it."""
        self._drafter, self._vocab_size, self._device, self._texts = drafter, vocab_size, device, texts
        self.max_len, self.can_branch = max_len, can_branch
        self.num_mask_words = -(-(1 + self.max_len) // WORD)

        def of_slots(*shape: int) -> Tensor:
            return torch.zeros((num_slots, *shape), dtype=torch.int64, device=device)

        self._token_ids, self._parents = of_slots(self.max_len), of_slots(self.max_len)
        # Of drafts that may branch, and their roots: how far a node is from the root, and what is above it.
        self._depths, self._masks = of_slots(1 + self.max_len), of_slots(1 + self.max_len, self.num_mask_words)
        self._is_taking = [False] * num_slots
        self._is_branching = [False] * num_slots
        self._layer = drafter if isinstance(drafter, LayerDrafter) else None
        self._known: list[Sequence[int]] = [()] * num_slots  # tokens that each text had when it came
        self._told = [0] * num_slots  # tokens of each that the drafter was told of, where it was not asked since
        self._group = 0  # whose blocks the drafter is lent

    def attach(self, running: Running, group: int) -> None:
        """The engine's weights are there. group: of the KV blocks that a drafter's own layer is lent."""
        self._group = group
        assert self._drafter is not None
        self._drafter.attach(running)

    def allocate_kv(self, num_blocks: int, tokens_per_block: int, dtype: torch.dtype) -> list[Tensor]:
        """The drafter's own cache, if it has one: where the model's blocks are copied, its are too."""
        if self._layer is None:
            return []
        own = self._layer.own_kv
        num_more = -(-own.num_ahead // tokens_per_block) * len(self._known)
        shape = (2, num_blocks + num_more, tokens_per_block, own.num_heads, own.head_dim)
        kv_PNBKD = zeros(shape, dtype, self._device)
        self._layer.take_kv(kv_PNBKD, num_blocks)
        return [kv_PNBKD]

    def add(self, slot: int, request: GenerateRequest, output_token_ids: tuple[int, ...]) -> None:
        if self._drafter is None:
            return
        self._known[slot] = (*request.prompt_token_ids, *output_token_ids)
        self._told[slot] = 0
        # A user's function is called once a token, in their order, as it may expect. Last tokens have none after them.
        self._is_taking[slot] = not request.sampling.logits_processors and request.max_tokens > 1
        if self._is_taking[slot]:
            self._drafter.start(slot, self._known[slot], request)

    def remove(self, slot: int) -> None:
        if self._drafter is not None:
            self._drafter.stop(slot)

    @property
    def reads_ends(self) -> bool:
        return self._drafter is not None and self._drafter.reads_ends

    @property
    def own_kv(self) -> OwnKV | None:
        return None if self._layer is None else self._layer.own_kv

    def follow(
        self, plan: StepPlan, hidden_TF: Tensor, said: Iterable[tuple[list[int], list[int]]], tables: BlockTables
    ) -> None:
        """Tell a drafter with a KV cache of its own which rows of a step are text.

        said: of each sequence that samples, the tokens that it gains and the rows that they were chosen in.
        """
        assert self._layer is not None
        samples = iter(said)
        rows, next_ids, first = list[int](), list[list[int]](), 0
        for step in plan.sequences:
            mine, known = range(first, first + len(step.token_ids)), self._known[step.slot]
            following, end = list(step.token_ids[1:]), step.start + len(step.token_ids)
            if step.sample:
                token_ids, chosen_at = next(samples)
                following += [max(0, token_id) for token_id in token_ids]  # where there is none, the request ends
                rows += [*mine, *(mine[-1] + row - chosen_at[0] for row in chosen_at[1:])]
            else:
                following += known[end : end + 1]  # nothing, where a text that is pooled ends
                rows += mine[: len(following)]
            next_ids.append(following)
            first += step.num_tokens
        slots, starts = [step.slot for step in plan.sequences], [step.start for step in plan.sequences]
        longest = max(start + len(ids) for start, ids in zip(starts, next_ids, strict=True))
        tables_SB = tables.of(self._group, np.array(slots), -(-longest // tables.tokens_per_block))
        hidden_NF = hidden_TF[on_device(rows, torch.int64, self._device)]
        self._layer.follow(Computed(slots, starts, next_ids, hidden_NF, torch.from_numpy(tables_SB)))

    def propose(self, steps: Sequence[SequenceStep], accepted: Accepted, hidden_SH: Tensor | None = None) -> list[int]:
        """Drafts for the next step of these sequences, all of which sample: how many each has.

        hidden: where the last token of each was chosen. Raises ValueError for what a drafter may not propose.
        """
        num_drafts = [0] * len(steps)
        if self._drafter is None:
            return num_drafts
        for step in steps:
            if not step.max_drafts and not self._told[step.slot]:
                self._told[step.slot] = step.start + len(step.token_ids)
        asked = [index for index, step in enumerate(steps) if self._is_taking[step.slot] and step.max_drafts]
        if not asked:
            return num_drafts
        positions_S = on_device([step.start + len(step.token_ids) for step in steps], torch.int64, self._device)
        verified = Verified(
            [step.slot for step in steps], [step.max_drafts for step in steps], accepted.counts, accepted.token_ids,
            positions_S + accepted.counts - 1, accepted.chosen, hidden_SH,
        )  # fmt: skip
        if len(asked) < len(steps):
            verified = self._only(asked, verified)
        drafts = self._drafter.draft(self._with_missed([steps[index] for index in asked], verified))
        rows = []
        for index, draft in zip(asked, drafts, strict=True):
            step, chain = steps[index], chain_parents(len(draft.token_ids))
            parents = chain if draft.parents is None else list(draft.parents)
            is_branching = parents != chain
            self._check(draft.token_ids, parents, is_branching)
            self._is_branching[step.slot] = is_branching
            num_drafts[index] = count = min(len(chain), step.max_drafts)
            padding = [0] * (self.max_len - count)
            rows.append([[*draft.token_ids[:count], *padding], [*parents[:count], *padding]])
        if not any(num_drafts):
            return num_drafts
        slots_S = on_device(verified.slots, torch.int64, self._device)
        token_ids_SN, parents_SN = on_device(rows, torch.int64, self._device).unbind(1)
        self._token_ids[slots_S], self._parents[slots_S] = token_ids_SN, parents_SN
        if self.can_branch:
            parents_SM = functional.pad(parents_SN, _ROOT)
            self._depths[slots_S], self._masks[slots_S] = depths(parents_SM), ancestors(parents_SM)
        return num_drafts

    def _only(self, indexes: list[int], verified: Verified) -> Verified:
        index_S = on_device(indexes, torch.int64, self._device)
        hidden_SH = verified.hidden
        return Verified(
            [verified.slots[index] for index in indexes], [verified.max_drafts[index] for index in indexes],
            verified.counts[index_S], verified.token_ids[index_S], verified.positions[index_S],
            verified.chosen[index_S], None if hidden_SH is None else hidden_SH[index_S],
        )  # fmt: skip

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

    def _check(self, token_ids: Sequence[int], parents: Sequence[int], is_branching: bool) -> None:
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
        if is_branching and not self.can_branch:
            raise ValueError("the drafter proposed branches; its class must say can_branch = True")

    def fill(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the step's token ids name, in place. Returns what attention needs besides, where drafts may branch."""
        if not self.max_len:
            return {}
        token_ids_T, slots_T = inputs["step.token_ids"], inputs["token_slots"]
        is_draft_T = token_ids_T < PENDING
        if self._device.type == "cpu" and not bool(is_draft_T.any()):  # to look waits for nothing here
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

    def verified_by(self, steps: Sequence[SequenceStep]) -> Drafted | None:
        """What these sequences have drafts of, if any has."""
        num_drafts = [step.num_drafts for step in steps]
        if not any(num_drafts):
            return None
        slots_S, most = on_device([step.slot for step in steps], torch.int64, self._device), max(num_drafts)
        token_ids_SN, parents_SN = self._token_ids[slots_S, :most], self._parents[slots_S, :most]
        return Drafted(
            [1 + count for count in num_drafts],
            functional.pad(token_ids_SN, _ROOT),
            functional.pad(parents_SN, _ROOT),
            any(self._is_branching[step.slot] for step in steps),
        )
