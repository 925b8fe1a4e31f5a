"""Draft models that are trained: the student is the model that is saved, of any architecture, and it learns."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from slipstream import LLM, SamplingParams
from slipstream.checkpoint import convert, open_checkpoint, resolve, source
from slipstream.checkpoint.random import write_random_model
from slipstream.engine.folder import open_engine
from slipstream.errors import ModelError, UsageError
from slipstream.models import gemma2, gemma3_text, granite, llama, qwen3
from slipstream.speculative.draft_model import training
from slipstream.speculative.draft_model.training import Options, Student
from slipstream.speculative.training import Batch, Teacher
from tests.cli.conftest import Call, call, write_tokenizer  # noqa: F401

CPU = torch.device("cpu")


def student(model: Path, num_layers: int) -> Student:
    with LLM(model) as llm:
        engine = open_engine(llm.engine_path)
    counts = torch.zeros(engine.manifest.vocab_size)
    return Student(Teacher(str(model), engine, CPU, counts), Options(num_layers=num_layers))


@pytest.mark.parametrize(
    ("tiny", "num_layers"), [(llama.TINY, 2), (gemma3_text.TINY, 1), (qwen3.TINY, 2)],
    ids=["llama", "gemma3_text", "qwen3"],
)  # fmt: skip
def test_the_student_says_what_its_engine_will_say(tiny: dict[str, Any], num_layers: int, tmp_path: Path) -> None:
    """In bfloat16, as it is saved, so that nothing is rounded."""
    made = student(write_random_model(tmp_path / "model", tiny, dtype="bfloat16"), num_layers)
    (tmp_path / "student").mkdir()
    made.save(tmp_path / "student", {})
    texts_SL = torch.randint(tiny["vocab_size"], (2, 50), generator=torch.Generator().manual_seed(0))
    found_SLV = made._logits(texts_SL, torch.arange(100)).log_softmax(dim=1).view(2, 50, -1)
    with LLM(tmp_path / "student", dtype="float32") as llm:
        scores = llm.score(texts_SL.tolist())
    for text_L, found_LV, score in zip(texts_SL, found_SLV, scores, strict=True):
        expected_L = torch.tensor(score.logprobs[1:])
        torch.testing.assert_close(found_LV[:-1].gather(1, text_L[1:, None])[:, 0], expected_L, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tiny", [llama.TINY, granite.TINY, gemma2.TINY], ids=["llama", "granite", "gemma2"])
def test_the_loss_is_the_cross_entropy_with_what_the_model_says(
    tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By transformers, whose logits are scaled and capped as the model says; over the tokens that are learned."""
    folder = write_random_model(tmp_path / "model", tiny)
    monkeypatch.setattr(training, "MOST_LEARNED", learned := 50)
    made = student(folder, 1)
    texts_SL = torch.randint(tiny["vocab_size"], (3, 12), generator=torch.Generator().manual_seed(0))
    is_answer_SL = torch.arange(12).expand(3, -1) >= torch.tensor([[4], [6], [11]])
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")(texts_SL, output_hidden_states=True)
        total = num_places = 0.0
        said_SLV = made._logits(texts_SL, torch.arange(texts_SL.numel())).view_as(found.logits).double().log_softmax(2)
        for text, place in is_answer_SL[:, 1:].nonzero().tolist():  # the token before each of an answer
            likely_D = found.logits[text, place, :learned].double().softmax(0)
            total -= float((likely_D * said_SLV[text, place, :learned]).sum())
            num_places += 1
        loss = made.loss(Batch(texts_SL, is_answer_SL, found.hidden_states[-1]))
    assert num_places == 15
    assert float(loss) == pytest.approx(total / num_places, rel=1e-4)


