"""The processes that share a model. The first is the engine's own: it schedules, and tells the others what a step is.

Each of the others (rank_process.py) is a child whose stdin brings the plans and is its lifeline, and whose stdout says
that it lives. Numbers go from rank to rank by gloo on CPUs and by NCCL on GPUs. One that dies or falls silent takes all
with it: a step cannot go on without its part, and nothing of the others' state is worth more than a new start.
"""

import contextlib
import json
import selectors
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from slipstream.errors import CapacityError, RankError
from slipstream.runtime.one_shot import open_one_shot
from slipstream.schema.mapping import Mapping
from slipstream.schema.request import GenerateRequest
from slipstream.schema.sampling import SamplingParams
from slipstream.schema.step import BlockCopy, SequenceStep, StepPlan

BEAT_SECONDS = 1.0  # a rank says that it lives
SILENCE_SECONDS = 20.0  # after which it does not
COLLECTIVE_SECONDS = 120.0  # that ranks wait for each other within a step
_GOODBYE_SECONDS = 5.0

_NEW = GenerateRequest("", (), SamplingParams(), 0, 1)  # of whom the other ranks know only that there is one


class ProcessRanks:
    """Ranks in processes of their own (kernels/collectives.py: Ranks)."""

    def __init__(self, store: Path, rank: int, mapping: Mapping, device: torch.device) -> None:
        """Waits for the others. Raises RankError where they do not come."""
        if device.type == "cuda":
            device = torch.device("cuda", device.index or 0)
        self.rank, self.size = rank, mapping.num_ranks
        self._mapping, self._device = mapping, device
        self._all = self._stage = _join(store, rank, self.size, device)
        of_stage, place = store.with_name(f"{store.name}-{mapping.stage(rank)}"), mapping.place(rank)
        if mapping.pp_size > 1:
            self._stage = _join(of_stage, place, mapping.tp_size, device)
        self._one_shot = open_one_shot(of_stage, place, mapping.tp_size, device) if mapping.tp_size > 1 else None
        self._sending: Any = None

    def add_up(self, x: Tensor) -> Tensor:
        if self._one_shot is not None and self._one_shot.takes(x):
            return self._one_shot.add_up(x)
        total = x.clone()
        self._wait(lambda: self._stage.allreduce([total]))  # a sum, unless it is told otherwise
        return total

    def collect(self, x: Tensor) -> Tensor:
        parts = x.new_empty(self._mapping.tp_size, *x.shape)
        self._wait(lambda: self._stage.allgather([list(parts.unbind())], [x]))
        return parts

    def send(self, x: Tensor) -> None:
        """A CPU goes on while it travels: the next stage may be busy with the step before."""
        if self._sending is not None:
            self._wait(lambda: self._sending)
        self._sending = self._all.send([x], self._mapping.after(self.rank), 0)
        if self._device.type == "cuda":  # the stream waits, not the host
            self._wait(lambda: self._sending)
            self._sending = None

    def receive(self, x: Tensor) -> None:
        self._wait(lambda: self._all.recv([x], self._mapping.before(self.rank), 0))

    def copy_first(self, x: Tensor) -> None:
        options = dist.BroadcastOptions()
        options.rootRank = 0
        self._wait(lambda: self._all.broadcast([x], options))

    def least(self, number: int) -> int:
        found, options = torch.tensor([number], device=self._device), dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp(dist.ReduceOp.MIN)
        self._wait(lambda: self._all.allreduce([found], options))
        return int(found)

    def abort(self) -> None:
        """From another thread: whoever waits for a rank that is gone gets an error."""
        for group in dict.fromkeys((self._all, self._stage)):
            group.abort()
        if self._one_shot is not None:
            self._one_shot.release()

    def _wait(self, start: Callable[[], Any]) -> None:
        try:
            start().wait()
        except RuntimeError as error:
            raise RankError(f"Rank {self.rank} could not reach the others ({_first_line(error)}).") from None


