"""Launch: which of the ranks of an engine a process is, as whoever started it says in its environment."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from slipstream.errors import UsageError

LOOPBACK = "127.0.0.1"

_WORDS = (  # rank, how many, rank on its machine, how many there: torchrun, Open MPI, MPICH and Intel MPI
    ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)
_AGENT_STORE, _ATTEMPT = "TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RESTART_COUNT"
FIRST_ATTEMPT = "0"
_PORT = 29500  # torch's own choice, where mpirun gives none


@dataclass(frozen=True)
class Launch:
    """Which of the ranks a process is, and where the first one is."""

    rank: int
    size: int
    local_rank: int  # among those of its machine
    host: str
    port: int
    has_store: bool = False  # torchrun keeps one there; else the first rank does
    attempt: str = FIRST_ATTEMPT  # torchrun starts all of them again, and keeps the store

    @classmethod
    def read(cls, environment: Mapping[str, str] = os.environ) -> Self | None:
        """None where nobody started this process as one of several. Raises UsageError where something is missing."""
        for words in _WORDS:
            rank, size, local_rank, num_here = (_number(environment, word) for word in words)
            if rank is None or size is None or size == 1:
                continue
            host = environment.get("MASTER_ADDR") or (LOOPBACK if num_here == size else None)
            if host is None:
                raise UsageError(
                    f"{words[1]} is {size}, and nothing says where rank 0 is; set MASTER_ADDR to its machine's address."
                )
            return cls(
                rank, size, rank if local_rank is None else local_rank,
                host, _number(environment, "MASTER_PORT") or _PORT,
                environment.get(_AGENT_STORE) == "True",
                environment.get(_ATTEMPT, FIRST_ATTEMPT),
            )  # fmt: skip
        return None

    def environment(self) -> dict[str, str]:
        """What `read` reads."""
        rank, size, local_rank, _ = _WORDS[0]
        numbers = {rank: self.rank, size: self.size, local_rank: self.local_rank, "MASTER_PORT": self.port}
        return {name: str(number) for name, number in numbers.items()} | {
            "MASTER_ADDR": self.host,
            _AGENT_STORE: str(self.has_store),
            _ATTEMPT: self.attempt,
        }


def _number(environment: Mapping[str, str], name: str) -> int | None:
    text = environment.get(name, "")
    if text and not text.isdecimal():
        raise UsageError(f"{name} is {text!r} in the environment; it must be a whole number, or not be there.")
    return int(text) if text else None
