"""How many KV blocks fit, and memory that stays ours between steps."""

import ctypes
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slipstream.engine.manifest import Manifest
from slipstream.errors import CapacityError
from slipstream.schema.kv import KVGroup

CPU_KV_LIMIT = 4 << 30  # a CPU's memory is everyone's; more is taken only when asked for by --kv_cache_max_tokens


# mallopt's names, from glibc's malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8


def keep_freed_memory() -> None:
    """Have malloc keep what a step frees for the next one, instead of giving it back to the kernel and asking again.

    Each fresh page costs a fault and a wipe, and a step's activations are megabytes: 46 → 29 ms a token where this was
    measured (SmolLM2, 2 cores). One arena, since the engine's thread would have one that is trimmed regardless.
    Libraries without mallopt (musl, macOS) are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, 1)
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # the highest glibc takes
        mallopt(_M_TRIM_THRESHOLD, 512 << 20)


def free_memory(device: torch.device) -> int:
    """Bytes that could still be allocated there."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def left_by_plan(manifest: Manifest, device: torch.device) -> int:
    """Bytes that a KV cache could have before anything is loaded, by the engine's plan.

    A CPU maps the weights, and such pages count as free; it records no steps.
    """
    parts = ("activations",) if device.type == "cpu" else ("activations", "weights", "recorded")
    return max(0, free_memory(device) - sum(manifest.memory.get(part, 0) for part in parts))


def peak_memory(call: Callable[[], Any], device: torch.device) -> int:
    """Bytes that a call takes of a GPU at most, beside what is allocated before it."""
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_reserved(device) - before
    torch.cuda.empty_cache()
    return peak


def is_out_of_memory(error: RuntimeError) -> bool:
    """Also where CUDA itself says so, beyond torch's allocator."""
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)


def check_kv_size(fraction: Any, max_tokens: Any, max_bytes: Any = None) -> None:
    """Raises CapacityError for what no KV cache could have, before there is an engine to know more."""
    if type(fraction) not in (int, float) or not 0 < fraction <= 1:
        raise CapacityError(
            f"kv_cache_free_memory_fraction is {fraction!r}; it must be a number above 0 and at most 1, such as 0.9."
        )
    for name, value, example in (("max_tokens", max_tokens, "4096"), ("max_bytes", max_bytes, "2**30")):
        if value is not None and (type(value) is not int or value < 1):
            raise CapacityError(
                f"kv_cache_{name} is {value!r}; it must be a whole number of at least 1, such as {example}."
            )


def check_kv_dtype(manifest: Manifest, device: torch.device) -> None:
    """Raises CapacityError for a GPU that cannot convert to the dtype of the KV cache."""
    if device.type != "cuda" or manifest.kv_cache_dtype != "fp8":
        return
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < (8, 9):
        raise CapacityError(
            f"A KV cache in fp8 needs a GPU of compute capability 8.9 (Ada, Hopper) or later, and {device} has "
            f"{major}.{minor}; build with --kv_cache_dtype {manifest.dtype}."
        )


def count_blocks(
    manifest: Manifest,
    groups: Sequence[KVGroup],
    device: torch.device,
    left: int,
    *,
    fraction: float,
    max_tokens: int | None = None,
    max_bytes: int | None = None,
    max_seq_len: int | None = None,
) -> int:
    """KV blocks to allocate, the null block included.

    left: bytes free beside weights, activations and recorded steps. As many blocks as a full batch of the longest
    sequences (max_seq_len; by default the engine's) could use, within `fraction` of these. `max_tokens` asks for room
    for so many tokens in all layers instead, `max_bytes` for so many bytes; the smaller counts. Raises CapacityError
    where that does not fit.
    """
    check_kv_size(fraction, max_tokens, max_bytes)
    block_bytes, size = manifest.kv_block_bytes(groups), manifest.tokens_per_block
    budget = int(fraction * left)
    fitting, fewest = budget // block_bytes, len(groups) + 1
    if fitting < fewest:
        raise CapacityError(
            f"No KV block fits: one takes {block_bytes / 2**20:.1f} MiB and {fraction:.0%} of the memory left is "
            f"{budget / 2**20:.1f} MiB; free some memory, raise --kv_cache_free_memory_fraction (now {fraction:g}) or "
            f"lower --max_num_tokens (now {manifest.max_num_tokens})."
        )
    asked = []  # blocks, for a KV cache of what, instead of which flag's value
    if max_tokens is not None:
        most = f"--kv_cache_max_tokens to {(fitting - 1) // len(groups) * size}"
        asked.append((-(-max_tokens // size) * len(groups) + 1, f"{max_tokens} tokens", most))
    if max_bytes is not None:
        if max_bytes < fewest * block_bytes:
            raise CapacityError(
                f"kv_cache_max_bytes is {max_bytes}, less than the smallest KV cache takes; raise it to "
                f"{fewest * block_bytes} or more."
            )
        asked.append((max_bytes // block_bytes, f"{max_bytes} bytes", f"--kv_cache_max_bytes to {budget}"))
    if asked:
        wanted, what, most = min(asked)
        if wanted > fitting:
            raise CapacityError(
                f"A KV cache of {what} takes {wanted * block_bytes / 2**30:.1f} GiB and {fraction:.0%} of the memory "
                f"left is {budget / 2**30:.1f} GiB; lower {most} or raise --kv_cache_free_memory_fraction."
            )
        return wanted
    longest = manifest.max_seq_len if max_seq_len is None else max_seq_len
    # What a window needs while a prompt goes through it is needed once: all chunks of a step are max_num_tokens.
    at_most, later = (
        sum(group.max_blocks(longest, chunk, size) for group in groups) for chunk in (manifest.max_num_tokens, 1)
    )
    useful = at_most + (manifest.max_batch_size - 1) * later + 1
    limit = CPU_KV_LIMIT // block_bytes if device.type == "cpu" else useful
    return min(useful, fitting, max(limit, fewest))


def allocate_kv(manifest: Manifest, num_tensors: int, num_blocks: int, device: torch.device) -> list[Tensor]:
    """Zeroed caches; each serves one layer of every KV group."""
    shape = (manifest.kv_planes, num_blocks, manifest.tokens_per_block, manifest.num_kv_heads, manifest.head_dim)
    dtype = getattr(torch, manifest.kv_dtype)
    try:
        if device.type == "cpu":
            return [_lazy_zeros(shape, dtype) for _ in range(num_tensors)]
        return [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_tensors)]
    except (RuntimeError, MemoryError):
        size = num_tensors * math.prod(shape) * dtype.itemsize
        raise CapacityError(
            f"The KV cache of {size / 2**30:.1f} GiB could not be allocated; lower --kv_cache_free_memory_fraction "
            f"or set --kv_cache_max_bytes to {size * 3 // 4}."
        ) from None


def _lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros that take memory only as they are written (calloc); torch.zeros would touch every page."""
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)).view(dtype).view(shape)