def _join(store: Path, rank: int, size: int, device: torch.device) -> Any:
    files, limit = dist.FileStore(str(store), size), timedelta(seconds=COLLECTIVE_SECONDS)
    files.set_timeout(limit)
    try:
        if device.type == "cuda":
            torch.cuda.set_device(device)
            nccl = dist.ProcessGroupNCCL.Options()
            nccl._timeout = limit
            return dist.ProcessGroupNCCL(files, rank, size, nccl)
        gloo: Any = dist.ProcessGroupGloo  # whose options have no types
        options = gloo._Options()
        options._timeout = limit
        options._devices = [gloo.create_device(hostname="127.0.0.1")]  # ranks are of one machine
        return gloo(files, rank, size, options)
    except RuntimeError as error:
        raise RankError(f"Rank {rank} of {size} could not join the others ({_first_line(error)}).") from None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0].rstrip(".")


class RankGroup:
    """All ranks, as the first of them has them. `ranks` are there after `join`."""

    def __init__(
        self, mapping: Mapping, setups: Sequence[dict[str, Any]], device: torch.device,
        at_start: Callable[[], None], at_end: Callable[[], None],
    ) -> None:  # fmt: skip
        """setups: for rank 1 and so on, what rank_process.py reads first. Raises CapacityError for too few GPUs."""
        check_devices(mapping.num_ranks, device)
        self.at_start, self._at_end = at_start, at_end  # on the thread that computes
        self.on_lost: Callable[[], None] = lambda: None  # called from another thread
        self._mapping, self._device = mapping, device
        self._folder = Path(tempfile.mkdtemp(prefix="slipstream-ranks-"))
        self._ranks: ProcessRanks | None = None
        self._lost = ""
        self._is_lost, self._is_closed = threading.Event(), threading.Event()
        self._are_here = threading.Event()  # the others, or it is known that one will never be
        self._num_here = 0
        self._processes = [_start() for _ in setups]
        self._watcher = threading.Thread(target=self._watch, name="slipstream-ranks", daemon=True)
        for process, setup in zip(self._processes, setups, strict=True):
            self._tell(process, setup | {"store": str(self._store), "mapping": asdict(mapping)})
        self._watcher.start()

    @property
    def _store(self) -> Path:
        return self._folder / "store"

    @property
    def is_lost(self) -> bool:
        return self._is_lost.is_set()

    def join(self) -> ProcessRanks:
        """Once the others are there. Raises RankError where one has ended before."""
        self._are_here.wait()
        self.check()
        self._ranks = ProcessRanks(self._store, 0, self._mapping, self._device)
        return self._ranks

    def announce(self, plan: StepPlan, logit_counts: Sequence[int]) -> None:
        """Tell the other ranks of a step, which they then compute with this one."""
        line = plan_to_json(plan, logit_counts)
        for process in self._processes:
            self._tell(process, line)

    def why(self, error: Exception) -> RankError:
        """What a failure of this rank's step comes from: mostly of another rank, which is known soon."""
        if isinstance(error, RankError):
            self._is_lost.wait(_GOODBYE_SECONDS)
        else:
            self._lose(f"rank 0 failed within a step: {type(error).__name__}: {error}")
        reason = self._lost or str(error).rstrip(".")
        return RankError(f"{reason}; the ranks cannot go on without each other.")

    def check(self) -> None:
        """Raises RankError where a rank is gone."""
        if self.is_lost:
            raise self.why(RankError(self._lost))

    def close(self) -> None:
        """End the others; they end too where this process does."""
        if self._is_closed.is_set():
            return
        self._is_closed.set()
        for process in self._processes:
            assert process.stdin is not None
            with contextlib.suppress(OSError):
                process.stdin.close()
        end = time.monotonic() + _GOODBYE_SECONDS
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, end - time.monotonic()))
        self._end_all()
        self._watcher.join()
        shutil.rmtree(self._folder, ignore_errors=True)
        self._at_end()

    def _tell(self, process: "subprocess.Popen[bytes]", message: Any) -> None:
        assert process.stdin is not None
        with contextlib.suppress(OSError):  # it is gone, which its stdout tells
            process.stdin.write(json.dumps(message).encode() + b"\n")
            process.stdin.flush()

    def _watch(self) -> None:
        """Reads what the others say, until they end."""
        with selectors.DefaultSelector() as selector:
            heard: dict[int, float] = {}  # of those that have started
            for rank, process in enumerate(self._processes, 1):
                selector.register(process.stdout, selectors.EVENT_READ, rank)  # type: ignore[arg-type]
            while selector.get_map():
                for key, _ in selector.select(BEAT_SECONDS):
                    line = key.fileobj.readline()  # type: ignore[union-attr]
                    if line:
                        heard[key.data] = time.monotonic()
                        self._listen(key.data, json.loads(line))
                    else:
                        selector.unregister(key.fileobj)
                        heard.pop(key.data, None)
                        self._note_end(key.data)
                for rank, last in heard.items():
                    if time.monotonic() - last > SILENCE_SECONDS:
                        self._lose(f"rank {rank} has not answered for {SILENCE_SECONDS:.0f} seconds")

    def _listen(self, rank: int, said: dict[str, Any]) -> None:
        self._num_here += "is_here" in said
        if self._num_here == len(self._processes):
            self._are_here.set()
        if "error" in said:
            self._lose(f"rank {rank}: {str(said['error']).rstrip('.')}")

    def _note_end(self, rank: int) -> None:
        if not self._is_closed.is_set():
            code = self._processes[rank - 1].wait()
            self._lose(f"rank {rank} has ended, " + (f"by signal {-code}" if code < 0 else f"with exit code {code}"))

    def _lose(self, why: str) -> None:
        """The first reason counts: what follows it follows from it."""
        if self.is_lost or self._is_closed.is_set():
            return
        self._lost = why
        self._is_lost.set()
        self._are_here.set()
        self._end_all()
        if self._ranks is not None:
            self._ranks.abort()
        self.on_lost()

    def _end_all(self) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.kill()


