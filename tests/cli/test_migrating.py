"""docs/migrating-from-tensorrt-llm.md: every command to type is typed, on tiny models in folders of the real names."""

import json
import re
import shlex
from pathlib import Path

import pytest
import typer.main

from slipstream.checkpoint.random import write_random_model
from slipstream.cli._app import make_app
from slipstream.cli._seed_flags import FLAGS
from slipstream.models import known_models, llama, model_file
from tests.cli.conftest import TEMPLATE, Call, write_tokenizer
from tests.surface.sources import ROOT

PAGE = (ROOT / "docs" / "migrating-from-tensorrt-llm.md").read_text(encoding="utf-8")
VERBS = {
    "convert_checkpoint.py": "convert", "quantize.py": "quantize",
    "trtllm-build": "build", "build.py": "build", "run.py": "run",
}  # fmt: skip


def commands(text: str, language: str) -> list[list[str]]:
    """The commands of the blocks in one language, each split as a shell does."""
    blocks = re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    lines = re.split(r"\n(?=\S)", "\n".join(blocks).replace("\\\n", ""))
    joined: list[str] = []
    for line in lines:  # a quoted text may go on over blank lines
        if joined and joined[-1].count('"') % 2:
            joined[-1] += "\n" + line
        elif line.strip():
            joined.append(line)
    return [shlex.split(line) for line in joined]


CHAINS = {part.partition("\n")[0]: part for part in PAGE.split("\n## ")[1:]}


def test_the_page_walks_three_chains() -> None:
    assert len(CHAINS) == 3
    assert [len(commands(part, "bash")) for part in CHAINS.values()] == [3, 7, 2]


@pytest.mark.parametrize("chain", CHAINS)
def test_what_to_type_runs(chain: str, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    llama3 = llama.TINY | {"vocab_size": 320}
    write_model(Path("Meta-Llama-3-8B-Instruct"), llama3 | {"max_position_embeddings": 8192})
    write_model(Path("Meta-Llama-3.3-70B-Instruct"), llama3 | {"max_position_embeddings": 131072})
    write_model(Path("Llama-3.2-1B-Instruct"), llama3 | {"max_position_embeddings": 131072})
    write_model(Path("Baichuan2-7B-Chat"), baichuan() | {"vocab_size": 320})
    for command in commands(CHAINS[chain], "bash"):
        assert command[0] == "slipstream"
        done = call(*command[1:])
        assert done.code == 0, (command, done.err)
        if command[1] == "run":
            at = next(index for index, word in enumerate(command) if word.startswith("--input_text"))
            prompt = command[at].partition("=")[2] or command[at + 1]
            assert done.out.startswith(f'Input [Text 0]: "{prompt}"\n')
            assert '\nOutput [Text 0 Beam 0]: "' in done.out
        if command[1] == "build":
            engine = next(value for value in Path.cwd().rglob("rank0.engine")).parent
            assert {file.name for file in engine.iterdir()} == {
                "config.json",
                "rank0.engine",
                "model.cache",
                "tokenizer",
            }
            assert json.loads((engine / "config.json").read_text())["plugins"]["gemm"] == "measured"


@pytest.mark.parametrize("chain", CHAINS)
def test_each_flag_they_typed_is_known(chain: str) -> None:
    """Ours, or answered by the table: nothing of theirs is an unknown option."""
    typed = commands(CHAINS[chain], "text")
    assert typed
    for command in typed:
        verb = next(VERBS[Path(word).name] for word in command if Path(word).name in VERBS)
        options = typer.main.get_command(make_app([verb])).commands[verb].params  # type: ignore[attr-defined]
        known = {name for option in options for name in option.opts} | set(FLAGS[verb])
        start = next(index for index, word in enumerate(command) if Path(word).name in VERBS)
        for word in command[start:]:
            if word.startswith("--"):
                assert word.partition("=")[0] in known, f"{verb} {word}"


def write_model(folder: Path, options: dict[str, object]) -> None:
    write_random_model(folder, options)
    write_tokenizer(folder, vocab_size=320)
    assert TEMPLATE in json.loads((folder / "tokenizer_config.json").read_text())["chat_template"]


def baichuan() -> dict[str, object]:
    return model_file("baichuan").TINY if "baichuan" in known_models() else llama.TINY
