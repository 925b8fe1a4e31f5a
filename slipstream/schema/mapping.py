"""Mapping: which part of a model each of its ranks has."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mapping:
    """tp_size ranks share each layer; pp_size such stages follow each other.

    The ranks of a stage are numbered one after the other, and the last stage comes first: rank 0, which schedules, is
    where the logits are. A step runs from the highest ranks to the lowest.
    """

    tp_size: int = 1
    pp_size: int = 1

    @property
    def num_ranks(self) -> int:
        return self.tp_size * self.pp_size

    def stage(self, rank: int) -> int:
        """From 0, which has the embedding."""
        return self.pp_size - 1 - rank // self.tp_size

    def is_last_stage(self, rank: int) -> bool:
        return rank < self.tp_size

    def place(self, rank: int) -> int:
        """Among the ranks of its stage."""
        return rank % self.tp_size

    def after(self, rank: int) -> int:
        """The rank of the same place in the next stage."""
        return rank - self.tp_size

    def before(self, rank: int) -> int:
        return rank + self.tp_size