def check_devices(size: int, device: torch.device) -> None:
    """Raises CapacityError where there are fewer GPUs than ranks."""
    if device.type != "cuda":
        return
    first, found = device.index or 0, torch.cuda.device_count()
    if first + size > found:
        here = f"this machine has {found}" if first == 0 else f"from {device} on there are {found - first}"
        raise CapacityError(
            f"The engine is for {size} GPUs, and {here}; build it with --tp_size {found - first} alone, or give "
            "--device cpu."
        )


def _start() -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, "-m", "slipstream.runtime.rank_process"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C is for the first rank, which ends the others
    )  # fmt: skip


def plan_to_json(plan: StepPlan, logit_counts: Sequence[int]) -> list[Any]:
    """All that the other ranks need: they hold no requests, and tokens that only the first rank knows come as numbers
    on the device (Ranks.copy_first)."""
    sequences = [
        [each.slot, each.start, each.token_ids, each.sample, each.table_changes, each.new is not None, each.num_drafts]
        for each in plan.sequences
    ]
    copies = [[copy.source, copy.target, copy.num_tokens] for copy in plan.copies]
    return [plan.step, sequences, copies, list(logit_counts)]


def plan_from_json(values: list[Any]) -> tuple[StepPlan, list[int]]:
    step, sequences, copies, logit_counts = values
    found = tuple(
        SequenceStep(slot, start, tuple(token_ids), sample, table_changes, _NEW if is_new else None, (), num_drafts)
        for slot, start, token_ids, sample, table_changes, is_new, num_drafts in sequences
    )
    return StepPlan(step, found, tuple(BlockCopy(*copy) for copy in copies)), logit_counts
