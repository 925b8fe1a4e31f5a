"""How a tensor of a Hugging Face checkpoint relates to ours: the values of a model file's WEIGHTS table.

A key is the name there, with {i} for a number (the layer), {e} for another (the expert) and {p} for a word (q, gate).
A plain string as the value is the name here. Every relation can be read both ways, so that a checkpoint can go back.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Rows:
    """Theirs holds the rows of several of ours, one after another (Phi-3's qkv_proj, Baichuan's W_pack).

    groups: a field of the config, by which the rows are interleaved: for each of so many groups the rows of each of
    ours that belong to it (GPT-NeoX's query_key_value: query, key and value of head 0, then of head 1, ...).
    is_transposed: theirs is stored [in, out], ours [out, in] (GPT-2's Conv1D).
    dim: of ours, along which the rows lie; 1 where the first are experts (gpt-oss's gate_up_proj).
    """

    names: tuple[str, ...]
    groups: str | None = None
    is_transposed: bool = False
    dim: int = 0


@dataclass(frozen=True)
class Stacked:
    """Theirs, one tensor for each {e}, are ours sliced along its first dimension (the experts of a mixture)."""

    name: str


Layout = str | Rows | Stacked
WeightTable = Mapping[str, Layout]
