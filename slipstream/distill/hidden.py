"""Hidden states of the target at each token of a text, computed by the engine that will verify the drafts.

They are kept on disk, a file for some texts, and mapped when they are read.

Shape suffixes: L tokens of a text, H hidden size.
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
from slipstream.schema.step import SequenceStep, StepPlan

TEXTS_A_FILE = 64


class HiddenStates:
    """Computes them, a text at a time."""

    def __init__(self, engine: Engine, choices: Choices, device: torch.device, longest: int) -> None:
        manifest = engine.manifest
        self._max_num_tokens, groups = manifest.max_num_tokens, manifest.kv_groups
        self._worker = Worker(engine, choices, groups, 1, device)
        left = self._worker.memory_left(manifest.max_num_tokens)
        num_blocks = count_blocks(manifest, groups, device, left, fraction=0.9, max_tokens=longest)
        self._worker.allocate_kv(num_blocks)
        self._kv = KVCacheManager(num_blocks, manifest.tokens_per_block, False, groups)
        self._num_steps = 0

    def of(self, token_ids: Sequence[int]) -> Tensor:
        """[L, H], on the engine's device."""
        table, chunks = BlockTable(), []
        for start in range(0, len(token_ids), self._max_num_tokens):
            chunk = tuple(token_ids[start : start + self._max_num_tokens])
            end = start + len(chunk)
            self._kv.extend(table, end)
            step = SequenceStep(0, start, chunk, sample=False, table_changes=table.take_changes())
            self._num_steps += 1
            chunks.append(self._worker.hidden_states(StepPlan(self._num_steps, (step,))).clone())
            self._kv.commit(table, token_ids, end)
        self._kv.release(table, token_ids, len(token_ids))
        return torch.cat(chunks)


class HiddenFiles:
    """Of texts, in their order, as files of a folder."""

    def __init__(self, folder: Path, texts: Sequence[Sequence[int]]) -> None:
        self._folder, self._texts = folder, texts
        self._files: dict[int, TensorFile] = {}

    def write(self, engine: Engine, choices: Choices, device: torch.device, progress: Progress) -> None:
        """Those that are not there yet."""
        firsts = range(0, len(self._texts), TEXTS_A_FILE)
        missing = [first for first in firsts if not self._path(first).is_file()]
        if not missing:
            return
        states = HiddenStates(engine, choices, device, max(map(len, self._texts)))
        for first in missing:
            progress("hidden", first, len(self._texts))
            made = {
                str(index): states.of(self._texts[index]).cpu()
                for index in range(first, min(first + TEXTS_A_FILE, len(self._texts)))
            }
            entries = [(name, tuple(each.shape), each.dtype, lambda each=each: each) for name, each in made.items()]
            write_tensor_file(self._path(first), entries, {"format": "pt"})

    def read(self, index: int) -> Tensor:
        """[L, H]"""
        first = index - index % TEXTS_A_FILE
        if first not in self._files:
            self._files[first] = TensorFile.open(self._path(first))
        return self._files[first].read(str(index))

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def _path(self, first: int) -> Path:
        return self._folder / f"hidden-{first:06}.safetensors"
