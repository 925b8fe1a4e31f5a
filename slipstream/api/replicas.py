"""Where one of several engines of a machine runs: on GPUs of its own, or on cores of its own."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from slipstream.build.cache import device_for
from slipstream.checkpoint import resolve
from slipstream.engine.bounded_json import read_json
from slipstream.engine.manifest import Manifest
from slipstream.errors import UsageError
from slipstream.runtime.worker.start import use_threads


def place_replica(options: Mapping[str, Any], replica: int, num_replicas: int) -> dict[str, Any]:
    """The options of LLM(...) for this one; on a CPU this process stays on its cores from here on.

    GPUs: the ranks of replica r follow those of r - 1, from the device that is named on. Cores: each has as many, and
    as many threads, or fewer where OMP_NUM_THREADS says so; and its part of the memory. Raises UsageError where there
    is not enough for all.
    """
    if num_replicas == 1:
        return dict(options)
    device = device_for(options["device"])
    if device.type == "cpu":
        num_cores = _pin(replica, num_replicas)
        use_threads(min(num_cores, torch.get_num_threads()))
        fraction = options["kv_cache_free_memory_fraction"] / num_replicas
        return {**options, "kv_cache_free_memory_fraction": fraction}
    size, first, found = num_ranks(options), device.index or 0, torch.cuda.device_count()
    if first + num_replicas * size > found:
        raise UsageError(
            f"{num_replicas} replicas of {size} GPUs from cuda:{first} on need {num_replicas * size}, and there are "
            f"{found - first}; lower --replicas to {(found - first) // size}."
        )
    return {**options, "device": f"cuda:{first + replica * size}"}


def num_ranks(options: Mapping[str, Any]) -> int:
    """Of the engine that LLM(...) will open."""
    source = resolve(options["model"])
    if source.kind == "engine":
        return Manifest.from_dict(read_json(source.path / "config.json"), str(source.path)).num_ranks
    return (options["tp_size"] or 1) * (options["pp_size"] or 1)


def _pin(replica: int, num_replicas: int) -> int:
    """Give this process, whose threads are few yet, its cores; returns how many."""
    cores = sorted(os.sched_getaffinity(0))
    each = len(cores) // num_replicas
    if not each:
        raise UsageError(
            f"--replicas and --prefill_replicas are {num_replicas} together, and there are {len(cores)} cores; give at "
            f"most {len(cores)}."
        )
    own = cores[replica * each : (replica + 1) * each]
    for thread in Path("/proc/self/task").iterdir():
        os.sched_setaffinity(int(thread.name), own)
    return each
