"""Engine: add requests, step, get events. One step is four calls: plan, launch, collect, commit."""

from collections import deque
from collections.abc import Callable, Sequence

import torch

from slipstream.engine.choices import Choices
from slipstream.engine.folder import Engine as EngineFolder
from slipstream.engine.manifest import Manifest
from slipstream.errors import CapacityError, SlipstreamError
from slipstream.runtime.guidance import Guidance
from slipstream.runtime.scheduler import Scheduler
from slipstream.runtime.worker.memory import check_kv_dtype, count_blocks
from slipstream.runtime.worker.worker import Flight, Worker
from slipstream.schema.build import CapacityPolicy, QueuePolicy, RuntimeConfig
from slipstream.schema.kv import KVGroup, group_layers, narrow
from slipstream.schema.request import EngineStats, GenerateRequest, TokenEvent
from slipstream.schema.step import StepPlan

MAX_SEQ_LEN = 2**31 - 1


class Engine:
    """The runtime of one engine folder. Not thread-safe: one thread adds, steps and aborts (runtime/loop.py)."""

    def __init__(self, config: RuntimeConfig, worker: Worker, guidance: Guidance) -> None:
        self.config, self._guidance = config, guidance
        self._scheduler, self._worker = Scheduler(config), worker
        self._launched: deque[tuple[StepPlan, Flight | Exception]] = deque()  # steps not yet committed, two at most

    @property
    def has_work(self) -> bool:
        return self._scheduler.has_work

    @property
    def stats(self) -> EngineStats:
        return self._scheduler.stats()

    def prepare(self, request: GenerateRequest) -> None:
        """What `add` would wait for: compile a grammar. From any thread. Raises RequestError for a bad one."""
        if request.sampling.guided is not None:
            self._guidance.prepare(request.sampling.guided)

    def add(self, request: GenerateRequest) -> None:
        """Queue a request. Raises RequestError or CapacityError where it could never run."""
        self.prepare(request)
        self._scheduler.add(request)

    def abort(self, request_id: str) -> bool:
        """Stop a request and free what it holds; False where it has ended already."""
        return self._scheduler.abort(request_id)

    def step(self) -> list[TokenEvent]:
        """One iteration over all running sequences: each event is what it did for one request.

        On a GPU the next step is launched first, where it can be planned, so that the host's work costs no time.
        """
        if not self._launched:
            plan = self._scheduler.plan()
            if plan is None:
                return []
            self._launch(plan)
        _, flight = self._launched[0]
        if len(self._launched) == 1 and isinstance(flight, Flight) and self._worker.can_run_ahead(flight):
            ahead = self._scheduler.plan_ahead()
            if ahead is not None:
                self._launch(ahead)
        plan, flight = self._launched.popleft()
        try:
            if isinstance(flight, Exception):
                raise flight
            result = self._worker.collect(flight)
        except Exception as error:  # whatever a kernel raises ends this step's requests, and no others
            why = str(error) if isinstance(error, SlipstreamError) else f"{type(error).__name__}: {error}"
            return self._scheduler.fail_step(plan, f"the step failed: {why}")
        return self._scheduler.commit(plan, result)

    def _launch(self, plan: StepPlan) -> None:
        try:
            self._launched.append((plan, self._worker.launch(plan)))
        except Exception as error:
            self._launched.append((plan, error))


