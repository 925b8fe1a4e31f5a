"""What models are calibrated and judged on: English prose and Python code that every Python brings along.

The prose is the language reference in pydoc_data, the code is the standard library's, both under the PSF licence
(https://docs.python.org/3/license.html). They differ a little from one Python version to the next; the digest of what
was used is in each report.
"""

import hashlib
import random
import sysconfig
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from slipstream.checkpoint.folder import Checkpoint
from slipstream.errors import ModelError
from slipstream.quantize import HELD_OUT
from slipstream.text.tokenizer import Tokenizer

CODE = ("ast", "asyncio/base_events", "collections/__init__", "dataclasses", "datetime", "decimal", "email/message",
        "functools", "heapq", "http/client", "inspect", "json/decoder", "logging/__init__", "pathlib", "random",
        "shutil", "socket", "statistics", "subprocess", "tarfile", "textwrap", "threading", "typing",
        "zipfile")  # fmt: skip


@dataclass(frozen=True)
class Texts:
    """Token ids [texts, length]: those to calibrate with, and others to judge by."""

    calibration: Tensor
    held_out: Tensor
    digest: str  # of the text and of how it was cut


def texts_for(
    checkpoint: Checkpoint, dataset: Path | None, *, num_calibration: int, num_held_out: int = HELD_OUT, length: int,
    seed: int,
) -> Texts:  # fmt: skip
    """As tokens of a model. dataset: a .txt or .jsonl file; None: what Python brings along."""
    found = built_in() if dataset is None else of_file(dataset)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.write_tokenizer(Path(folder))
        encode = Tokenizer.open(Path(folder)).encode
    length = min(length, checkpoint.config.longest_seq_len)
    made = cut(found, encode, num_calibration=num_calibration, num_held_out=num_held_out, length=length, seed=seed)
    check_vocabulary(made, checkpoint.config.vocab_size, checkpoint.name)
    return made


def built_in() -> list[str]:
    """Prose and code in turn, from the same places each time."""
    from pydoc_data import topics

    folder = Path(sysconfig.get_paths()["stdlib"])
    prose = [topics.topics[name] for name in sorted(topics.topics)]
    code = [path.read_text(encoding="utf-8") for name in CODE if (path := folder / f"{name}.py").is_file()]
    return prose + code


def of_file(path: Path) -> list[str]:
    """One text: a .txt file; or one a line: the "text" of a .jsonl file."""
    import json

    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"--calib_dataset {path} cannot be read ({error}); give a .txt or .jsonl file.") from None
    if path.suffix != ".jsonl":
        return [content]
    texts = []
    for number, line in enumerate(content.splitlines(), 1):
        try:
            texts.append(json.loads(line)["text"])
            assert isinstance(texts[-1], str)
        except (ValueError, KeyError, TypeError, AssertionError):
            raise ModelError(f'{path}:{number}: a line must be like {{"text": "..."}}.') from None
    return texts


def cut(
    texts: Sequence[str], encode: Callable[[str], Sequence[int]], *, num_calibration: int, num_held_out: int,
    length: int, seed: int,
) -> Texts:  # fmt: skip
    """Pieces of so many tokens, drawn without replacement; what is held out is never calibrated with.

    Each begins as the model wants its texts to: many say little that is right without their first token.
    """
    pieces: list[list[int]] = []
    around = list(encode(""))  # a text, where the model wants something there
    for text in texts:
        ids = list(encode(text))
        begin = ids[:1] if ids[:1] == around[:1] else []
        own, size = ids[len(begin) :], length - len(begin)
        pieces += [begin + own[first : first + size] for first in range(0, len(own) - size + 1, size)]
    needed = num_calibration + num_held_out
    if len(pieces) < needed:
        raise ModelError(
            f"The calibration text has {len(pieces)} pieces of {length} tokens and {needed} are needed; give a longer "
            "--calib_dataset, or a smaller --calib_size."
        )
    chosen = random.Random(seed).sample(pieces, needed)
    ids_SL = torch.tensor(chosen, dtype=torch.int64).view(needed, length)
    digest = hashlib.sha256(ids_SL.numpy().tobytes()).hexdigest()[:16]
    return Texts(ids_SL[num_held_out:], ids_SL[:num_held_out], digest)


def check_vocabulary(texts: Texts, vocab_size: int, model: str) -> None:
    """Raises ModelError for a tokenizer that has more tokens than the model."""
    largest = max(int(ids.max()) for ids in (texts.calibration, texts.held_out) if ids.numel())
    if largest >= vocab_size:
        raise ModelError(
            f"The tokenizer of {model} gives token {largest}, and the model has tokens 0 to {vocab_size - 1}; give the "
            "folder a tokenizer.json that fits its config.json."
        )
