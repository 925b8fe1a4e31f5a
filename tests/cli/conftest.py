"""A tiny model that talks (nonsense), and the command line called in this process."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

import slipstream.cli

SENTENCES = [
    "The capital of France is Paris, and how do I count to nine in French?",
    "The second highest mountain of the world is K2; the highest is another one.",
]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)


class Ended(NamedTuple):
    code: int | str | None
    out: str
    err: str


Call = Callable[..., Ended]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """slipstream with these arguments: its exit code, stdout and stderr."""

    def run(*arguments: object) -> Ended:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            slipstream.cli.main([str(argument) for argument in arguments])
        return Ended(end.value.code or 0, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder: a random llama with a byte-level tokenizer and a chat template."""
    from slipstream.checkpoint.random import write_random_model
    from slipstream.models.llama import TINY

    folder = tmp_path_factory.mktemp("talker") / "talker"
    write_random_model(folder, TINY | {"vocab_size": 320})
    write_tokenizer(folder, vocab_size=320)
    return folder


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    backend.train_from_iterator(SENTENCES, trainer)
    backend.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<|im_end|>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


@pytest.fixture(scope="session")
def engine(talker: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The talker's engine folder, built by the library."""
    from slipstream.build import build
    from slipstream.checkpoint import open_checkpoint, resolve
    from slipstream.schema.build import BuildConfig

    folder = tmp_path_factory.mktemp("engines") / "talker"
    checkpoint = open_checkpoint(resolve(talker), "float32")
    build(checkpoint, folder, BuildConfig(max_batch_size=8, max_num_tokens=64))
    checkpoint.close()
    return folder