def start_engine(
    folder: EngineFolder,
    choices: Choices,
    device: torch.device,
    *,
    max_batch_size: int | None = None,
    max_num_tokens: int | None = None,
    max_seq_len: int | None = None,
    kv_cache_max_tokens: int | None = None,
    kv_cache_max_bytes: int | None = None,
    kv_cache_free_memory_fraction: float = 0.9,
    max_attention_window_size: Sequence[int] = (),
    sink_token_length: int = 0,
    capacity_policy: CapacityPolicy = CapacityPolicy.GUARANTEED_NO_EVICT,
    queue_policy: QueuePolicy = QueuePolicy.FIFO,
    enable_chunked_prefill: bool = True,
    enable_block_reuse: bool = True,
    deterministic: bool = False,
    read_tokenizer: Callable[[], str] | None = None,
) -> Engine:
    """Load the weights, allocate the KV cache in what they leave and be ready.

    Limits may be lower than the engine was built for.

    max_attention_window_size: tokens that a token sees, one for each layer or repeated over them; it narrows what the
    model has. sink_token_length: of these, the first tokens of a sequence, which stay in sight (StreamingLLM,
    arXiv:2309.17453); then max_seq_len may be more than the engine was built for. deterministic: a request's tokens and
    logprobs are to the last bit those that it gets alone. read_tokenizer: the text of a tokenizer.json, for guided
    requests; called with the first of them.
    """
    manifest = folder.manifest
    # Positions inside a window are all that a model with sinks ever meets: a sequence may go on for ever.
    longest = MAX_SEQ_LEN if sink_token_length else manifest.max_seq_len
    max_seq_len = _lowered("max_seq_len", max_seq_len, longest, default=manifest.max_seq_len)
    groups = _kv_groups(manifest, max_attention_window_size, sink_token_length, max_seq_len)
    check_kv_dtype(manifest, device)
    max_batch_size = _lowered("max_batch_size", max_batch_size, manifest.max_batch_size)
    max_num_tokens = _lowered("max_num_tokens", max_num_tokens, manifest.max_num_tokens)
    guidance = Guidance(read_tokenizer, manifest.eos_token_ids)
    worker = Worker(folder, choices, groups, max_batch_size, device, guidance=guidance, is_deterministic=deterministic)
    num_blocks = count_blocks(
        manifest, groups, device, worker.memory_left(max_num_tokens),
        fraction=kv_cache_free_memory_fraction, max_tokens=kv_cache_max_tokens, max_bytes=kv_cache_max_bytes,
        max_seq_len=max_seq_len,
    )  # fmt: skip
    worker.allocate_kv(num_blocks)
    worker.record(max_num_tokens)
    config = RuntimeConfig(
        num_blocks=num_blocks,
        kv_groups=groups,
        tokens_per_block=manifest.tokens_per_block,
        max_batch_size=max_batch_size,
        max_num_tokens=max_num_tokens,
        max_seq_len=max_seq_len,
        capacity_policy=capacity_policy,
        queue_policy=queue_policy,
        enable_chunked_prefill=enable_chunked_prefill,
        enable_block_reuse=enable_block_reuse,
    )
    return Engine(config, worker, guidance)


def _lowered(name: str, asked: int | None, built: int, default: int | None = None) -> int:
    if asked is not None and not 1 <= asked <= built:
        raise CapacityError(f"{name} is {asked}; this engine was built for 1 to {built}. Build it again for more.")
    return (default or built) if asked is None else asked


def _kv_groups(
    manifest: Manifest, asked: Sequence[int], sink_token_length: int, max_seq_len: int
) -> tuple[KVGroup, ...]:
    num_layers = manifest.num_layers
    if len(asked) > num_layers:
        raise CapacityError(
            f"max_attention_window_size has {len(asked)} windows; give at most {num_layers}, one a layer."
        )
    windows = narrow(manifest.windows, asked, max_seq_len)
    if sink_token_length:
        _check_sinks(manifest, windows, sink_token_length, max_seq_len)
    return group_layers(windows, sink_token_length)


def _check_sinks(manifest: Manifest, windows: Sequence[int], sink_token_length: int, max_seq_len: int) -> None:
    narrowest, widest = min(windows), max(windows)
    most = min(window or manifest.max_seq_len for window in (*manifest.windows, manifest.max_seq_len))
    if narrowest != widest or widest > manifest.max_seq_len or (not widest and max_seq_len > manifest.max_seq_len):
        raise CapacityError(
            "sink_token_length needs one window for all layers, of positions that the model knows; "
            f"give max_attention_window_size, at most {most}."
        )
    window = widest or max_seq_len
    if sink_token_length >= window:
        raise CapacityError(
            f"sink_token_length is {sink_token_length}; it must be less than the window of {window} tokens, such as "
            f"{min(4, window - 1)}."
        )
