"""--model_cls_file: the model file of docs/adding/model.md is built and run, and a sentence for each mistake."""

import json
import re
import shlex
from pathlib import Path

import pytest

from slipstream import LLM, SamplingParams
from slipstream.checkpoint import OwnModel
from slipstream.checkpoint.random import write_random_model
from tests.cli.conftest import Call, write_tokenizer
from tests.surface.sources import ROOT

PAGE = (ROOT / "docs" / "adding" / "model.md").read_text(encoding="utf-8")
OPTIONS = {"model_type": "side_by_side", "vocab_size": 320, "n_embd": 64, "n_head": 4, "n_layer": 2, "n_inner": 96}


def block(language: str) -> str:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)[0]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to be in, with the page's model file and a random model for it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SLIPSTREAM_CACHE", str(tmp_path / "cache"))
    Path("side_by_side.py").write_text(block("python"), encoding="utf-8")
    write_random_model(Path("my-model"), OPTIONS, own_model=OwnModel(Path("side_by_side.py")))
    write_tokenizer(Path("my-model"), vocab_size=320)
    return tmp_path


def test_the_page_s_config_is_this_one() -> None:
    found = re.search(r"`(\{\"model_type\".*?\})`", PAGE)
    assert found is not None
    assert json.loads(found[1]) == OPTIONS
    assert len(block("python").splitlines()) < 80


def test_the_page_s_commands_run_it(here: Path, call: Call) -> None:
    texts = []
    for line in filter(None, block("bash").splitlines()):
        done = call(*shlex.split(line)[1:])
        assert done.code == 0, (line, done.err)
        if " run " in line:
            texts.append(done.out)
    assert len(texts) == 2
    assert texts[0] == texts[1]
    assert texts[0].startswith('Input [Text 0]: "Hello"\n')


def test_the_cache_belongs_to_the_file_s_contents(here: Path) -> None:
    def generate(name: str = "Model") -> list[int]:
        with LLM("my-model", model_cls_file="side_by_side.py", model_cls_name=name, kv_cache_max_tokens=64) as llm:
            return llm.generate([1, 2, 3], SamplingParams(temperature=0, max_tokens=8)).outputs[0].token_ids

    def num_engines() -> int:
        return len(list((here / "cache" / "engines").iterdir()))

    before = generate()
    assert (generate(), num_engines()) == (before, 1)
    file = here / "side_by_side.py"
    file.write_text(file.read_text().replace("+ self.mlp(normed_TH)", "+ self.mlp(x_TH)"))
    after = generate()
    assert after != before
    assert num_engines() == 2
    file.write_text(file.read_text().replace("class Model(", "class Renamed("))
    assert generate("Renamed") == after
    assert num_engines() == 3


MISTAKES = {
    "nothing = 1\n": "has no torch module called 'Model'",
    "from torch import nn\nclass Model(nn.Module): pass\n": "has no Config with from_options",
    "raise ValueError('x')\n": "cannot be imported (ValueError: x)",
    "def (\n": "cannot be imported (SyntaxError",
}


@pytest.mark.parametrize("text", MISTAKES)
def test_a_mistake_in_the_file_is_a_sentence(text: str, here: Path, call: Call) -> None:
    Path("bad.py").write_text(text)
    for verb in (["convert", "--output_dir", "x", "--model_dir"], ["build", "--dry_run", "--model"]):
        done = call(*verb, "my-model", "--model_cls_file", "bad.py")
        assert done.code == 2
        assert MISTAKES[text] in done.err
        assert done.err.startswith("error: ")
        assert done.err.count("\n") == 1


def test_a_file_that_is_not_there_and_an_engine(here: Path, call: Call, engine: Path) -> None:
    done = call("build", "--dry_run", "--model", "my-model", "--model_cls_file", "none.py")
    assert "error: --model_cls_file none.py cannot be read" in done.err
    done = call("run", "--engine_dir", engine, "--model_cls_file", "side_by_side.py", "--input_text", "a")
    assert "is an engine, which is built already; leave --model_cls_file out." in done.err
    done = call("build", "--dry_run", "--model", "my-model")
    assert "model_type 'side_by_side' is not known" in done.err


def test_no_config_can_name_code(here: Path, call: Call) -> None:
    config = Path("my-model/config.json")
    config.write_text(config.read_text().replace("{", '{"model_cls_file": "side_by_side.py",', 1))
    done = call("build", "--dry_run", "--model", "my-model")
    assert done.code == 2
    done = call("build", "--dry_run", "--model", "my-model", "--model_cls_file", "side_by_side.py")
    assert "does not know the option 'model_cls_file'" in done.err
