"""Drafters: what proposes the tokens that a step verifies. docs/adding/drafter.md shows how to write one.

    start(slot, token_ids, request)   a sequence enters a slot, with its prompt and whatever it has said before
    draft(verified)                   after each step that asks for drafts: what may come after the tokens it gave
    stop(slot)                        the sequence has left; the slot may be empty

A Drafter makes lists of what it reads on the host. A DeviceDrafter makes tensors of where texts end, and nobody waits
for it: it is part of the step, and of its recording. It may be told of the step's rows besides: a TextDrafter of their
tokens and places; one with a KV cache of its own (KVDrafter) of what the model made of them (LayerDrafter), or of all
that the model itself was given (ModelDrafter).

Nothing that a drafter does changes a text (accept.py): it decides how many tokens a step gives, not which.

Shape suffixes: S sequences, M tokens that a step gave at most, N drafts, T rows of a step, F numbers of each.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from slipstream.engine.choices import Choices
from slipstream.engine.folder import Engine
from slipstream.engine.manifest import Manifest
from slipstream.errors import UsageError
from slipstream.kernels.attention.metadata import StepTensors
from slipstream.schema.request import GenerateRequest
from slipstream.schema.speculative import Speculation

LAST = -1  # of reads_hidden: what the model's head reads


class Draft(NamedTuple):
    """Of one sequence: tokens, and the node that each follows (tree.py); None is a chain."""

    token_ids: Sequence[int] = ()
    parents: Sequence[int] | None = None


class Verified(NamedTuple):
    """What a step gave S sequences that are to have drafts, and steps before it in which they were to have none."""

    slots: Sequence[int]
    max_drafts: Sequence[int]  # of each, at least 1; what is beyond is left out
    counts: Tensor  # [S] tokens that each has gained
    token_ids: Tensor  # [S, M] they; only the first counts[s] mean something
    positions: Tensor  # [S] of the last of them
    chosen: Tensor  # [S, M] what the model says after each node that was verified; NOTHING_TO_SAMPLE after others
    hidden: Tensor | None = None  # [S, F] what reads_hidden asks for, where that one was chosen

    def lists(self) -> list[list[int]]:
        """The new tokens on the host. On a GPU that waits for the step."""
        rows = zip(self.token_ids.tolist(), self.counts.tolist(), strict=True)
        return [token_ids[:count] for token_ids, count in rows]


class Ends(NamedTuple):
    """Where S texts end after a step, which is where the model is. Some may be no texts, with any numbers."""

    slots: Tensor  # [S]; -1 of no text
    token_ids: Tensor  # [S] the last token
    positions: Tensor  # [S] its place
    hidden: Tensor | None = None  # [S, F] what reads_hidden asks for, where that token was chosen
    block_tables: Tensor | None = None  # [S, B] the KV blocks of each, as far as the step's rows and tokens_ahead
    previous_ids: Tensor | None = None  # [S] the token before the last one; negative where that was the tree's root


class DraftTensors(NamedTuple):
    """Of S sequences, N drafts each, where the model is."""

    token_ids: Tensor  # [S, N]
    parents: Tensor  # [S, N], as a Draft has them
    counts: Tensor | None = None  # [S] how many of them are meant; None: all

    def lists(self) -> list[Draft]:
        """On the host. On a GPU that waits for the step."""
        pairs = zip(self.token_ids.tolist(), self.parents.tolist(), strict=True)
        drafts = [Draft(token_ids, parents) for token_ids, parents in pairs]
        if self.counts is None:
            return drafts
        cut = zip(drafts, self.counts.tolist(), strict=True)
        return [Draft(draft.token_ids[:count], (draft.parents or ())[:count]) for draft, count in cut]


class Computed(NamedTuple):
    """The rows of a step, and what is text now of them; where the model is."""

    slots: Tensor  # [S]; -1 of what has not sampled
    last: Tensor  # [S] of each, its last row that is text
    next_ids: Tensor  # [T] the token that follows each row; negative where a row is no text
    places: Tensor  # [T] of each row in its text
    kv_slots: Tensor  # [T] where its keys and values belong; in the null block where it is no text
    hidden: Tensor  # [T, F]


class OwnKV(NamedTuple):
    """The KV cache of one layer of a drafter's own."""

    num_planes: int
    num_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def bytes_per_token(self) -> int:
        return self.num_planes * self.num_heads * self.head_dim * self.dtype.itemsize


class Running(NamedTuple):
    """The target's own embedding and head, whatever format they are in."""

    embed: Callable[[Tensor], Tensor]  # token ids [N] -> what the first layer reads, [N, hidden_size]
    head: Callable[[Tensor], Tensor]  # what the head reads, [N, hidden_size] -> logits [N, vocab_size]


@dataclass(frozen=True)
class Target:
    """The engine whose steps verify the drafts."""

    engine: Engine
    device: torch.device
    max_batch_size: int
    max_seq_len: int
    draft_engine: tuple[Engine, Choices] | None = None  # of the model that a method's option `model` names

    @property
    def manifest(self) -> Manifest:
        return self.engine.manifest


