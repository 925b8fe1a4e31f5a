"""A target that is easily foreseen: after token t comes t + 1, and after the last of a cycle its first."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from slipstream import LLM, SamplingParams
from slipstream.checkpoint.random import write_random_model
from slipstream.models import llama
from tests.cli.conftest import Call

CYCLE = 40


def write_planted_model(folder: Path) -> Path:
    """A llama whose layers add nothing, so that the head sees the last token alone."""
    write_random_model(folder, llama.TINY)
    weights = load_file(folder / "model.safetensors")
    for name, weight in weights.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight.zero_()
    embedding_VH = weights["model.embed_tokens.weight"]
    head_VH = torch.zeros_like(embedding_VH)
    head_VH[(torch.arange(CYCLE) + 1) % CYCLE] = embedding_VH[:CYCLE]
    weights["lm_head.weight"] = head_VH
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def assert_it_learns_and_drafts(
    call: Call, folder: Path, method: str, flags: Sequence[object], num_epochs: tuple[int, int], least_tokens: float
) -> None:
    """Trained by as good as nothing, and in earnest: num_epochs of each. What it then drafts is taken, least_tokens of
    them a step and more, and the texts are those without drafts."""
    model, acceptance = write_planted_model(folder / "planted"), []
    for learning_rate, epochs in zip(("1e-9", "0.01"), num_epochs, strict=True):
        trained = folder / learning_rate
        ended = call(
            "train-drafter", "--method", method, "--model", model, "--output_dir", trained, *flags,
            "--learning_rate", learning_rate, "--num_epochs", epochs,
        )  # fmt: skip
        assert ended.code == 0, ended.err
        acceptance.append(json.loads((trained / "config.json").read_text())["held_out_acceptance"])
    assert len(acceptance[1]) == 5
    assert all(after > before + 0.3 for before, after in zip(*acceptance, strict=True))

    prompts, asked = [[3], [17, 4], [39]], SamplingParams(max_tokens=60, temperature=0)
    with LLM(model) as llm:
        expected = [output.outputs[0].token_ids for output in llm.generate(prompts, asked)]
    speculative = {"method": method, "model": str(trained), "adaptive": False}
    with LLM(model, speculative=speculative, max_batch_size=4) as llm:
        assert [output.outputs[0].token_ids for output in llm.generate(prompts, asked)] == expected
        assert 1 + sum(llm.stats.num_accepted_tokens) / llm.stats.num_drafts > least_tokens
