"""slipstream train-drafter on tiny models: it learns, a killed run comes to the same bytes, and what it refuses."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from slipstream import LLM, SamplingParams
from slipstream.checkpoint.random import write_random_model
from slipstream.distill.hidden import HiddenStates
from slipstream.distill.texts import opening_of_user_turn
from slipstream.engine.choices import Choices
from slipstream.engine.folder import open_engine
from slipstream.models import gemma3_text, llama
from slipstream.speculative.drafter import LAST
from tests.cli.conftest import Call, call, talker, write_tokenizer  # noqa: F401
from tests.distill.planted import CYCLE, write_planted_model

FAST = (
    "--num_texts", 64, "--max_output_len", 24, "--num_heads", 3, "--draft_vocab_size", 64, "--num_epochs", 12,
    "--batch_size", 12, "--learning_rate", 0.01, "--max_batch_size", 12,
)  # fmt: skip


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_planted_model(tmp_path_factory.mktemp("planted") / "planted")


@pytest.fixture(scope="module")
def trained(planted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Heads of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("trained") / "heads"
    assert train(planted, folder).returncode == 0
    return folder


def train(model: Path, folder: Path, before: str = "") -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, which first does what `before` says."""
    arguments = ["train-drafter", "--method", "medusa", "--model", str(model), "--output_dir", str(folder)]
    script = f"{before}\nimport slipstream.cli\nslipstream.cli.main({[*arguments, *map(str, FAST)]!r})"
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)


def test_heads_learn_what_the_target_says(planted: Path, trained: Path) -> None:
    config = json.loads((trained / "config.json").read_text())
    assert min(config["held_out_acceptance"]) > 0.9 and len(config["held_out_acceptance"]) == 3
    assert not (trained / "training").exists()
    tensors = load_file(trained / "medusa_lm_head.safetensors")
    assert set(range(CYCLE)) <= set(tensors["draft_token_ids"].tolist()) and "0.1.weight" not in tensors

    prompts, asked = [[3], [17, 4], [39]], SamplingParams(max_tokens=60, temperature=0)
    found, lengths = [], []
    untrained = write_untrained(trained, trained.parent / "untrained")
    for speculative in (None, untrained, trained):
        method = None if speculative is None else {"method": "medusa", "model": str(speculative), "adaptive": False}
        with LLM(planted, speculative=method, max_batch_size=4) as llm:
            found.append([output.outputs[0].token_ids for output in llm.generate(prompts, asked)])
            stats = llm.stats
            lengths.append(1 + sum(stats.num_accepted_tokens) / max(1, stats.num_drafts))
    assert found[0] == found[1] == found[2]
    assert found[0][0][:4] == [4, 5, 6, 7]
    assert 1 <= lengths[1] < 1.3 and lengths[2] > 3.5


def write_untrained(trained: Path, folder: Path) -> Path:
    """As they were before the first step."""
    folder.mkdir()
    (folder / "config.json").write_text((trained / "config.json").read_text())
    tensors = load_file(trained / "medusa_lm_head.safetensors")
    zeros = {name: torch.zeros_like(each) for name, each in tensors.items() if "linear" in name}
    save_file(tensors | zeros, folder / "medusa_lm_head.safetensors")
    return folder


AFTER_SAVING = """
import os, signal
import slipstream.distill.train as module
module.SECONDS_BETWEEN_STATES = 0
save = module.Loop._save
def save_and_die(self, step):
    save(self, step)
    if step == 17:
        os.kill(os.getpid(), signal.SIGKILL)
module.Loop._save = save_and_die
"""
WHILE_WRITING = """
import os, signal
import slipstream.distill.texts as module
answers = module._answers
def answer_or_die(llm, prompts, settings, first):
    if first:
        os.kill(os.getpid(), signal.SIGKILL)
    return answers(llm, prompts, settings, first)
module._answers = answer_or_die
"""


