"""What launches depend on: the device's size, and whether a kernel may start before the one ahead of it has ended.

A step at small batches is some hundred kernels of a few microseconds. Launched as usual, each waits until the last
program of the one before is done, and then its own programs are set up. With programmatic dependent launch (Hopper and
later) they are there already, and may fetch what no kernel writes (weights).
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import cuda as tl_cuda


@cache
def starts_early(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@triton.jit
def wait_for_previous(IS_EARLY: tl.constexpr):
    """Let the next kernel start too, and wait for what the one before has written.

    For every program of every kernel, those with nothing to do too: a kernel that does not wait could end before what
    comes before it, and the kernel after would read too soon. Before it, a program may read what no kernel of the step
    writes (weights, the step's inputs) or what was written before a kernel that is launched as usual.
    """
    if IS_EARLY:
        tl_cuda.gdc_launch_dependents()
        tl_cuda.gdc_wait()


@triton.jit
def prefetch(pointers):
    """Lines of 128 bytes on their way into L2."""
    asm: tl.constexpr = "prefetch.global.L2 [$1]; mov.u32 $0, 0;"
    tl.inline_asm_elementwise(asm, "=r,l", [pointers], dtype=tl.int32, is_pure=False, pack=1)


@cache
def num_processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes that a program may have."""
    if device.type != "cuda":
        return 1 << 20
    index = torch.cuda.current_device() if device.index is None else device.index
    return int(triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"])


@cache
def arrivals(device: torch.device) -> Tensor:
    """Counters of programs that share a result, 0 between kernels: the last to arrive resets its own."""
    return torch.zeros(1 << 16, dtype=torch.int32, device=device)
