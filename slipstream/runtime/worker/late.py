"""Late steps: those that are launched before it is known how many drafts of the step before are accepted.

    step k      … on │ the  cat* rug*          verifies two drafts; nobody knows yet which are accepted
    step k + 1             ?                   is planned, and written by the host, as if none were: at the next place
    on the device            ?                 moved on by as many as were, before its first kernel reads its places

The host has seen to blocks for all of them. What the device knows of each slot is how many drafts its last step has
accepted, and its last token (kernels/sampling.py: SlotTable), which is PENDING in the step.

Shape suffixes: S sequences, T tokens, R rows of logits, B blocks, X slots, the last of which is of those without one.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from slipstream.runtime.worker.groups import group_input

_OF_GROUP = ("step.slots", "step.block_tables")


def move_on(
    inputs: Mapping[str, Tensor], accepted_X: Tensor, num_groups: int, tokens_per_block: int, *, can_branch: bool
) -> None:
    """In place: where the tokens of late steps are, in their texts and in the cache. accepted: by each slot's last.

    can_branch: where drafts do, a GPU sets rows' positions when it fills trees in.
    """
    if accepted_X.is_cuda:
        from slipstream.kernels.triton import trees

        for group in range(num_groups):
            slots_T, tables_SB = (inputs[group_input(name, group)] for name in _OF_GROUP)
            trees.move_on(inputs, accepted_X, slots_T, tables_SB, tokens_per_block, is_first=group == 0)
        if can_branch:
            return
    else:
        _move_on(inputs, accepted_X, num_groups, tokens_per_block)
    torch.add(inputs["step.positions"][inputs["step.logit_rows"]], 1, out=inputs["row_positions"])


def _move_on(inputs: Mapping[str, Tensor], accepted_X: Tensor, num_groups: int, tokens_per_block: int) -> None:
    late_S, starts, positions_T = inputs["late_slots"], inputs["step.query_starts"], inputs["step.positions"]
    by_S = accepted_X[late_S].where(late_S >= 0, 0)
    if not bool(by_S.any()):
        return
    inputs["step.kv_lens"].add_(by_S)
    inputs["step.tree_starts"].add_(by_S)
    tokens_T = torch.arange(len(positions_T))
    sequences_T = torch.searchsorted(starts[1:], tokens_T, right=True).clamp(max=len(late_S) - 1)
    is_late_T = (late_S[sequences_T] >= 0) & (tokens_T < starts[-1])
    positions_T.add_(by_S[sequences_T].where(is_late_T, 0))
    for group in range(num_groups):
        slots_T, tables_SB = (inputs[group_input(name, group)] for name in _OF_GROUP)
        blocks_T = tables_SB[sequences_T].gather(1, (positions_T // tokens_per_block)[:, None])[:, 0]
        slots_T.copy_((blocks_T * tokens_per_block + positions_T % tokens_per_block).where(is_late_T, slots_T))
