"""Running an engine's graph directly, for comparing its logits with another implementation's."""

from pathlib import Path

import torch
from torch import Tensor

from slipstream.build.cache import tuned_choices
from slipstream.engine.folder import open_engine
from slipstream.kernels.attention.metadata import StepTensors
from slipstream.kernels.collectives import ALONE, Ranks
from slipstream.runtime.worker.graphs import compile_graph
from slipstream.runtime.worker.memory import allocate_kv
from slipstream.schema.kv import KVGroup


class GraphRunner:
    """One sequence over one engine: feed it tokens in any chunks, get the logits of each."""

    def __init__(self, engine_folder: Path, max_tokens: int = 512, rank: int = 0, ranks: Ranks = ALONE) -> None:
        cpu = torch.device("cpu")
        engine = open_engine(engine_folder, rank)
        self._block_size = engine.manifest.tokens_per_block
        weights = {name: engine.weights.read(name) for name in engine.graph.weights}
        self._step = compile_graph(engine.graph, weights, tuned_choices(engine, cpu), cpu, ranks=ranks).run
        num_blocks = -(-max_tokens // self._block_size) + 1
        # Blocks in reverse order: a block table that is not the identity.
        self._blocks = torch.arange(num_blocks - 1, 0, -1)
        group = KVGroup(tuple(range(engine.manifest.num_layers)))
        caches = allocate_kv(engine.manifest, [group], num_blocks, cpu)
        self._kv = {f"kv.{i}": kv for i, kv in enumerate(caches)}
        self._num_tokens = 0

    @torch.inference_mode()
    def logits(self, token_ids: list[int]) -> Tensor:
        """Logits [len(token_ids), vocab_size] of the next tokens of the sequence."""
        positions = torch.arange(self._num_tokens, self._num_tokens + len(token_ids))
        self._num_tokens += len(token_ids)
        step = StepTensors(
            token_ids=torch.tensor(token_ids),
            positions=positions,
            slots=self._blocks[positions // self._block_size] * self._block_size + positions % self._block_size,
            query_starts=torch.tensor([0, len(token_ids)]),
            kv_lens=torch.tensor([self._num_tokens]),
            block_tables=self._blocks[None],
            logit_rows=torch.arange(len(token_ids)),
        )
        logits_TV, *_ = self._step({f"step.{name}": tensor for name, tensor in vars(step).items()} | self._kv)
        return logits_TV


def pooled(states_TH: Tensor, pooling: str) -> Tensor:
    """The vector of a text, of length 1, from its hidden states."""
    vector_H = states_TH.mean(0) if pooling == "mean" else states_TH[-1]
    return vector_H / vector_H.norm()
