"""From the host's lists to the device, without waiting for it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def on_device(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The values as a tensor there. (torch.tensor(values, device=...) waits until a GPU has done all it was given.)"""
    on_host = torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")
    return on_host.to(device, non_blocking=True)
