"""StepTensors: what one step looks like to a model. Made by runtime/worker/inputs.py, read by the ops."""

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class StepTensors:
    """T tokens of S sequences, packed without padding; all int64.

    token_ids     [T]     tokens of sequence 0, then of sequence 1, ...
    positions     [T]     each token's place in its sequence, from 0
    slots         [T]     where its K and V go: block id * block size + offset
    query_starts  [S + 1] sequence s owns tokens query_starts[s] to query_starts[s + 1]
    kv_lens       [S]     tokens of the sequence in the KV cache once this step has written its own
    block_tables  [S, B]  KV block ids of each sequence, padded with block 0
    logit_rows    [R]     tokens whose logits are wanted
    """

    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    query_starts: Tensor
    kv_lens: Tensor
    block_tables: Tensor
    logit_rows: Tensor


STEP_SHAPES: dict[str, tuple[str, ...]] = {
    "token_ids": ("T",),
    "positions": ("T",),
    "slots": ("T",),
    "query_starts": ("S1",),
    "kv_lens": ("S",),
    "block_tables": ("S", "B"),
    "logit_rows": ("R",),
}
assert list(STEP_SHAPES) == [field.name for field in fields(StepTensors)]

torch.export.register_dataclass(StepTensors, serialized_type_name="slipstream.StepTensors")
