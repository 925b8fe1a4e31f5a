"""Lists of words as Triton's TensorRT-LLM models pass them: [1, 2, n], ids one after another, and where each ends."""

from collections.abc import Sequence

import numpy as np

from slipstream.errors import RequestError

_NO_END = -1


def pack_words(words: Sequence[Sequence[int]]) -> np.ndarray:
    """int32 [1, 2, n]; n is at least 1, since empty tensors do not pass everywhere."""
    ids = [token_id for word in words for token_id in word]
    packed = np.zeros([1, 2, max(1, len(ids))], np.int32)
    packed[0, 0, : len(ids)] = ids
    packed[0, 1] = _NO_END
    packed[0, 1, : len(words)] = np.cumsum([len(word) for word in words])
    return packed


def unpack_words(packed: np.ndarray | None, name: str) -> list[tuple[int, ...]]:
    """The inverse, also of [2, n]. Raises RequestError for ends that are none."""
    if packed is None:
        return []
    if packed.ndim not in (2, 3) or packed.shape[-2] != 2 or packed.size != 2 * packed.shape[-1]:
        raise RequestError(f"{name} has the shape {list(packed.shape)}; it must be [1, 2, n]: ids, and ends of words.")
    ids, ends = packed.reshape(2, -1).tolist()
    words, start = [], 0
    for end in ends:
        if end == _NO_END:
            break
        if not start < end <= len(ids):
            raise RequestError(f"{name} says that a word ends at {end}; ends rise from 1 to {len(ids)}, then -1.")
        words.append(tuple(ids[start:end]))
        start = end
    return words
