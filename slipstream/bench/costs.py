"""What a step takes, as a function of what it computes, fitted to steps that were measured.

seconds = base + rise(tokens) + a · sequences + b · context read + c · query-key pairs of chunks

rise never falls: it is linear between powers of two, each stretch with a slope of its own, so that it can be flat where
reading the weights is all there is, and steep where products are. All parts are at least 0.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from slipstream.errors import CorruptFile
from slipstream.schema.step import StepPlan

Vector = NDArray[np.float64]


class Work(NamedTuple):
    """What a step computes."""

    tokens: int
    sequences: int
    read: int  # tokens of KV, each sequence's once
    pairs: int  # of a query and a key, in sequences with more rows than one


def work_of(plan: StepPlan) -> Work:
    read = pairs = 0
    for step in plan.sequences:
        end, rows = step.start + step.num_tokens, step.num_tokens
        read += end
        pairs += rows * (step.start + end + 1) // 2 if rows > 1 else 0
    return Work(plan.num_tokens, len(plan.sequences), read, pairs)


@dataclass(frozen=True)
class StepCosts:
    """Seconds."""

    base: float
    knots: tuple[int, ...]  # tokens of a step, rising from 1
    rises: tuple[float, ...]  # from each knot to the next
    per_sequence: float
    per_token_read: float
    per_pair: float

    @property
    def max_num_tokens(self) -> int:
        """Of larger steps nothing is known."""
        return self.knots[-1]

    def seconds(self, work: Work) -> float:
        rise = sum(
            rise * min(1.0, (work.tokens - low) / (high - low))
            for (low, high), rise in zip(pairwise(self.knots), self.rises, strict=True)
            if work.tokens > low
        )
        of_sequences = self.per_sequence * work.sequences + self.per_token_read * work.read + self.per_pair * work.pairs
        return self.base + rise + of_sequences

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str) -> Self:
        """Raises CorruptFile for what fit() does not give."""
        try:
            knots, rises = tuple(map(int, values["knots"])), tuple(map(float, values["rises"]))
            parts = [float(values[name]) for name in ("base", "per_sequence", "per_token_read", "per_pair")]
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptFile(f"{where}: the costs lack {error}; measure again with slipstream bench steps.") from None
        is_rising = knots[:1] == (1,) and all(low < high for low, high in pairwise(knots))
        if not is_rising or len(rises) != len(knots) - 1 or not all(0 <= part < 1e6 for part in (*parts, *rises)):
            raise CorruptFile(f"{where}: the costs of steps do not fit together; measure again.")
        base, *others = parts
        return cls(base, knots, rises, *others)


def fit(works: Sequence[Work], seconds: Sequence[float], max_num_tokens: int) -> StepCosts:
    """Least errors, relative to an earlier fit: relative to the times, slow ones would weigh less.

    Their sum, not their squares' (by weights that are found again in each round): a step that something else held up
    weighs as much as any other.
    """
    knots = _knots(max_num_tokens)
    features, times = np.array([_features(work, knots) for work in works]), np.array(seconds)
    guess, weights = times, np.ones_like(times)
    for _ in range(12):
        scale = weights / guess
        parts = _at_least_zero(features * scale[:, None], times * scale)
        guess = np.maximum(features @ parts, times.min() / 2)
        weights = 1 / np.sqrt(np.abs(times / guess - 1) + 0.02)
    base, *rises, per_sequence, per_token_read, per_pair = parts.tolist()
    return StepCosts(base, knots, tuple(rises), per_sequence, per_token_read, per_pair)


def _knots(most: int) -> tuple[int, ...]:
    powers = [1 << place for place in range(most.bit_length()) if 1 << place < most]
    return (*powers, most) if most > 1 else (1, 2)


def _features(work: Work, knots: Sequence[int]) -> list[float]:
    rises = [min(1.0, max(0.0, (work.tokens - low) / (high - low))) for low, high in pairwise(knots)]
    return [1.0, *rises, work.sequences, work.read, work.pairs]


def _at_least_zero(rows: Vector, wanted: Vector, rounds: int = 3000) -> Vector:
    """x ≥ 0 for which rows @ x is nearest to what is wanted, a coordinate at a time. (SciPy's nnls, without SciPy.)"""
    scale = np.maximum(np.sqrt((rows**2).sum(0)), 1e-300)
    scaled = rows / scale
    gram, target, x = scaled.T @ scaled, scaled.T @ wanted, np.zeros(rows.shape[1])
    for _ in range(rounds):
        before = x.copy()
        for place in np.flatnonzero(gram.diagonal()):
            x[place] = max(0.0, x[place] + target[place] - gram[place] @ x)
        if np.abs(x - before).max() < 1e-12:
            break
    return x / scale
