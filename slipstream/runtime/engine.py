"""Engine: add requests, step, get events. One step is four calls: plan, launch, collect, commit."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from slipstream.engine.choices import Choices
from slipstream.engine.folder import Engine as EngineFolder
from slipstream.engine.manifest import Manifest
from slipstream.errors import CapacityError, EngineError, RankError, RequestError, in_words
from slipstream.runtime.guidance import Guidance
from slipstream.runtime.meeting import check_ranks
from slipstream.runtime.rank_group import RankGroup
from slipstream.runtime.scheduler import Scheduler
from slipstream.runtime.speculation import open_drafter
from slipstream.runtime.worker.memory import check_kv_dtype
from slipstream.runtime.worker.start import StartOptions, open_worker, use_threads
from slipstream.runtime.worker.worker import Begun, Flight, Worker
from slipstream.schema.build import CapacityPolicy, DraftShape, QueuePolicy, RuntimeConfig
from slipstream.schema.kv import narrow
from slipstream.schema.launch import Launch
from slipstream.schema.request import EngineStats, GenerateRequest, RequestState, TokenEvent
from slipstream.schema.speculative import Speculation
from slipstream.schema.step import StepPlan
from slipstream.speculative.drafter import AnyDrafter, LayerDrafter, ModelDrafter, Target

MAX_SEQ_LEN = 2**31 - 1
# Tokens of a step on a CPU where nobody asks for more: what ops hand on stays in its caches, and streams wait less.
CPU_STEP = 256


@dataclass
class _Step:
    plan: StepPlan
    began_at: float
    num_recordings: int  # when it began
    begun: Begun | None = None
    flight: Flight | None = None  # once it is launched
    error: Exception | None = None  # instead of either


class Engine:
    """The runtime of one engine folder. Not thread-safe: one thread adds, steps and aborts (runtime/loop.py)."""

    def __init__(
        self, config: RuntimeConfig, worker: Worker, guidance: Guidance, group: RankGroup | None = None
    ) -> None:
        self.config, self._guidance, self._group = config, guidance, group
        self._scheduler, self._worker = Scheduler(config), worker
        self._steps: deque[_Step] = deque()  # not yet committed, the oldest first
        self._last_collected = 0.0

    @property
    def has_work(self) -> bool:
        """Whether a step would do something: also where it would find that a rank is gone."""
        return self._scheduler.has_work or (self._group is not None and self._group.is_lost)

    def when_lost(self, call: Callable[[], None]) -> None:
        """Call this, from another thread, when there is work in that a rank is gone."""
        if self._group is not None:
            self._group.on_lost = call

    def begin(self) -> None:
        """On the thread that will step it."""
        if self._group is not None:
            self._group.at_start()

    def close(self) -> None:
        """End the other ranks."""
        if self._group is not None:
            self._worker.close()
            self._group.close()

    @property
    def stats(self) -> EngineStats:
        return self._scheduler.stats()

    def requests(self) -> list[RequestState]:
        """All that have not ended; from any thread."""
        return self._scheduler.requests()

    def prepare(self, request: GenerateRequest) -> None:
        """What `add` would wait for: compile a grammar. From any thread. Raises RequestError for a bad one."""
        if request.sampling.guided is not None:
            self._guidance.prepare(request.sampling.guided)

    def add(self, request: GenerateRequest) -> None:
        """Queue a request. Raises RequestError or CapacityError where it could never run."""
        self.prepare(request)
        if self._group is not None and (request.kv_to or request.kv_from):
            raise RequestError("KV is handed over between engines of one rank so far; leave out kv_to and kv_from.")
        handed_kv = None
        if request.kv_from is not None:
            handed_kv = self._worker.receive(request.kv_from, len(request.prompt_token_ids) - 1)
        self._scheduler.add(request, handed_kv)

    def abort(self, request_id: str) -> bool:
        """Stop a request and free what it holds; False where it has ended already."""
        return self._scheduler.abort(request_id)

    def step(self) -> list[TokenEvent]:
        """One iteration over running sequences: each event is what it did for one request.

        With several stages as many steps are begun, so that each stage computes one of them. On a GPU the next step is
        launched first, where it can be planned, so that the host's work costs no time; and else as soon as it can be,
        so that it computes while others are told of these events.
        Raises RankError where a rank is gone: nothing can be computed any more.
        """
        if self._group is not None:
            self._group.check()
        while len(self._steps) < self.config.num_stages:
            plan = self._scheduler.plan_ahead() if self._steps else self._scheduler.plan()
            if plan is None:
                break
            self._begin(plan)
        if not self._steps:
            return []
        oldest = self._steps[0]
        self._launch(oldest)
        if len(self._steps) == 1 and oldest.flight is not None and self._worker.can_run_ahead(oldest.flight):
            ahead = self._scheduler.plan_ahead()
            if ahead is not None:
                self._launch(self._begin(ahead))
        self._steps.popleft()
        try:
            if oldest.error is not None:
                raise oldest.error
            assert oldest.flight is not None
            result = self._worker.collect(oldest.flight)
        except Exception as error:  # whatever a kernel raises ends this step's requests, and no others
            return self._scheduler.fail_step(oldest.plan, f"the step failed: {in_words(error)}")
        began_at, self._last_collected = max(oldest.began_at, self._last_collected), time.perf_counter()
        seconds = self._last_collected - began_at
        is_usual = self._worker.num_recordings == oldest.num_recordings  # to record takes longer, and not again
        events = self._scheduler.commit(oldest.plan, result, seconds if is_usual else None)
        # Of a group that would raise, and nobody would be told of these events.
        if not self._steps and self._worker.computes_by_itself and self._group is None:
            plan = self._scheduler.plan()
            if plan is not None:
                self._launch(self._begin(plan))
        return events

    def _begin(self, plan: StepPlan) -> _Step:
        step = _Step(plan, time.perf_counter(), self._worker.num_recordings)
        self._steps.append(step)
        try:
            step.begun = self._worker.begin(plan)
        except Exception as error:
            self._fail(step, error)
        return step

    def _launch(self, step: _Step) -> None:
        if step.begun is None or step.flight is not None or step.error is not None:
            return
        try:
            step.flight = self._worker.launch(step.begun)
        except Exception as error:
            self._fail(step, error)

    def _fail(self, step: _Step, error: Exception) -> None:
        if self._group is not None:  # this rank may be in the midst of a step, alone
            raise self._group.why(error) from None
        step.error = error


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
    speculation: Speculation | None = None,
    draft_engine: tuple[EngineFolder, Choices] | None = None,
    read_tokenizer: Callable[[], str] | None = None,
    plugins: Sequence[str] = (),
) -> Engine:
    """Load the weights, allocate the KV cache in what they leave and be ready.

    Limits may be lower than the engine was built for; max_num_tokens, left out, is on a CPU.

    max_attention_window_size: tokens that a token sees, one for each layer or repeated over them; it narrows what the
    model has. sink_token_length: of these, the first tokens of a sequence, which stay in sight (StreamingLLM,
    arXiv:2309.17453); then max_seq_len may be more than the engine was built for. deterministic: a request's tokens and
    logprobs are to the last bit those that it gets alone. speculation: how drafts are made; draft_engine: of the model
    that they are made by, where its method asks for one. read_tokenizer: the text of a tokenizer.json, for guided
    requests; called with the first of them. plugins: modules that declare ops of the engine, which each rank imports.
    """
    manifest = folder.manifest
    # Positions inside a window are all that a model with sinks ever meets: a sequence may go on for ever.
    longest = MAX_SEQ_LEN if sink_token_length else manifest.max_seq_len
    max_seq_len = _lowered("max_seq_len", max_seq_len, longest, default=manifest.max_seq_len)
    _check_windows(manifest, max_attention_window_size, sink_token_length, max_seq_len)
    check_kv_dtype(manifest, device)
    max_batch_size = _lowered("max_batch_size", max_batch_size, manifest.max_batch_size)
    guidance = Guidance(read_tokenizer, manifest.eos_token_ids)
    drafter = None
    if speculation is not None:
        target = Target(folder, device, max_batch_size, max_seq_len, draft_engine=draft_engine)
        drafter = open_drafter(speculation, target)
        if drafter.reads_hidden and not folder.has_hidden_states:
            raise EngineError(
                f"{speculation.method} drafts from hidden states, which this engine does not give; build it again."
            )
    max_draft_len, tokens_ahead, draft_shape = 0, 0, DraftShape.CHAIN
    if drafter is not None:
        max_draft_len, draft_shape = drafter.max_draft_len, _shape_of(drafter)
        tokens_ahead = max_draft_len if isinstance(drafter, ModelDrafter) else 0
    usual = manifest.max_num_tokens
    if device.type == "cpu" and enable_chunked_prefill:
        usual = min(usual, max(CPU_STEP, max_batch_size * (1 + max_draft_len)))
    options = StartOptions(
        max_batch_size=max_batch_size,
        max_num_tokens=_lowered("max_num_tokens", max_num_tokens, manifest.max_num_tokens, default=usual),
        max_seq_len=max_seq_len,
        kv_cache_max_tokens=kv_cache_max_tokens,
        kv_cache_max_bytes=kv_cache_max_bytes,
        kv_cache_free_memory_fraction=kv_cache_free_memory_fraction,
        max_attention_window_size=tuple(max_attention_window_size),
        sink_token_length=sink_token_length,
        deterministic=deterministic,
        max_draft_len=max_draft_len,
        tokens_ahead=tokens_ahead,
        drafts_branch=drafter is not None and drafter.can_branch,
        reads_hidden=() if drafter is None else drafter.reads_hidden,
    )
    group: RankGroup | None = None
    check_ranks(manifest.num_ranks, device)
    if manifest.num_ranks == 1:
        worker, num_blocks = open_worker(folder, choices, device, options, guidance=guidance, drafter=drafter)
    else:
        group, worker, num_blocks = _start_ranks(folder, choices, device, options, guidance, drafter, plugins)
    config = RuntimeConfig(
        num_blocks=num_blocks,
        kv_groups=options.groups(manifest.windows),
        tokens_per_block=manifest.tokens_per_block,
        max_batch_size=max_batch_size,
        max_num_tokens=options.max_num_tokens,
        max_seq_len=max_seq_len,
        capacity_policy=capacity_policy,
        queue_policy=queue_policy,
        enable_chunked_prefill=enable_chunked_prefill,
        enable_block_reuse=enable_block_reuse,
        max_draft_len=options.max_draft_len,
        draft_shape=draft_shape,
        # Their number follows the clock, and the last bit of a sum may follow their number.
        is_adaptive=speculation is not None and speculation.adaptive and not deterministic,
        recomputes_last_found=isinstance(drafter, LayerDrafter),
        tokens_ahead=tokens_ahead,
        takes_late_steps=worker.takes_late_steps,
        num_stages=manifest.pp_size if drafter is None else 1,  # drafts are known when the step before has ended
    )
    return Engine(config, worker, guidance, group)


def _start_ranks(
    folder: EngineFolder, choices: Choices, device: torch.device, options: StartOptions, guidance: Guidance,
    drafter: AnyDrafter | None, plugins: Sequence[str],
) -> tuple[RankGroup, Worker, int]:  # fmt: skip
    """Start the other ranks, and this one with them. Raises what keeps any of them from it."""
    mapping = folder.manifest.mapping
    before = torch.get_num_threads()
    shares_cores = device.type == "cpu" and Launch.read() is None  # a launcher has shared them out already
    num_threads = max(1, before // mapping.num_ranks) if shares_cores else before
    setup = {
        "engine": str(folder.path), "kernels": choices.kernels, "options": options.to_json(),
        "num_threads": num_threads if shares_cores else None, "plugins": list(plugins),
    }  # fmt: skip
    group = RankGroup(mapping, setup, device, lambda: use_threads(num_threads), at_end=lambda: use_threads(before))
    try:
        group.at_start()
        worker, num_blocks = open_worker(
            folder, choices, device, options, group.join(), guidance=guidance, drafter=drafter, announce=group.announce
        )
    except Exception as error:
        why = group.why(error) if group.is_lost or isinstance(error, RankError) else error
        group.close()
        raise why from None
    finally:
        torch.set_num_threads(before)  # this thread's: each has a number of its own
    return group, worker, num_blocks


def _shape_of(drafter: AnyDrafter) -> DraftShape:
    if not drafter.can_be_cut:
        return DraftShape.WHOLE
    return DraftShape.TREE if drafter.can_branch else DraftShape.CHAIN


def _lowered(name: str, asked: int | None, built: int, default: int | None = None) -> int:
    if asked is not None and not 1 <= asked <= built:
        raise CapacityError(f"{name} is {asked}; this engine was built for 1 to {built}. Build it again for more.")
    return (default or built) if asked is None else asked


def _check_windows(manifest: Manifest, asked: Sequence[int], sink_token_length: int, max_seq_len: int) -> None:
    num_layers = manifest.num_layers
    if len(asked) > num_layers:
        raise CapacityError(
            f"max_attention_window_size has {len(asked)} windows; give at most {num_layers}, one a layer."
        )
    if sink_token_length:
        _check_sinks(manifest, narrow(manifest.windows, asked, max_seq_len), sink_token_length, max_seq_len)


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
