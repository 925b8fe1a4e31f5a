"""An EAGLE-3 layer that is trained: its chains are those of its equations, it learns, and what it saves drafts."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from slipstream import LLM
from slipstream.checkpoint.random import write_random_model
from slipstream.distill import train
from slipstream.engine.folder import open_engine
from slipstream.models import llama
from slipstream.speculative.eagle.training import LATER_COUNTS_LESS, Options, Student
from slipstream.speculative.training import Batch, Teacher
from tests.cli.conftest import Call, call  # noqa: F401
from tests.distill.planted import assert_it_learns_and_drafts, write_planted_model
from tests.speculative.naive_eagle import NaiveEagle


def test_the_loss_is_of_what_the_layer_will_say_when_it_drafts(tmp_path: Path) -> None:
    model = write_random_model(tmp_path / "model", llama.TINY)
    weights = load_file(model / "model.safetensors")
    embed_VH, head_VH = weights["model.embed_tokens.weight"], weights["lm_head.weight"]
    with LLM(model) as llm:
        engine = open_engine(llm.engine_path)
    counts = torch.arange(128).flip(0)  # the first hundred can be drafted
    teacher = Teacher(str(model), engine, torch.device("cpu"), counts, lambda token_ids: embed_VH[token_ids])
    student = Student(teacher, Options(draft_vocab_size=100))
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.copy_(parameter.half())  # as it is saved
    facts = {"hidden_size": 64, "vocab_size": 128}
    student.save(tmp_path, facts)
    naive = NaiveEagle(tmp_path, embed_VH, head_VH)

    generator = torch.Generator().manual_seed(0)
    token_ids_SL = torch.randint(128, (2, 14), generator=generator)
    hidden_SLF = torch.randn(2, 14, 4 * 64, generator=generator)
    ends = [14, 11]
    is_answer_SL = (torch.arange(14) >= 4) & (torch.arange(14) < torch.tensor(ends)[:, None])
    batch = Batch(token_ids_SL, is_answer_SL, hidden_SLF)
    losses: list[list[torch.Tensor]] = [[] for _ in range(5)]
    right = []
    for ids, hidden_LF, end in zip(token_ids_SL.tolist(), hidden_SLF, ends, strict=True):
        for place in range(3, end - 1):
            is_right = []
            for step in range(min(5, end - place - 2)):
                features_TF, guesses = hidden_LF[: place + 1, :-64], ids[place + 2 : place + 2 + step]
                said_D = naive.log_probs(features_TF, ids[: place + 2], guesses)
                label = ids[place + 2 + step]
                is_right.append(naive.token_id(int(said_D.argmax())) == label)
                if label < 100:
                    likely_D = (head_VH[:100] @ hidden_LF[place + 1 + step, -64:]).softmax(0)
                    losses[step].append(-(likely_D * said_D).sum())
            if len(is_right) == 5:
                right.append(torch.tensor(is_right).cumprod(0).double())
    expected = sum(LATER_COUNTS_LESS**step * torch.stack(each).mean() for step, each in enumerate(losses))
    torch.testing.assert_close(student.loss(batch).double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.tensor(student.evaluate([batch])).double(), torch.stack(right).mean(0))


PLANTED = (
    "--num_texts", 64, "--max_output_len", 24, "--batch_size", 12, "--draft_vocab_size", 64,
)  # fmt: skip


def test_it_learns_and_drafts(tmp_path: Path, call: Call) -> None:  # noqa: F811
    assert_it_learns_and_drafts(call, tmp_path, "eagle", PLANTED, num_epochs=(1, 12), least_tokens=4)


class Killed(BaseException):
    """As a signal would end it."""


def test_a_training_that_was_cut_off_comes_to_the_same_bytes(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: Call,  # noqa: F811
) -> None:
    model = write_planted_model(tmp_path / "planted")
    save = train.Loop._save

    def train_into(folder: Path) -> int:
        given = ("--model", model, "--output_dir", folder, *PLANTED, "--num_epochs", 3)
        return call("train-drafter", "--method", "eagle", *given).code

    def save_and_die(self: train.Loop, step: int) -> None:
        save(self, step)
        raise Killed

    assert train_into(tmp_path / "whole") == 0
    with monkeypatch.context() as patch:
        patch.setattr(train, "SECONDS_BETWEEN_STATES", 0)
        patch.setattr(train.Loop, "_save", save_and_die)
        with pytest.raises(Killed):
            train_into(tmp_path / "cut")
    assert not (tmp_path / "cut/config.json").exists()
    assert train_into(tmp_path / "cut") == 0
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
