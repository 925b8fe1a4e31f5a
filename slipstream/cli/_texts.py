"""The texts that quantizing and comparing models take, as tokens of a model."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from slipstream.checkpoint.folder import Checkpoint
    from slipstream.quantize.texts import Texts

HELD_OUT = 16  # texts to judge by


def texts_for(
    checkpoint: "Checkpoint", dataset: Path | None, *, num_calibration: int, num_held_out: int = HELD_OUT,
    length: int, seed: int,
) -> "Texts":  # fmt: skip
    """dataset: a .txt or .jsonl file; None: what Python brings along."""
    from slipstream.quantize import texts
    from slipstream.text.tokenizer import Tokenizer

    found = texts.built_in() if dataset is None else texts.of_file(dataset)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.write_tokenizer(Path(folder))
        encode = Tokenizer.open(Path(folder)).encode
    length = min(length, checkpoint.config.longest_seq_len)
    made = texts.cut(
        found, encode, num_calibration=num_calibration, num_held_out=num_held_out, length=length, seed=seed
    )
    texts.check_vocabulary(made, checkpoint.config.vocab_size, checkpoint.name)
    return made
