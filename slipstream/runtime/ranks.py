"""What ranks in processes of their own do together: numbers go by gloo between CPUs and by NCCL between GPUs."""

import contextlib
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from slipstream.errors import RankError
from slipstream.kernels.collectives import ShownRows
from slipstream.runtime.meeting import COLLECTIVE_SECONDS, first_line, machine
from slipstream.runtime.one_shot import open_one_shot
from slipstream.schema.launch import LOOPBACK
from slipstream.schema.mapping import Mapping

LEAVE_SECONDS = 5.0  # that an engine's end waits for its communicators to be given up


class ProcessRanks:
    """Ranks in processes of their own (kernels/collectives.py: Ranks)."""

    def __init__(
        self, store: dist.Store, rank: int, mapping: Mapping, device: torch.device, address: str = LOOPBACK
    ) -> None:
        """Waits for the others. Raises RankError where they do not come.

        address: of this machine, as the others can reach it.
        """
        if device.type == "cuda":
            device = torch.device("cuda", device.index or 0)
        self.rank, self.size = rank, mapping.num_ranks
        self._mapping, self._device = mapping, device
        self._all = self._stage = _join(dist.PrefixStore("all", store), rank, self.size, device, address)
        machines = _shown_to_all(dist.PrefixStore("machines", store), rank, self.size, machine())
        self.num_here = machines.count(machines[rank])
        stage, place = mapping.stage(rank), mapping.place(rank)
        of_stage = dist.PrefixStore(f"stage-{stage}", store)
        if mapping.pp_size > 1:
            self._stage = _join(of_stage, place, mapping.tp_size, device, address)
        of_its_stage = [where for other, where in enumerate(machines) if mapping.stage(other) == stage]
        can_share = mapping.tp_size > 1 and len(set(of_its_stage)) == 1
        self._one_shot = open_one_shot(of_stage, place, mapping.tp_size, device) if can_share else None
        self._sending: Any = None

    def add_up(self, x: Tensor) -> Tensor:
        if self._one_shot is not None and self._one_shot.takes(x):
            return self._one_shot.add_up(x)
        total = x.clone()
        self._wait(lambda: self._stage.allreduce([total]))  # a sum, unless it is told otherwise
        return total

    def shown_rows(self, x: Tensor) -> ShownRows | None:
        return None if self._one_shot is None else self._one_shot.shown_rows(x)

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
        self._leave_groups()
        if self._one_shot is not None:
            self._one_shot.release()

    def close(self) -> None:
        """No step comes any more, and no recording of one is left."""
        if self._device.type == "cuda":
            self._leave_groups().join(LEAVE_SECONDS)

    def _leave_groups(self) -> threading.Thread:
        """NCCL does not leave before all recordings are gone, and without it the end of the process would wait so."""

        def abort() -> None:
            for group in dict.fromkeys((self._all, self._stage)):
                with contextlib.suppress(RuntimeError):
                    group.abort()

        leaving = threading.Thread(target=abort, name="slipstream-leave", daemon=True)
        leaving.start()
        return leaving

    def _wait(self, start: Callable[[], Any]) -> None:
        try:
            start().wait()
        except RuntimeError as error:
            raise RankError(f"Rank {self.rank} could not reach the others ({first_line(error)}).") from None


def _join(store: dist.Store, rank: int, size: int, device: torch.device, address: str) -> Any:
    limit = timedelta(seconds=COLLECTIVE_SECONDS)
    try:
        if device.type == "cuda":
            torch.cuda.set_device(device)
            nccl = dist.ProcessGroupNCCL.Options()
            nccl._timeout = limit
            return dist.ProcessGroupNCCL(store, rank, size, nccl)
        gloo: Any = dist.ProcessGroupGloo  # whose options have no types
        options = gloo._Options()
        options._timeout = limit
        options._devices = [gloo.create_device(hostname=address)]
        return gloo(store, rank, size, options)
    except RuntimeError as error:
        raise RankError(f"Rank {rank} of {size} could not join the others ({first_line(error)}).") from None


def _shown_to_all(store: dist.Store, rank: int, size: int, own: str) -> list[str]:
    """What each rank has."""
    store.set(str(rank), own)
    return [store.get(str(other)).decode() for other in range(size)]