@pytest.mark.parametrize("before", [AFTER_SAVING, WHILE_WRITING], ids=["training", "writing"])
def test_a_killed_run_comes_to_the_same_bytes(before: str, planted: Path, trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "heads"
    assert train(planted, folder, before).returncode == -signal.SIGKILL
    assert not (folder / "config.json").exists()
    written = (folder / "texts.jsonl").read_text().splitlines()
    assert len(written) == (1 + 24 if before == WHILE_WRITING else 1 + 64)
    if before == WHILE_WRITING:
        with (folder / "texts.jsonl").open("a") as file:
            file.write('{"prompt": [1], "ans')
    else:
        assert (folder / "training/state.safetensors").is_file()
    done = train(planted, folder)
    assert done.returncode == 0, done.stderr
    assert (folder / "texts.jsonl").read_text().splitlines()[: len(written)] == written
    for name in ("texts.jsonl", "medusa_lm_head.safetensors", "medusa_choices.json", "config.json"):
        if before == AFTER_SAVING or name != "texts.jsonl":
            assert (folder / name).read_bytes() == (trained / name).read_bytes(), name


@pytest.mark.parametrize("tiny", [llama.TINY, gemma3_text.TINY], ids=["llama", "gemma3_text"])
def test_hidden_states_are_those_that_embeddings_are_made_of(tiny: dict[str, object], tmp_path: Path) -> None:
    """Whole texts at once, in chunks, and beyond a window."""
    model = write_random_model(tmp_path / "model", tiny)
    text = torch.randint(tiny["vocab_size"], (75,), generator=torch.Generator().manual_seed(0)).tolist()  # type: ignore[call-overload]
    with LLM(model, max_num_tokens=32) as llm:
        expected = {end: llm.embed(text[:end], pooling="last").embedding for end in (1, 31, 32, 33, 60, 75)}
        engine = open_engine(llm.engine_path)
    states = HiddenStates(engine, Choices("any"), torch.device("cpu"), (1, LAST), 80)
    for texts in ([text], [text[:31], text, text[:60]]):  # blocks of the first are used again, steps have several
        for said, hidden_LF in zip(texts, states.of(texts), strict=True):
            assert hidden_LF.shape == (len(said), 2 * engine.manifest.hidden_size)
            for end, vector_H in expected.items():
                if end <= len(said):
                    found_H = torch.nn.functional.normalize(hidden_LF[end - 1].chunk(2)[1], dim=0)
                    torch.testing.assert_close(found_H, torch.from_numpy(vector_H), rtol=1e-4, atol=1e-5)


def test_a_chat_model_is_asked_what_a_user_would_say(talker: Path, tmp_path: Path, call: Call) -> None:  # noqa: F811
    with LLM(talker, max_batch_size=8) as llm:
        assert llm.tokenizer.decode(opening_of_user_turn(llm), skip_special_tokens=False) == "<|im_start|>user"
        asked = llm.chat_prompt([{"role": "user", "content": "Say"}])
    (tmp_path / "data.txt").write_text("Say\n" * 32)
    prompts = tmp_path / "data.txt"
    options = ("--max_output_len", 8, "--num_epochs", 1, "--num_heads", 1)
    ended = call("train-drafter", "--model", talker, "--output_dir", tmp_path / "given", "--data", prompts, *options)
    assert ended.code == 0 and "acceptance length" in ended.out, ended.err
    lines = [json.loads(line) for line in (tmp_path / "given/texts.jsonl").read_text().splitlines()]
    assert len(lines) == 33 and all(line["prompt"] == asked for line in lines[1:])
    ended = call("train-drafter", "--model", talker, "--output_dir", tmp_path / "own", "--num_texts", 32, *options)
    assert ended.code == 0, ended.err
    lines = [json.loads(line) for line in (tmp_path / "own/texts.jsonl").read_text().splitlines()]
    assert len({str(line["prompt"]) for line in lines[1:]}) == 32


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ("--method", "ngram"),
            "--method is 'ngram', which is not trained here; it must be draft_model or eagle or medusa or redrafter",
        ),
        (("--learning_rate", "2"), "--learning_rate is 2.0; it must be above 0 and below 1"),
        (("--data", "FEW"), "holds 2 prompts and 32 are needed; give more"),
        (("--output_dir", "USED"), "is not empty and holds no texts.jsonl of a training; give a new folder"),
        (("--output_dir", "OTHER"), "holds texts that were made with other settings; give those"),
        (("--output_dir", "FILE"), r"cannot be written \(.*\); give another --output_dir"),
    ],
)
def test_what_is_wrong_is_said(
    arguments: tuple[str, str],
    sentence: str,
    planted: Path,
    trained: Path,
    tmp_path: Path,
    call: Call,  # noqa: F811
) -> None:
    (tmp_path / "few.txt").write_text("one\ntwo\n")
    places = {"FEW": tmp_path / "few.txt", "USED": tmp_path, "OTHER": trained, "FILE": tmp_path / "few.txt"}
    name, value = arguments
    given = {"--model": planted, "--output_dir": tmp_path / "new", name: places.get(value, value)}
    ended = call("train-drafter", *(word for pair in given.items() for word in pair))
    assert ended.code == 2
    assert ended.err.count("\n") == 1
    assert re.search(sentence, ended.err), ended.err
