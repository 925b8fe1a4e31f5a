"""Between the host and the device, without waiting for what the device has to do first."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def on_device(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The values as a tensor there. (torch.tensor(values, device=...) waits until a GPU has done all it was given.)"""
    on_host = torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")
    return on_host.to(device, non_blocking=True)


class ToHost:
    """A tensor's values on their way to the host; the copy starts here."""

    def __init__(self, values: Tensor) -> None:
        self._values, self._is_there = values, None
        if values.is_cuda:
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._is_there = torch.cuda.Event()
            self._is_there.record()

    def wait(self) -> Tensor:
        if self._is_there is not None:
            self._is_there.synchronize()
        return self._values
