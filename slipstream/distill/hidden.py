"""Hidden states of the target at each token of a text, computed by the engine that will verify the drafts.

They are kept on disk, a file for some texts, and mapped when they are read.

Shape suffixes: T tokens of a step, L of a text, F numbers of each: all of its hidden states, side by side.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from slipstream.engine.choices import Choices
from slipstream.engine.folder import Engine
from slipstream.engine.tensor_file import TensorFile, write_tensor_file
from slipstream.progress import Progress
from slipstream.runtime.kv import BlockTable, KVCacheManager
from slipstream.runtime.worker.memory import count_blocks
from slipstream.runtime.worker.worker import Worker
from slipstream.schema.step import SequenceStep, StepPlan, packed

TEXTS_A_FILE = 64


class HiddenStates:
    """Computes them, in steps as full as can be."""

    def __init__(
        self, engine: Engine, choices: Choices, device: torch.device, layers: Sequence[int], longest: int
    ) -> None:
        """layers: as Drafter.reads_hidden names them. longest: tokens of a text."""
        manifest = engine.manifest
        self._max_num_tokens, groups = manifest.max_num_tokens, manifest.kv_groups
        self._worker = Worker(engine, choices, groups, TEXTS_A_FILE, device, reads_hidden=layers)
        left = self._worker.memory_left(manifest.max_num_tokens)
        at_once = longest + manifest.max_num_tokens + TEXTS_A_FILE * manifest.tokens_per_block
        num_blocks = count_blocks(manifest, groups, device, left, fraction=0.9, max_tokens=at_once)
        self._worker.allocate_kv(num_blocks)
        self._kv = KVCacheManager(num_blocks, manifest.tokens_per_block, False, groups)
        self._num_steps = 0

    def of(self, texts: Sequence[Sequence[int]]) -> list[Tensor]:
        """[L, F] of each of at most TEXTS_A_FILE texts, on the host."""
        tables = [BlockTable() for _ in texts]
        found: list[list[Tensor]] = [[] for _ in texts]
        for pieces in packed([len(text) for text in texts], self._max_num_tokens):
            steps = []
            for index, start, end in pieces:
                self._kv.extend(tables[index], end)
                changes, token_ids = tables[index].take_changes(), tuple(texts[index][start:end])
                steps.append(SequenceStep(index, start, token_ids, sample=False, table_changes=changes))
            self._num_steps += 1
            hidden_TF = self._worker.hidden_states(StepPlan(self._num_steps, tuple(steps))).to("cpu", copy=True)
            parts = hidden_TF.split([end - start for _, start, end in pieces])
            for (index, _, end), part_LF in zip(pieces, parts, strict=True):
                found[index].append(part_LF)
                self._kv.commit(tables[index], texts[index], end)
                if end == len(texts[index]):
                    self._kv.release(tables[index], texts[index], end)
        return [torch.cat(parts) for parts in found]


class HiddenFiles:
    """Of texts, in their order, as files of a folder."""

    def __init__(self, folder: Path, texts: Sequence[Sequence[int]], layers: Sequence[int]) -> None:
        self._folder, self._texts, self._layers = folder, texts, layers
        self._files: dict[int, TensorFile] = {}

    def write(self, engine: Engine, choices: Choices, device: torch.device, progress: Progress) -> None:
        """Those that are not there yet."""
        firsts = range(0, len(self._texts), TEXTS_A_FILE)
        missing = [first for first in firsts if not self._path(first).is_file()]
        if not missing:
            return
        states = HiddenStates(engine, choices, device, self._layers, max(map(len, self._texts)))
        for first in missing:
            progress("hidden", first, len(self._texts))
            made = enumerate(states.of(self._texts[first : first + TEXTS_A_FILE]), first)
            entries = [(str(index), tuple(each.shape), each.dtype, lambda each=each: each) for index, each in made]
            write_tensor_file(self._path(first), entries, {"format": "pt"})

    def read(self, index: int) -> Tensor:
        """[L, F]"""
        first = index - index % TEXTS_A_FILE
        if first not in self._files:
            self._files[first] = TensorFile.open(self._path(first))
        return self._files[first].read(str(index))

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def _path(self, first: int) -> Path:
        return self._folder / f"hidden-{first:06}-of-{'-'.join(map(str, self._layers))}.safetensors"