def test_it_learns_and_drafts(tmp_path: Path, call: Call) -> None:  # noqa: F811
    model = write_random_model(tmp_path / "model", llama.TINY)
    acceptance = {}
    for learning_rate in ("1e-9", "0.01"):
        folder = tmp_path / learning_rate
        ended = call(
            "train-drafter", "--method", "draft_model", "--model", model, "--output_dir", folder, "--num_layers", 2,
            "--num_texts", 96, "--max_output_len", 24, "--num_epochs", 8, "--learning_rate", learning_rate,
        )  # fmt: skip
        assert ended.code == 0, ended.err
        facts = json.loads((folder / "training.json").read_text())
        acceptance[learning_rate] = facts["held_out_acceptance"]
    assert len(acceptance["0.01"]) == 5
    assert all(after > before + 0.1 for before, after in zip(*acceptance.values(), strict=True))

    prompts, asked = [[5, 6, 7], [100]], SamplingParams(max_tokens=40, temperature=0)
    with LLM(model) as llm:
        expected = [output.outputs[0].token_ids for output in llm.generate(prompts, asked)]
    with LLM(model, speculative={"method": "draft_model", "model": str(folder), "adaptive": False}) as llm:
        assert [output.outputs[0].token_ids for output in llm.generate(prompts, asked)] == expected
        assert sum(llm.stats.num_accepted_tokens) > 0


@pytest.fixture
def named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model of the Hub, as far as anybody here can tell."""
    model = write_random_model(tmp_path / "models" / "named", llama.TINY | {"vocab_size": 300}, dtype="bfloat16")
    write_tokenizer(model, 300)
    monkeypatch.setattr(source, "_download", lambda repo, revision, hint: tmp_path / "models" / repo.partition("/")[2])
    return model


def test_the_student_of_a_model_with_a_name_leaves_there_what_is_its_own(named: Path, tmp_path: Path) -> None:
    whole, small, packed = tmp_path / "whole", tmp_path / "small", tmp_path / "packed"
    for model, folder in ((str(named), whole), ("somebody/named", small)):
        folder.mkdir()
        made = student(Path(model) if folder is whole else named, 2)
        made._target = model
        made.save(folder, {})
    names = {folder: set(load_file(folder / "model.safetensors")) for folder in (whole, small)}
    assert names[whole] - names[small] == {"model.embed_tokens.weight", "lm_head.weight"} and names[small]
    assert not (small / "tokenizer.json").exists() and (whole / "tokenizer.json").exists()
    convert(small, packed)
    assert load_file(packed / "rank0.safetensors").keys().isdisjoint({"embed.weight", "lm_head.weight"})
    convert(small, tmp_path / "again", output_format="hf")
    assert set(load_file(tmp_path / "again" / "model.safetensors")) == names[whole]

    prompts, asked = ["one", "two three"], SamplingParams(max_tokens=20, temperature=0)
    said = []
    for folder in (whole, small, packed, tmp_path / "again"):
        with LLM(folder) as llm:
            said.append([output.outputs[0].text for output in llm.generate(prompts, asked)])
    assert said == [said[0]] * 4
    before = resolve(small).fingerprint()
    os.utime(named / "model.safetensors", (1, 1))
    assert resolve(small).fingerprint() != before  # an engine of it is built again


@pytest.mark.parametrize(
    ("shares", "sentence"),
    [
        ("named", "shares is 'named'; it must name a model and a list of its weights"),
        ({"model": "../named", "weights": []}, "shares weights with '../named'; that must be smollm2, or a Hub id"),
        ({"model": "somebody/named", "weights": ["none.weight"]}, "shares weights with somebody/named, which does not"),
        (
            {"model": "somebody/named", "weights": ["norm.weight"]},
            "holds norm.weight, and shares it with",
        ),
        ({"model": "somebody/named", "weights": []}, "lacks the tensor for embed.weight"),
        (
            {"model": "somebody/small", "weights": []},
            "with somebody/small, which shares another model's",
        ),
        ({"model": "somebody/named@../x", "weights": []}, "that must be smollm2, or a Hub id"),
    ],
)
def test_what_cannot_be_shared_is_refused(shares: Any, sentence: str, named: Path, tmp_path: Path) -> None:
    made = student(named, 2)
    made._target, small = "somebody/named", named.parent / "small"
    small.mkdir()
    made.save(small, {})
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps(config | {"shares": shares}))
    with pytest.raises(ModelError, match=sentence):
        open_checkpoint(resolve(small))


def test_what_cannot_be_a_student_is_refused(tmp_path: Path) -> None:
    model = write_random_model(tmp_path / "model", llama.TINY)
    with pytest.raises(UsageError, match="--num_layers is 3 and model has 3; a draft model has fewer"):
        student(model, 3)
    with LLM(model) as llm:
        built = llm.engine_path
    with pytest.raises(UsageError, match="is an engine, which is not taken apart; give the model it was built of"):
        student(built, 2)
