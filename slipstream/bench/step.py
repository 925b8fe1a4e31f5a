"""A step of made-up tokens, as the worker would run it: real block tables over pages in no order."""

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from slipstream.engine.manifest import Manifest
from slipstream.runtime.worker.inputs import make_inputs
from slipstream.runtime.worker.tables import BlockTables
from slipstream.schema.step import SequenceStep, StepPlan


@dataclass(frozen=True)
class Step:
    rows: int  # tokens that are computed
    context: int  # tokens of each sequence in the KV cache, once they are
    inputs: dict[str, Tensor]  # of the graph, by name
    sizes: dict[str, int]  # what the letters of its shapes stand for


def make_step(manifest: Manifest, rows: int, context: int, device: torch.device) -> Step:
    """Rows up to max_batch_size are the next token of as many sequences; more are prompts, each of `context` tokens."""
    if rows <= manifest.max_batch_size:
        lengths = [1] * rows
    else:
        lengths = [min(context, rows - start) for start in range(0, rows, context)]
    starts = [context - 1 if rows <= manifest.max_batch_size else 0] * len(lengths)
    numbers = random.Random(0)
    blocks_each = -(-context // manifest.tokens_per_block)
    blocks = list(range(1, 1 + blocks_each * len(lengths)))
    numbers.shuffle(blocks)
    groups = len(manifest.kv_groups)
    sequences = [
        SequenceStep(
            slot, start, tuple(numbers.randrange(manifest.vocab_size) for _ in range(length)), sample=True,
            table_changes=tuple((place, (blocks.pop(),) * groups) for place in range(blocks_each)),
        )
        for slot, (start, length) in enumerate(zip(starts, lengths, strict=True))
    ]  # fmt: skip
    num_blocks = 1 + blocks_each * len(lengths)
    plan = StepPlan(0, tuple(sequences))
    tables = BlockTables(groups, len(lengths), manifest.tokens_per_block)
    tables.update(plan)
    inputs = make_inputs(plan, [1] * len(lengths), [True] * len(lengths), tables, device)
    num_sequences, width = inputs["step.block_tables"].shape
    sizes = {"T": rows, "R": num_sequences, "S": num_sequences, "S1": num_sequences + 1, "B": width, "N": num_blocks}
    return Step(rows, context, inputs, sizes)
