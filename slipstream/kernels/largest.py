"""largest(): what torch.topk gives, by our own kernel on a GPU."""

from torch import Tensor

MOST = 64  # that the kernel keeps of a row


def largest(x_RN: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest numbers of each row and their places, the largest first. -> values and indices, [R, count] each"""
    if x_RN.device.type != "cuda" or count > MOST:
        values, indices = x_RN.topk(count)
        return values, indices
    from slipstream.kernels.triton.largest import largest as by_kernel

    return by_kernel(x_RN, count)


def first_largest(x_RN: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """As largest(); of equals the first come first."""
    if x_RN.device.type != "cuda" or count > MOST:
        values, indices = x_RN.sort(descending=True, stable=True)
        return values[..., :count], indices[..., :count]
    return largest(x_RN, count)
