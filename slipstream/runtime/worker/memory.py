"""How many KV blocks fit, and memory that stays ours between steps."""

import contextlib
import ctypes
import math
import mmap
import os
import sys
from collections.abc import Callable, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

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
    return max(0, min(_free_on_machine(), free_in_groups()))


def _free_on_machine() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def free_in_groups(root: Path = Path("/sys/fs/cgroup"), of: Path = Path("/proc/self/cgroup")) -> int:
    """Bytes below the limits of this process's control groups (version 2), such as a container's or a service's.

    Pages of files are given back to who needs memory, so they count as free; a container ends with what is beyond.
    """
    try:
        own = next(line[3:].strip("/") for line in of.read_text().splitlines() if line.startswith("0::"))
    except (OSError, StopIteration):
        return sys.maxsize
    left = sys.maxsize
    for group in (root / own, *(root / own).parents):
        with contextlib.suppress(OSError, KeyError, ValueError):  # no limit here: no such file, or "max"
            limit = int((group / "memory.max").read_text())
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            files = int(stat["active_file"]) + int(stat["inactive_file"])
            left = min(left, limit - int((group / "memory.current").read_text()) + files)
    return left


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
    more_bytes_per_token: int = 0,
) -> int:
    """KV blocks to allocate, the null block included.

    left: bytes free beside weights, activations and recorded steps. As many blocks as a full batch of the longest
    sequences (max_seq_len; by default the engine's) could use, within `fraction` of these. `max_tokens` asks for room
    for so many tokens in all layers instead, `max_bytes` for so many bytes; the smaller counts. more_bytes_per_token:
    what a drafter keeps in blocks of its own beside these. Raises CapacityError where that does not fit.
    """
    check_kv_size(fraction, max_tokens, max_bytes)
    size = manifest.tokens_per_block
    block_bytes = manifest.kv_block_bytes(groups) + more_bytes_per_token * size
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


def allocate_kv(manifest: Manifest, groups: Sequence[KVGroup], num_blocks: int, device: torch.device) -> list[Tensor]:
    """Zeroed caches; each serves the layers of one place in every KV group: a block belongs to one group at a time."""
    shape = (manifest.kv_planes, num_blocks, manifest.tokens_per_block, manifest.num_kv_heads, manifest.head_dim)
    dtypes = [getattr(torch, name) for name in _kv_dtypes(manifest, groups)]
    try:
        return [zeros(shape, dtype, device) for dtype in dtypes]
    except (RuntimeError, OSError):
        size = sum(math.prod(shape) * dtype.itemsize for dtype in dtypes)
        raise CapacityError(
            f"The KV cache of {size / 2**30:.1f} GiB could not be allocated; lower --kv_cache_free_memory_fraction "
            f"or set --kv_cache_max_bytes to {size * 3 // 4}."
        ) from None


def _kv_dtypes(manifest: Manifest, groups: Sequence[KVGroup]) -> list[str]:
    """Of each place in a group. Raises CapacityError where layers that share one differ."""
    found = []
    for layers in zip_longest(*(group.layers for group in groups)):
        sharing = sorted(layer for layer in layers if layer is not None)
        dtypes = {manifest.kv_dtype_of(layer) for layer in sharing}
        if len(dtypes) > 1:
            raise CapacityError(
                f"Layers {', '.join(map(str, sharing))} of {manifest.name} have different windows and share KV blocks, "
                "and only some of them are left out of the KV cache in 8 bits; leave out all of them, or none."
            )
        found.append(dtypes.pop())
    return found


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """On a CPU they take memory only as they are written: torch.zeros would touch every page, and pages of NumPy's are
    huge, 2 MiB of each layer's cache for the first token."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    num_bytes = math.prod(shape) * dtype.itemsize
    if num_bytes == 0:
        return torch.zeros(shape, dtype=dtype)
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype).view(shape)
