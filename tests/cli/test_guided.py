"""slipstream run --guided_…: a schema, regex, choice or grammar from the command line."""

import json
import re
from pathlib import Path

import pytest

from tests.cli.conftest import Call, write_tokenizer
from tests.cli.test_run import outputs

SCHEMA = json.dumps(
    {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"], "additionalProperties": False}
)


@pytest.fixture(scope="module")
def speller(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random llama that can spell any text and end it."""
    from slipstream.checkpoint.random import write_random_model
    from slipstream.models.llama import TINY

    folder = tmp_path_factory.mktemp("speller") / "speller"
    write_random_model(folder, TINY | {"vocab_size": 320, "eos_token_id": 1})
    write_tokenizer(folder, vocab_size=320)
    return folder


def test_each_flag_guides(call: Call, speller: Path, tmp_path: Path) -> None:
    (tmp_path / "schema.json").write_text(SCHEMA, encoding="utf-8")
    (tmp_path / "greeting.lark").write_text('start: "hi " /[a-z]{3}/', encoding="utf-8")
    flags = {
        ("--guided_json", SCHEMA): r'\{\s*"a"\s*:\s*(true|false)\s*\}',
        ("--guided_json", str(tmp_path / "schema.json")): r'\{\s*"a"\s*:\s*(true|false)\s*\}',
        ("--guided_regex", "[0-9]{2}:[0-9]{2}"): "[0-9]{2}:[0-9]{2}",
        ("--guided_choice", "yes", "no, never"): "yes|no, never",
        ("--guided_grammar", str(tmp_path / "greeting.lark")): "hi [a-z]{3}",
    }
    for arguments, expected in flags.items():
        done = call("run", "--model", speller, "--input_text", "a", "--top_k", 0, *arguments)
        assert done.code == 0, done.err
        assert re.fullmatch(expected, outputs(done.out)[0, 0]), (arguments, done.out)


def test_a_bad_one_is_a_sentence(call: Call, speller: Path) -> None:
    done = call("run", "--model", speller, "--input_text", "a", "--guided_regex", "[a-z")
    assert (done.code, done.out) == (2, "")
    assert done.err == "error: guided.regex cannot be followed: unclosed character class.\n"
