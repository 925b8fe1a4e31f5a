"""Memory and power of this machine's GPUs, as NVML says it: nvidia-smi asks, in a process of its own."""

import subprocess
import tempfile
from dataclasses import dataclass
from statistics import fmean
from typing import Self

_PERIOD_MS = 200
_COMMAND = (
    "nvidia-smi", "--query-gpu=index,memory.used,power.draw", "--format=csv,noheader,nounits", f"-lms={_PERIOD_MS}",
)  # fmt: skip


@dataclass(frozen=True)
class GpuUse:
    """All GPUs of the machine together; whatever else runs on them counts, too."""

    memory_mib: float  # at most
    watts: float  # on average

    def to_dict(self) -> dict[str, float]:
        return {"memory_mib": self.memory_mib, "watts": self.watts}


class GpuWatch:
    """Between `with` and its end; `use` is None where no NVML answers."""

    use: GpuUse | None = None

    def __enter__(self) -> Self:
        self._lines = tempfile.TemporaryFile("w+", encoding="utf-8")
        self._process: subprocess.Popen[str] | None = None
        try:
            self._process = subprocess.Popen(_COMMAND, stdout=self._lines, stderr=subprocess.DEVNULL, text=True)
        except OSError:
            return self
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
            self._lines.seek(0)
            self.use = read_use(self._lines.read())
        self._lines.close()


def read_use(text: str) -> GpuUse | None:
    """text: lines of "index, MiB, W"; a number that a GPU does not know is [N/A]."""
    memory, watts = dict[str, list[float]](), dict[str, list[float]]()
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) != 3:
            continue  # cut off as the process ended
        for values, cell in ((memory, cells[1]), (watts, cells[2])):
            try:
                values.setdefault(cells[0], []).append(float(cell))
            except ValueError:
                continue
    if not memory:
        return None
    return GpuUse(sum(map(max, memory.values())), sum(map(fmean, watts.values())))
