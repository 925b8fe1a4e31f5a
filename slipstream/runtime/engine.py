"""Engine: add requests, step, get events. One step is three calls: plan, execute, commit."""

import torch

from slipstream.engine.choices import Choices
from slipstream.engine.folder import Engine as EngineFolder
from slipstream.errors import CapacityError
from slipstream.runtime.scheduler import Scheduler
from slipstream.runtime.worker.memory import count_blocks
from slipstream.runtime.worker.worker import Worker
from slipstream.schema.build import CapacityPolicy, QueuePolicy, RuntimeConfig
from slipstream.schema.kv import group_layers
from slipstream.schema.request import EngineStats, GenerateRequest, TokenEvent


class Engine:
    """The runtime of one engine folder. Not thread-safe: one thread adds, steps and aborts (runtime/loop.py)."""

    def __init__(self, config: RuntimeConfig, worker: Worker) -> None:
        self.config = config
        self._scheduler, self._worker = Scheduler(config), worker

    @property
    def has_work(self) -> bool:
        return self._scheduler.has_work

    @property
    def stats(self) -> EngineStats:
        return self._scheduler.stats()

    def add(self, request: GenerateRequest) -> None:
        """Queue a request. Raises RequestError or CapacityError where it could never run."""
        self._scheduler.add(request)

    def abort(self, request_id: str) -> bool:
        """Stop a request and free what it holds; False where it has ended already."""
        return self._scheduler.abort(request_id)

    def step(self) -> list[TokenEvent]:
        """One iteration over all running sequences: each event is what it did for one request."""
        plan = self._scheduler.plan()
        if plan is None:
            return []
        try:
            result = self._worker.execute(plan)
        except Exception as error:  # whatever a kernel raises ends this step's requests, and no others
            return self._scheduler.fail_step(plan, f"the step failed: {type(error).__name__}: {error}")
        return self._scheduler.commit(plan, result)


def start_engine(
    folder: EngineFolder,
    choices: Choices,
    device: torch.device,
    *,
    max_batch_size: int | None = None,
    max_num_tokens: int | None = None,
    max_seq_len: int | None = None,
    kv_cache_max_tokens: int | None = None,
    kv_cache_free_memory_fraction: float = 0.9,
    capacity_policy: CapacityPolicy = CapacityPolicy.GUARANTEED_NO_EVICT,
    queue_policy: QueuePolicy = QueuePolicy.FIFO,
    enable_chunked_prefill: bool = True,
    enable_block_reuse: bool = True,
) -> Engine:
    """Load the weights, allocate the KV cache and be ready. Limits may be lower than the engine was built for."""
    manifest = folder.manifest
    groups = group_layers([0] * manifest.num_layers)
    num_blocks = count_blocks(
        manifest, device, fraction=kv_cache_free_memory_fraction, max_tokens=kv_cache_max_tokens
    )  # fmt: skip
    config = RuntimeConfig(
        num_blocks=num_blocks,
        kv_groups=groups,
        tokens_per_block=manifest.tokens_per_block,
        max_batch_size=_lowered("max_batch_size", max_batch_size, manifest.max_batch_size),
        max_num_tokens=_lowered("max_num_tokens", max_num_tokens, manifest.max_num_tokens),
        max_seq_len=_lowered("max_seq_len", max_seq_len, manifest.max_seq_len),
        capacity_policy=capacity_policy,
        queue_policy=queue_policy,
        enable_chunked_prefill=enable_chunked_prefill,
        enable_block_reuse=enable_block_reuse,
    )
    return Engine(config, Worker(folder, choices, num_blocks, groups, device))


def _lowered(name: str, asked: int | None, built: int) -> int:
    if asked is not None and not 1 <= asked <= built:
        raise CapacityError(f"{name} is {asked}; this engine was built for 1 to {built}. Build it again for more.")
    return built if asked is None else asked
