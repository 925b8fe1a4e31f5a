"""How many KV blocks fit, and memory that stays ours between steps."""

import ctypes
import math
import os
from collections.abc import Sequence
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


def check_kv_size(fraction: Any, max_tokens: Any) -> None:
    """Raises CapacityError for what no KV cache could have, before there is an engine to know more."""
    if type(fraction) not in (int, float) or not 0 < fraction <= 1:
        raise CapacityError(
            f"kv_cache_free_memory_fraction is {fraction!r}; it must be a number above 0 and at most 1, such as 0.9."
        )
    if max_tokens is not None and (type(max_tokens) is not int or max_tokens < 1):
        raise CapacityError(
            f"kv_cache_max_tokens is {max_tokens!r}; it must be a whole number of at least 1, such as 4096."
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
    *,
    fraction: float,
    max_tokens: int | None = None,
    max_seq_len: int | None = None,
) -> int:
    """KV blocks to allocate, the null block included.

    As many as a full batch of the longest sequences (max_seq_len; by default the engine's) could use, within `fraction`
    of what is free after activations and, on a GPU, the weights, which are not there yet (a CPU maps them, and such
    pages count as free). `max_tokens` asks for room for so many tokens in all layers instead. Raises CapacityError
    where that does not fit.
    """
    check_kv_size(fraction, max_tokens)
    block_bytes, size = manifest.kv_block_bytes(groups), manifest.tokens_per_block
    spoken_for = [manifest.memory.get("activations", 0)]
    if device.type == "cuda":
        spoken_for.append(manifest.memory.get("weights", 0))
    budget = max(0, int(fraction * (free_memory(device) - sum(spoken_for))))
    fitting = budget // block_bytes
    if max_tokens is not None:
        wanted = -(-max_tokens // size) * len(groups) + 1
        if wanted > fitting:
            raise CapacityError(
                f"A KV cache of {max_tokens} tokens takes {wanted * block_bytes / 2**30:.1f} GiB and {fraction:.0%} of "
                f"the free memory is {budget / 2**30:.1f} GiB; lower --kv_cache_max_tokens to "
                f"{max(0, fitting - 1) // len(groups) * size} or raise --kv_cache_free_memory_fraction."
            )
        return wanted
    longest = manifest.max_seq_len if max_seq_len is None else max_seq_len
    # What a window needs while a prompt goes through it is needed once: all chunks of a step are max_num_tokens.
    at_most, later = (
        sum(group.max_blocks(longest, chunk, size) for group in groups) for chunk in (manifest.max_num_tokens, 1)
    )
    useful = at_most + (manifest.max_batch_size - 1) * later + 1
    limit = CPU_KV_LIMIT // block_bytes if device.type == "cpu" else useful
    fewest = len(groups) + 1
    num_blocks = min(useful, fitting, max(limit, fewest))
    if num_blocks < fewest:
        raise CapacityError(
            f"No KV block fits: one takes {block_bytes / 2**20:.1f} MiB and {fraction:.0%} of the free memory is "
            f"{budget / 2**20:.1f} MiB; free some memory or raise --kv_cache_free_memory_fraction (now {fraction:g})."
        )
    return num_blocks


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
            "or set --kv_cache_max_tokens."
        ) from None


def _lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros that take memory only as they are written (calloc); torch.zeros would touch every page."""
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)).view(dtype).view(shape)
