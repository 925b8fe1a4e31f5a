"""A ReDrafter head that is trained: its loss is that of its definition, it learns, and what it saves drafts."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from slipstream import LLM
from slipstream.checkpoint.random import write_random_model
from slipstream.engine.folder import open_engine
from slipstream.models import llama
from slipstream.speculative.redrafter.head import Head
from slipstream.speculative.redrafter.training import Options, Student
from slipstream.speculative.training import Batch, Teacher
from tests.cli.conftest import Call, call  # noqa: F401
from tests.distill.planted import assert_it_learns_and_drafts


def test_the_loss_is_of_each_token_after_the_right_ones(tmp_path: Path) -> None:
    model = write_random_model(tmp_path / "model", llama.TINY)
    tensors = load_file(model / "model.safetensors")
    embed_VH = tensors["model.embed_tokens.weight"]
    head_VH = tensors.get("lm_head.weight", embed_VH)
    with LLM(model) as llm:
        engine = open_engine(llm.engine_path)
    counts = torch.arange(128).flip(0)  # the first hundred can be drafted
    teacher = Teacher(str(model), engine, torch.device("cpu"), counts, lambda token_ids: embed_VH[token_ids])
    student = Student(teacher, Options(num_layers=1, draft_vocab_size=100))
    generator = torch.Generator().manual_seed(0)
    token_ids_SL = torch.randint(128, (2, 20), generator=generator)
    hidden_SLH = torch.randn(2, 20, 64, generator=generator)
    is_answer_SL = (torch.arange(20) >= 4) & (torch.arange(20) < torch.tensor([[20], [15]]))
    found = student.loss(Batch(token_ids_SL, is_answer_SL, hidden_SLH))

    losses: list[list[torch.Tensor]] = [[] for _ in range(Head.length)]
    head = student._head()
    for text, ids in enumerate(token_ids_SL.tolist()):
        end = [20, 15][text]
        for place in range(3, end - 1):
            state_H = torch.zeros(64)
            for ahead in range(Head.length):
                if place + 2 + ahead >= end:
                    break
                state_H = head.state(embed_VH[ids[place + 1 + ahead]], state_H)
                label = ids[place + 2 + ahead]
                if label < 100:
                    likely_D = (head_VH[:100] @ hidden_SLH[text, place + 1 + ahead]).softmax(0)
                    said_D = head.logits(hidden_SLH[text, place], state_H).log_softmax(0)
                    losses[ahead].append(-(likely_D * said_D).sum())
    torch.testing.assert_close(found, torch.stack([torch.stack(each).mean() for each in losses]).sum())


def test_it_learns_and_drafts(tmp_path: Path, call: Call) -> None:  # noqa: F811
    flags = (
        "--num_layers", 1, "--num_texts", 64, "--max_output_len", 24, "--batch_size", 12, "--draft_vocab_size", 64,
    )  # fmt: skip
    assert_it_learns_and_drafts(call, tmp_path, "redrafter", flags, num_epochs=(30, 30), least_tokens=3.5)
