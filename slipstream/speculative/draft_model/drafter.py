"""Drafts of a smaller model, whose KV lies in blocks that are numbered as the target's.

    place        0    1    2    3    4    5     one block table for both
    target     the  cat  sat   on  the  rug     the step's rows: "sat on the mat", of which "sat on the" is accepted
    draft      the  cat  sat   on  the [rug]    it has computed "sat on the" when it drafted; now "rug", then its drafts

So prompts that are found again, copied or given up are so for both, and a step with its drafts is one program, which a
GPU records. Rows that drafting has not computed are computed by the draft model as the target has them: a prompt's in
their step, and before it what came while no drafts were asked for (runtime/worker/followed.py). Where all drafts were
accepted, the last of them was never computed: so a draft begins with the last two tokens, the first of which goes to
the null block where it is known.

Drafts are drawn as the request draws: with its temperature, filters and seed, at the same positions, so with the same
noise (accept.py). What it edits (penalties, bans, grammars) the draft model does not know of.

Shape suffixes: S sequences, Q tokens of each, T tokens, N drafts, B blocks, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from slipstream.kernels.attention.metadata import STEP_SHAPES, StepTensors
from slipstream.kernels.sampling import SlotTable
from slipstream.runtime.worker.graphs import compile_graph
from slipstream.runtime.worker.groups import ONE_A_GROUP, group_input, with_groups
from slipstream.runtime.worker.weights import load_weights
from slipstream.schema.kv import group_layers, narrow
from slipstream.schema.request import GenerateRequest
from slipstream.schema.speculative import Speculation
from slipstream.speculative.drafter import DraftTensors, Ends, ModelDrafter, OwnKV, Target, read_options


@dataclass(frozen=True)
class Options:
    model: str = ""  # as slipstream run has it: a folder, an engine, a Hub id; by default one that ships


class Drafter(ModelDrafter):
    default_draft_len = 5

    def __init__(self, speculation: Speculation, target: Target) -> None:
        super().__init__(speculation, target)
        read_options(Options, speculation)
        assert target.draft_engine is not None, "api/drafting.py opens it"
        self._engine, self._choices = target.draft_engine
        self._manifest = manifest = self._engine.manifest
        self._device, self._block_size = target.device, target.manifest.tokens_per_block
        self._weights = load_weights(self._engine.weights, list(self._engine.graph.weights), target.device)
        self._slots = SlotTable(target.max_batch_size, target.device)
        dtypes = [getattr(torch, manifest.kv_dtype_of(layer)) for layer in range(manifest.num_layers)]
        self.own_kv = [OwnKV(manifest.kv_planes, manifest.num_kv_heads, manifest.head_dim, dtype) for dtype in dtypes]

    def lend_blocks(self, window: int) -> None:
        groups = group_layers(narrow(self._manifest.windows, [window] if window else (), self._manifest.max_seq_len))
        graph = with_groups(self._engine.graph, groups)
        self._run, self.can_be_recorded = compile_graph(graph, self._weights, self._choices, self._device)
        self._num_groups = len(groups)

    def take_kv(self, kv: Sequence[Tensor], num_blocks: int) -> None:
        self._kv = {f"kv.{layer}": each for layer, each in enumerate(kv)}

    def start(self, slot: int, token_ids: Sequence[int], request: GenerateRequest) -> None:
        self._slots.write(slot, request.sampling, request.seed)

    @torch.inference_mode()
    def follow(self, step: StepTensors) -> None:
        last, no_rows = self._manifest.max_seq_len - 1, torch.zeros(1, dtype=torch.int64, device=self._device)
        self._compute(replace(step, positions=step.positions.clamp(max=last), logit_rows=no_rows))

    @torch.inference_mode()
    def draft(self, ends: Ends, most: int) -> DraftTensors:
        assert ends.block_tables is not None and ends.previous_ids is not None
        num_sequences, places_S = len(ends.slots), ends.positions
        tables_SB = ends.block_tables.where(ends.slots[:, None] >= 0, 0)  # what is no text writes into the null block
        # All that is known before the tokens are, of every step at once: a GPU waits for launches here.
        starts = torch.arange(num_sequences + 1, device=self._device)
        places_NS = places_S + torch.arange(1 + most, device=self._device)[:, None]
        before_S = (places_S - 1).clamp(min=0)
        slots_NS = self._slots_at(torch.cat((before_S[None], places_NS[:most])), tables_SB)
        last = self._manifest.max_seq_len - 1
        positions_NS = places_NS.clamp(max=last)
        first = StepTensors(
            token_ids=torch.stack((ends.previous_ids, ends.token_ids), 1).flatten(),
            positions=torch.stack((before_S.clamp(max=last), positions_NS[0]), 1).flatten(),
            slots=torch.stack((slots_NS[0].where(ends.previous_ids >= 0, 0), slots_NS[1]), 1).flatten(),
            query_starts=2 * starts,
            kv_lens=places_NS[1],
            block_tables=tables_SB,
            logit_rows=2 * starts[1:] - 1,
        )
        drafts, rows = [self._slots.choose(self._compute(first), ends.slots, places_NS[1])], starts[1:] - 1
        for place in range(1, most):
            step = StepTensors(
                token_ids=drafts[-1],
                positions=positions_NS[place],
                slots=slots_NS[1 + place],
                query_starts=starts,
                kv_lens=places_NS[1 + place],
                block_tables=tables_SB,
                logit_rows=rows,
            )
            drafts.append(self._slots.choose(self._compute(step), ends.slots, places_NS[1 + place]))
        token_ids_SN = torch.stack(drafts, 1)
        parents_SN = torch.arange(most, device=self._device).expand_as(token_ids_SN)
        counts_S = (last - places_S).clamp(0, most)
        return DraftTensors(token_ids_SN, parents_SN, counts_S)

    def _slots_at(self, places_NS: Tensor, tables_SB: Tensor) -> Tensor:
        """Of keys and values; those beyond the model's positions are computed for nobody."""
        blocks_NS = tables_SB.gather(1, (places_NS // self._block_size).T).T
        blocks_NS = blocks_NS.where(places_NS < self._manifest.max_seq_len, 0)
        return (blocks_NS * self._block_size + places_NS % self._block_size).contiguous()

    def _compute(self, step: StepTensors) -> Tensor:
        """The logits of its logit_rows. What the model has no token for is computed as another one."""
        step = replace(step, token_ids=step.token_ids.clamp(0, self._manifest.vocab_size - 1))
        inputs = {f"step.{name}": getattr(step, name) for name in STEP_SHAPES}
        for group in range(1, self._num_groups):
            inputs |= {group_input(name, group): inputs[name] for name in ONE_A_GROUP}
        logits_RV, *_ = self._run({**inputs, **self._kv})
        return logits_RV if self._manifest.logits == "selected" else logits_RV[step.logit_rows]
