"""What the ranks of several GPUs pay to add up: microseconds of an all-reduce in a recorded graph, by bytes.

    python benchmarks/gpu_ranks.py --size 2

As the engine does it (runtime/ranks.py), by NCCL alone, by torch's one-shot and two-shot sums over symmetric memory;
then with the residual sum and the norm after it, in a kernel of their own and in the one that adds up:
medians of 20 replays of a graph of 100 calls, the slowest rank's.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from slipstream.kernels.norm import add_rms_norm_triton
from slipstream.kernels.reduce_norm import reduce_add_rms_norm_triton
from slipstream.runtime.ranks import ProcessRanks
from slipstream.schema.mapping import Mapping

CALLS, REPLAYS, COLUMNS = 100, 20, 8192
BYTES = tuple(1 << place for place in range(11, 23))  # 2 KiB to 4 MiB; 16 KiB: one token of 8,192 numbers


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=torch.cuda.device_count())
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank is not None:
        measure(arguments.rank, arguments.size, arguments.folder)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            subprocess.Popen(
                [sys.executable, __file__, f"--size={arguments.size}", f"--rank={rank}", f"--folder={folder}"]
            )
            for rank in range(arguments.size)
        ]
        return max(rank.wait() for rank in ranks)


def measure(rank: int, size: int, folder: Path) -> None:
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    ranks = ProcessRanks(dist.FileStore(str(folder / "engine"), size), rank, Mapping(size), device)
    ways: dict[str, Callable[[Tensor], Any]] = {
        "engine": ranks.add_up,
        "NCCL": lambda x: ranks._all.allreduce([x]).wait(),
    } | symmetric(rank, size, folder, device)
    ways |= with_norm(ranks, device)
    if rank == 0:
        print(f"{size} x {torch.cuda.get_device_name()}, torch {torch.__version__}; us an all-reduce in a graph")
        print(f"| bytes | {' | '.join(ways)} |\n| --- |{' --- |' * len(ways)}", flush=True)
    for num_bytes in BYTES:
        row = []
        for way in ways.values():
            own = torch.tensor([graph_microseconds(way, num_bytes // 2, device)], device=device)
            row.append(f"{ranks.collect(own).max().item():.1f}")
        if rank == 0:
            print(f"| {num_bytes:,} | {' | '.join(row)} |", flush=True)
    torch.cuda.synchronize()
    os._exit(0)  # no group is worth an orderly end


def symmetric(rank: int, size: int, folder: Path, device: torch.device) -> dict[str, Callable[[Tensor], Any]]:
    """Sums over symmetric memory; what is added up is copied there first, as a kernel's output would be written."""
    import torch.distributed._symmetric_memory as symm_mem

    dist.init_process_group(
        "nccl", store=dist.FileStore(str(folder / "symmetric"), size), rank=rank, world_size=size, device_id=device
    )
    name = dist.group.WORLD.group_name  # type: ignore[union-attr]
    shared = symm_mem.empty(BYTES[-1] // 2, dtype=torch.bfloat16, device=device)
    symm_mem.rendezvous(shared, name)

    def one_shot(x: Tensor) -> Tensor:
        return torch.ops.symm_mem.one_shot_all_reduce(shared[: x.numel()], "sum", name)

    def two_shot(x: Tensor) -> Tensor:
        return torch.ops.symm_mem.two_shot_all_reduce_(shared[: x.numel()], "sum", name)

    return {"one-shot": one_shot, "two-shot": two_shot}


def with_norm(ranks: ProcessRanks, device: torch.device) -> dict[str, Callable[[Tensor], Any]]:
    residual = torch.zeros(BYTES[-1] // 2, dtype=torch.bfloat16, device=device)
    weight = torch.ones(COLUMNS, dtype=torch.bfloat16, device=device)

    def rows(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        size = min(len(x), COLUMNS)
        return x.view(-1, size), residual[: len(x)].view(-1, size), weight[:size]

    def apart(x: Tensor) -> Any:
        x_TH, residual_TH, weight_H = rows(x)
        return add_rms_norm_triton(ranks.add_up(x_TH), residual_TH, weight_H, 1e-5, 0.0)

    def fused(x: Tensor) -> Any:
        return reduce_add_rms_norm_triton(*rows(x), 1e-5, 0.0, ranks=ranks)

    return {"engine, then norm": apart, "in the norm": fused}


def graph_microseconds(call: Callable[[Tensor], Any], count: int, device: torch.device) -> float:
    x = torch.zeros(count, dtype=torch.bfloat16, device=device)
    call(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            call(x)
    times = []
    for _ in range(REPLAYS + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(1e3 * start.elapsed_time(end) / CALLS)
    return statistics.median(times[2:])


if __name__ == "__main__":
    sys.exit(main())
