"""Tokenizer.open and what a Tokenizer answers."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slipstream.errors import CorruptFile, ModelError, RequestError
from slipstream.text.tokenizer import Tokenizer
from slipstream.text.vocabulary import bpe_tokenizer, save

LETTERS = [chr(c) for c in range(33, 127)] + ["Ġ", "Ċ", "he", "Ġhe"]
TOKENS = [*LETTERS, "<s>", "</s>", "<tool>"]
BOS, EOS, TOOL = (len(LETTERS) + i for i in range(3))


def make_folder(folder: Path, *, add_bos: bool = False, **config: Any) -> Path:
    types = [1] * len(LETTERS) + [3, 3, 4]
    backend = bpe_tokenizer(
        TOKENS, ["h e", "Ġ he"], "gpt-2", token_types=types, bos_id=BOS, eos_id=EOS, add_bos=add_bos
    )
    save(backend, folder, bos_token="<s>", eos_token="</s>")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return folder


def test_import_is_cheap() -> None:
    program = (
        "import sys, slipstream.text.tokenizer, slipstream.text.vocabulary, slipstream.text.sentencepiece, "
        "slipstream.text.chat, slipstream.text.detokenize, slipstream.text.stop\n"
        "print([m for m in ('torch', 'tokenizers', 'jinja2', 'transformers', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_what_it_answers(tmp_path: Path) -> None:
    tokenizer = Tokenizer.open(make_folder(tmp_path))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (BOS, EOS)
    assert tokenizer.vocab_size == len(TOKENS)
    assert tokenizer.special_ids == {BOS, EOS}
    assert tokenizer.chat_template is None
    ids = tokenizer.encode("he he</s><tool>")
    assert [tokenizer.token(i) for i in ids] == ["he", "Ġhe", "</s>", "<tool>"]
    assert tokenizer.decode(ids) == "he he<tool>"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "he he</s><tool>"
    assert tokenizer.token_bytes(ids[1]) == b" he"
    assert (tokenizer.token(len(TOKENS)), tokenizer.token_bytes(len(TOKENS))) == ("", b"")
    assert tokenizer.decode([len(TOKENS) + 5, ids[0]]) == "he"
    with pytest.raises(RequestError, match="without lone surrogates"):
        tokenizer.encode("a\ud800")


def test_text_is_not_cleaned_up(tmp_path: Path) -> None:
    tokenizer = Tokenizer.open(make_folder(tmp_path, clean_up_tokenization_spaces=True))
    assert tokenizer.decode(tokenizer.encode("he 's here , ok .")) == "he 's here , ok ."


@pytest.mark.parametrize("file_adds_bos", [False, True])
@pytest.mark.parametrize("wanted", [None, False, True])
def test_add_bos_token_overrides_the_file(tmp_path: Path, file_adds_bos: bool, wanted: bool | None) -> None:
    tokenizer = Tokenizer.open(make_folder(tmp_path, add_bos=file_adds_bos, add_bos_token=wanted))
    expected = file_adds_bos if wanted is None else wanted
    assert (tokenizer.encode("he")[0] == BOS) == expected
    assert tokenizer.encode("he", add_special_tokens=False) == [LETTERS.index("he")]


def test_training_settings_in_tokenizer_json_are_ignored(tmp_path: Path) -> None:
    path = make_folder(tmp_path) / "tokenizer.json"
    content = json.loads(path.read_text())
    content["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    path.write_text(json.dumps(content))
    assert len(Tokenizer.open(tmp_path).encode("abcd")) == 4


def test_special_tokens_in_every_spelling(tmp_path: Path) -> None:
    make_folder(tmp_path, bos_token={"content": "<s>", "lstrip": False}, eos_token=None)
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": {"content": "</s>"}, "bos_token": "<tool>"}')
    tokenizer = Tokenizer.open(tmp_path)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
    make_folder(tmp_path, eos_token="<gone>")
    with pytest.raises(ModelError, match="'<gone>' as its eos_token"):
        Tokenizer.open(tmp_path)


def test_chat_template_in_every_place(tmp_path: Path) -> None:
    def template(**config: Any) -> str | None:
        return Tokenizer.open(make_folder(tmp_path, **config)).chat_template

    assert template(chat_template="plain") == "plain"
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "usual"}]
    assert template(chat_template=named) == "usual"
    assert template(chat_template=named[:1]) is None
    with pytest.raises(CorruptFile, match="it must be Jinja source"):
        template(chat_template=7)
    with pytest.raises(CorruptFile, match="above 1048576"):
        template(chat_template="x" * (1024 * 1024 + 1))
    (tmp_path / "chat_template.jinja").write_text("file")
    assert template(chat_template="plain") == "file"


def test_a_folder_whose_tokenizer_class_is_remote_code(tmp_path: Path, train_spm: Callable[..., Path]) -> None:
    """Baichuan's: tokenizer.model alone is read, its tokenization_baichuan.py never run."""
    sentencepiece = pytest.importorskip("sentencepiece")
    path = train_spm(tmp_path / "tokenizer.model", add_dummy_prefix=False)
    (tmp_path / "tokenization_baichuan.py").write_text("raise SystemExit('run')")
    token = {"__type": "AddedToken", "lstrip": False, "normalized": True, "rstrip": False, "single_word": True}
    config = {
        "add_bos_token": False,
        "add_eos_token": False,
        "auto_map": {"AutoTokenizer": ["tokenization_baichuan.BaichuanTokenizer", None]},
        "bos_token": token | {"content": "<s>"},
        "eos_token": token | {"content": "</s>"},
        "model_max_length": 4096,
        "sp_model_kwargs": {},
        "tokenizer_class": "BaichuanTokenizer",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.open(tmp_path)
    library = sentencepiece.SentencePieceProcessor(model_file=str(path))
    for text in ("the quick brown fox", " two  spaces", "你好 <tool> x"):
        assert tokenizer.encode(text) == library.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (library.bos_id(), library.eos_id())


def test_broken_folders(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"neither tokenizer\.json nor tokenizer\.model; .*--tokenizer_dir"):
        Tokenizer.open(tmp_path)
    make_folder(tmp_path)
    path, config = tmp_path / "tokenizer.json", tmp_path / "tokenizer_config.json"
    whole = path.read_text()
    for broken in ("", "{}", "[]", whole[: len(whole) // 2], whole.replace('"h"', '"q"', 1), "[" * 10_000):
        path.write_text(broken)
        with pytest.raises(CorruptFile, match=r"tokenizer\.json is not a tokenizer .*--tokenizer_dir"):
            Tokenizer.open(tmp_path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(CorruptFile, match="cannot be read as UTF-8"):
        Tokenizer.open(tmp_path)
    path.write_text(whole)
    for broken, reason in (("{", "is not JSON"), ("[" * 100_000, "is not JSON"), ("[]", "must be a JSON object")):
        config.write_text(broken)
        with pytest.raises(CorruptFile, match=f"tokenizer_config.json.*{reason}"):
            Tokenizer.open(tmp_path)
    with config.open("wb") as file:
        file.truncate(16 * 1024 * 1024 + 1)
    with pytest.raises(CorruptFile, match="has at most 16777216"):
        Tokenizer.open(tmp_path)


def test_bad_words_with_and_without_a_space(tmp_path: Path, spm: Tokenizer) -> None:
    tokenizer = Tokenizer.open(make_folder(tmp_path, add_bos=True))
    he, space_he = LETTERS.index("he"), LETTERS.index("Ġhe")
    assert tokenizer.bad_word_ids("he") == tokenizer.bad_word_ids(" he") == ((he,), (space_he,))
    assert tokenizer.bad_word_ids(" ") == ((LETTERS.index("Ġ"),),)
    with pytest.raises(RequestError, match="empty string"):
        tokenizer.bad_word_ids("")
    spelled = [[spm.token(i) for i in ids] for ids in spm.bad_word_ids("the")]
    assert spelled[0][0] != "▁" and not spelled[0][0].startswith("▁")
    assert "".join(spelled[0]) == "the"
    assert spelled[1] == ["▁the"]
