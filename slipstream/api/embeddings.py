"""Embeddings: a text's vector, from what its request was pooled to."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class EmbeddingOutput:
    """A text as a vector of length 1: float32, [hidden_size], or as many of its first numbers as were asked for."""

    token_ids: list[int]
    embedding: NDArray[np.float32]


def embedding_of(vector: bytes, dimensions: int | None) -> NDArray[np.float32]:
    """The vector of a TokenEvent, cut to its first numbers where dimensions says how many, and brought to length 1."""
    values: NDArray[Any] = np.frombuffer(vector, dtype="<f4")[:dimensions].astype(np.float64)
    length = np.linalg.norm(values)
    return (values / (length or 1.0)).astype(np.float32)
