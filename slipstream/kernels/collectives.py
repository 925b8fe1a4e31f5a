"""What the ranks of an engine do together: each has a part of the weights, and here the parts of a result meet."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from slipstream.kernels.fits import need, need_floats
from slipstream.kernels.registry import op

MAX_COLUMNS = 1 << 20  # of what goes from one stage to the next, which is as wide as the model


class ShownRows(NamedTuple):
    """Memory in which the GPUs of a machine show each other rows (runtime/one_shot.py: what lies where)."""

    addresses: tuple[int, ...]  # where each rank's memory begins, as this one sees it
    calls: Tensor  # int32, of each place: how often rows have met there, on this rank
    rank: int
    row_bytes: int  # of a place


class Ranks(Protocol):
    """The processes that share a model, as one of them sees it (schema/mapping.py).

    The ranks of a stage share each layer: they make the same calls in the same order. Stages follow each other.
    """

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def num_here(self) -> int:
        """Of these ranks, those on this one's machine."""

    def add_up(self, x: Tensor) -> Tensor:
        """The sum of what the ranks of this stage gave, in memory of its own; x is contiguous."""

    def shown_rows(self, x: Tensor) -> ShownRows | None:
        """Where a kernel may add up x itself; None where it cannot. All ranks of this stage get the same."""

    def collect(self, x: Tensor) -> Tensor:
        """What the ranks of this stage gave, [how many they are, *x.shape]."""

    def send(self, x: Tensor) -> None:
        """To the rank of the same place in the next stage. x may still be read after the call."""

    def receive(self, x: Tensor) -> None:
        """x becomes what the rank of the same place in the stage before sent."""

    def copy_first(self, x: Tensor) -> None:
        """x becomes what the first rank gave, on all ranks."""

    def least(self, number: int) -> int:
        """The smallest of what all ranks gave."""


class Alone:
    """One rank, which has everything."""

    rank, size, num_here = 0, 1, 1

    def add_up(self, x: Tensor) -> Tensor:
        return x.clone()

    def shown_rows(self, x: Tensor) -> None:
        pass

    def collect(self, x: Tensor) -> Tensor:
        return x[None]

    def send(self, x: Tensor) -> None:
        pass

    def receive(self, x: Tensor) -> None:
        x.zero_()

    def copy_first(self, x: Tensor) -> None:
        pass

    def least(self, number: int) -> int:
        return number


ALONE = Alone()


def _sum_shapes(x_TH: Tensor) -> Tensor:
    need_floats(x=x_TH)
    return x_TH.new_empty(x_TH.shape)


@op("all_reduce(Tensor x) -> Tensor", shapes=_sum_shapes)
def all_reduce(x_TH: Tensor, *, ranks: Ranks = ALONE) -> Tensor:
    """The sum over all ranks, the same on each."""
    return ranks.add_up(x_TH.contiguous())


def _gather_shapes(x_TN: Tensor, sizes: Sequence[int]) -> Tensor:
    need_floats(x=x_TN)
    num_tokens, num_columns = x_TN.shape
    need(num_columns in sizes and all(size > 0 for size in sizes), f"one of the sizes must be {num_columns}")
    return x_TN.new_empty(num_tokens, sum(sizes))


@op("all_gather(Tensor x, int[] sizes) -> Tensor", shapes=_gather_shapes, is_row_by_row=True)
def all_gather(x_TN: Tensor, sizes: Sequence[int], *, ranks: Ranks = ALONE) -> Tensor:
    """The columns of all ranks side by side: rank r has sizes[r] of them, as engine/check.py has seen to."""
    widest_TN = functional.pad(x_TN, (0, max(sizes) - x_TN.shape[1])).contiguous()
    parts_RTN = ranks.collect(widest_TN)
    return torch.cat([part_TN[:, :size] for part_TN, size in zip(parts_RTN, sizes, strict=True)], 1)


@op("send(Tensor x) -> Tensor", shapes=_sum_shapes, is_row_by_row=True)
def send(x_TH: Tensor, *, ranks: Ranks = ALONE) -> Tensor:
    """To the next stage; gives what was sent."""
    sent_TH = x_TH.clone(memory_format=torch.contiguous_format)  # it is read while the next step overwrites x
    ranks.send(sent_TH)
    return sent_TH


def _received_shapes(positions_T: Tensor, num_columns: int, dtype: str) -> Tensor:
    need(0 < num_columns <= MAX_COLUMNS, f"num_columns must be from 1 to {MAX_COLUMNS}")
    (num_tokens,) = positions_T.shape
    received_TH = positions_T.new_empty(num_tokens, num_columns, dtype=getattr(torch, dtype))
    need_floats(x=received_TH)
    return received_TH


@op("receive(Tensor positions, int num_columns, str dtype) -> Tensor", shapes=_received_shapes, is_row_by_row=True)
def receive(positions_T: Tensor, num_columns: int, dtype: str, *, ranks: Ranks = ALONE) -> Tensor:
    """What the stage before sent: a row for each token of the step."""
    received_TH = positions_T.new_empty(len(positions_T), num_columns, dtype=getattr(torch, dtype))
    ranks.receive(received_TH)
    return received_TH