class AnyDrafter:
    """One for an engine; it is called from the engine's thread only."""

    default_draft_len: ClassVar[int] = 8
    can_branch: ClassVar[bool] = False  # whether drafts may be trees, which attention must be told when it starts
    can_be_cut: ClassVar[bool] = True  # whether the first few of its drafts are of use without the others
    reads_ends: ClassVar[bool] = False  # whether it drafts with the target's own embedding or head, and has `attach`
    # The hidden states that it drafts from: of a layer's number what that layer reads, or LAST.
    reads_hidden: tuple[int, ...] = ()

    @classmethod
    def class_for(cls, device: torch.device, max_seq_len: int) -> "type[AnyDrafter]":
        """The class that drafts there, for texts of so many tokens at most."""
        return cls

    def __init__(self, speculation: Speculation, target: Target) -> None:
        """Raises UsageError for options that the method does not know."""
        self.max_draft_len = speculation.max_draft_len or self.default_draft_len

    def attach(self, running: Running) -> None:
        """The engine's weights are loaded: what it may use of the target, where reads_ends says so."""
        raise NotImplementedError


class Drafter(AnyDrafter, ABC):
    @abstractmethod
    def start(self, slot: int, token_ids: Sequence[int], request: GenerateRequest) -> None: ...

    @abstractmethod
    def draft(self, verified: Verified) -> Sequence[Draft]:
        """For each of the sequences, at most max_draft_len tokens; none where nothing is worth a guess.

        Of each the first max_drafts are verified.
        """

    @abstractmethod
    def stop(self, slot: int) -> None: ...


class DeviceDrafter(AnyDrafter, ABC):
    """What it does depends on nothing but shapes, so that it can be recorded: it reads no tensor's values."""

    can_be_recorded: bool = True  # unless a kernel that it calls says no

    def start(self, slot: int, token_ids: Sequence[int], request: GenerateRequest) -> None:
        """A sequence enters a slot, before its first step, with all tokens that are known of it."""

    @abstractmethod
    def draft(self, ends: Ends, most: int) -> DraftTensors:
        """At most `most` for each; max_draft_len where that many are asked for."""


class TextDrafter(DeviceDrafter):
    """One that drafts from what a text says, and has it on the device."""

    @abstractmethod
    def read(self, slots_T: Tensor, places_T: Tensor, token_ids_T: Tensor) -> None:
        """The rows of each step, before `draft`: tokens and their places; slots: negative of no text.

        Drafts are among them, at the places that they would have. What was not accepted lies beyond the text's end, and
        what comes there is written over it.
        """


class KVDrafter(DeviceDrafter):
    """One whose KV lies in blocks that are numbered as the target's, and are shared, copied and found again with these.

    own_kv: of each of its layers. num_beyond: tokens of a slot for which it has blocks of its own behind the target's.
    """

    own_kv: Sequence[OwnKV]
    num_beyond: int = 0

    @abstractmethod
    def lend_blocks(self, window: int) -> None:
        """Before anything else. window: tokens that a token sees in the target's blocks, 0 for all."""

    @abstractmethod
    def take_kv(self, kv: Sequence[Tensor], num_blocks: int) -> None:
        """The cache of each layer, [planes, blocks, tokens_per_block, heads, head_dim].

        The first num_blocks are the target's blocks.
        """


class LayerDrafter(KVDrafter):
    """One with a layer of its own on top of the target's hidden states."""

    reads_ends = True

    @abstractmethod
    def follow(self, computed: Computed) -> None:
        """After each step, before `draft`: of all its sequences, also those that no drafts are asked for."""


class ModelDrafter(KVDrafter):
    """One that reads texts as the target does.

    Of the tokens from the last one on it has computed as many as it has drafted, in the blocks that come next: tables
    reach max_draft_len tokens beyond each step.
    """

    @abstractmethod
    def follow(self, step: StepTensors) -> None:
        """Read rows that it did not compute when it drafted: prompts, and what came without drafts.

        step: as the target has it, drafts among its rows; no logits are wanted.
        """


def read_options(kind: type[Any], speculation: Speculation) -> Any:
    """A method's own options as its dataclass. Raises UsageError where one is unknown, missing or of a wrong type."""
    types: dict[str, Any] = {each.name: each.type for each in fields(kind)}
    values = speculation.options
    for name, value in values.items():
        if name not in types:
            there = ", ".join(("max_draft_len", "adaptive", *types))
            raise UsageError(f"speculative has {name!r}, which {speculation.method} does not know; it takes {there}.")
        if type(value) is not types[name] or (types[name] is int and value < 1):
            what = "a whole number of at least 1" if types[name] is int else f"of type {types[name].__name__}"
            raise UsageError(f"speculative has {name} {value!r}; it must be {what}.")
    for each in fields(kind):
        if each.default is MISSING and each.name not in values:
            raise UsageError(f"speculative lacks {each.name}, which {speculation.method} needs; add it.")
    return kind(**values)
