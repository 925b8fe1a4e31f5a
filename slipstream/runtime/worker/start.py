"""Starting a worker: weights, KV cache, recorded steps. Every rank of an engine does it, with the same options."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import torch

from slipstream.engine.choices import Choices
from slipstream.engine.folder import Engine
from slipstream.kernels.collectives import ALONE, Ranks
from slipstream.kernels.cpu import library
from slipstream.runtime.guidance import Guidance
from slipstream.runtime.worker.memory import count_blocks
from slipstream.runtime.worker.worker import Announce, Worker
from slipstream.schema.kv import KVGroup, group_layers, narrow
from slipstream.speculative.drafter import AnyDrafter


@dataclass(frozen=True, kw_only=True)
class StartOptions:
    """What a worker is started with, checked and resolved; as JSON for ranks in other processes."""

    max_batch_size: int
    max_num_tokens: int
    max_seq_len: int
    kv_cache_max_tokens: int | None
    kv_cache_max_bytes: int | None
    kv_cache_free_memory_fraction: float
    max_attention_window_size: Sequence[int]
    sink_token_length: int
    deterministic: bool
    # of the drafter
    max_draft_len: int
    tokens_ahead: int
    drafts_branch: bool
    reads_hidden: Sequence[int]

    def groups(self, windows: Sequence[int]) -> tuple[KVGroup, ...]:
        narrowed = narrow(windows, self.max_attention_window_size, self.max_seq_len)
        return group_layers(narrowed, self.sink_token_length)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        return cls(**values)


def open_worker(
    folder: Engine,
    choices: Choices,
    device: torch.device,
    options: StartOptions,
    ranks: Ranks = ALONE,
    *,
    guidance: Guidance | None = None,
    drafter: AnyDrafter | None = None,
    announce: Announce | None = None,
) -> tuple[Worker, int]:
    """A worker that is ready, and the number of its KV blocks, the same on all ranks.

    guidance, drafter and announce are the first rank's.
    """
    manifest = folder.manifest
    groups = manifest.those_here(options.groups(manifest.windows))
    worker = Worker(
        folder, choices, groups, options.max_batch_size, device,
        guidance=guidance, drafter=drafter, max_draft_len=options.max_draft_len, tokens_ahead=options.tokens_ahead,
        drafts_branch=options.drafts_branch, reads_hidden=options.reads_hidden,
        is_deterministic=options.deterministic, ranks=ranks, announce=announce,
    )  # fmt: skip
    left = worker.memory_left(options.max_num_tokens)
    num_blocks = count_blocks(
        manifest, groups, device, left // ranks.num_here if device.type == "cpu" else left,
        fraction=options.kv_cache_free_memory_fraction, max_tokens=options.kv_cache_max_tokens,
        max_bytes=options.kv_cache_max_bytes, max_seq_len=options.max_seq_len,
        more_bytes_per_token=worker.drafter_bytes_per_token,
    )  # fmt: skip
    num_blocks = ranks.least(num_blocks)
    worker.allocate_kv(num_blocks)
    worker.record(options.max_num_tokens)
    return worker, num_blocks


def use_threads(count: int) -> None:
    """Of a CPU's cores, in torch's products and in ours."""
    torch.set_num_threads(count)
    library.use_threads(count)
