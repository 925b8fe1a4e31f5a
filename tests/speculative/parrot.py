"""A drafter that was told what comes, and makes mistakes: every length of draft, accepted in part, in full or not."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import invalidate_caches
from pathlib import Path
from typing import ClassVar

import pytest

from slipstream.schema.request import GenerateRequest
from slipstream.schema.speculative import Speculation
from slipstream.speculative.drafter import (
    AnyDrafter,
    DeviceDrafter,
    Draft,
    Drafter,
    DraftTensors,
    Ends,
    Target,
    Verified,
)


class Parrot(Drafter):
    """Installed by `offered` as a user's own drafter would be."""

    texts: ClassVar[Sequence[Sequence[int]]] = ()  # prompts with what follows them
    num_drafted: ClassVar[int] = 0

    def __init__(self, speculation: Speculation, target: Target) -> None:
        super().__init__(speculation, target)
        self._known: dict[int, list[int]] = {}
        self._rng = random.Random(0)

    def start(self, slot: int, token_ids: Sequence[int], request: GenerateRequest) -> None:
        self._known[slot] = list(token_ids)

    def draft(self, verified: Verified) -> list[Draft]:
        drafts = []
        for slot, token_ids in zip(verified.slots, verified.lists(), strict=True):
            self._known[slot] += token_ids
            drafts.append(self._of(self._known[slot]))
            type(self).num_drafted += len(drafts[-1].token_ids)
        return drafts

    def stop(self, slot: int) -> None:
        self._known.pop(slot, None)

    def _of(self, known: list[int]) -> Draft:
        length = self._rng.randint(0, self.max_draft_len)
        return Draft([self._maybe_wrong(token_id) for token_id in self._rest(known)[:length]])

    def _rest(self, known: list[int]) -> list[int]:
        matching = [text for text in self.texts if list(text[: len(known)]) == known]
        return list(self._rng.choice(matching)[len(known) :]) if matching else []

    def _maybe_wrong(self, token_id: int) -> int:
        return token_id if self._rng.random() < 0.8 else token_id ^ 1


class Bush(Parrot):
    """Says the same on some way down a tree, whose other branches are nonsense."""

    can_branch = True

    def _of(self, known: list[int]) -> Draft:
        right = [self._maybe_wrong(token_id) for token_id in self._rest(known)]
        token_ids, parents = list[int](), list[int]()
        tip, depth = 0, 0  # the last of the right ones so far
        while len(token_ids) < self._rng.randint(0, 2 * self.max_draft_len) and len(token_ids) < self.max_draft_len:
            if depth < len(right) and self._rng.random() < 0.6:
                token_ids.append(right[depth])
                parents.append(tip)
                tip, depth = len(token_ids), depth + 1
            else:  # beside it, or further out
                token_ids.append(self._rng.randrange(50))
                parents.append(self._rng.randint(0, len(token_ids) - 1))
        return Draft(token_ids, parents)


class Babbler(Parrot):
    """Proposes what may not be."""

    drafts: ClassVar[Draft] = Draft()

    def _of(self, known: list[int]) -> Draft:
        return self.drafts


class Echo(DeviceDrafter):
    """Says the last token again, and what cannot be; it asks the model for nothing."""

    def draft(self, ends: Ends, most: int) -> DraftTensors:
        token_ids_SN = ends.token_ids[:, None].repeat(1, most)
        token_ids_SN[:, 2:] = 1 << 40
        return DraftTensors(token_ids_SN, token_ids_SN, (ends.positions % 2 + 1).clamp(max=most))


class NoDrafter:
    pass


class HalfADrafter(AnyDrafter):
    pass


@contextmanager
def offered(folder: Path, monkeypatch: pytest.MonkeyPatch, **targets: str) -> Iterator[None]:
    """Drafters as an installed package offers them."""
    info = folder / "parrot-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: parrot\nVersion: 1.0\n")
    lines = [f"{name} = {target}" for name, target in targets.items()]
    (info / "entry_points.txt").write_text("\n".join(["[slipstream.drafters]", *lines, ""]))
    monkeypatch.syspath_prepend(folder)
    invalidate_caches()
    yield
