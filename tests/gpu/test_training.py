"""slipstream train-drafter on a GPU: each method learns there, and what it saves drafts. Only on a GPU."""

import json
from pathlib import Path

import pytest
import torch

from slipstream import LLM, SamplingParams
from slipstream.cli import main
from slipstream.speculative.training import trainable
from tests.distill.planted import write_planted_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

OPTIONS = {"medusa": ("--num_heads", "3"), "draft_model": ("--num_layers", "2")}


@pytest.mark.parametrize("method", trainable())
def test_it_learns_and_drafts(method: str, tmp_path: Path) -> None:
    model, folder = write_planted_model(tmp_path / "planted"), tmp_path / "head"
    with pytest.raises(SystemExit) as ended:
        main([
            "train-drafter", "--method", method, "--model", str(model), "--output_dir", str(folder), "--device", "cuda",
            "--num_texts", "64", "--max_output_len", "24", "--num_epochs", "12", "--batch_size", "12",
            "--learning_rate", "0.01", *OPTIONS.get(method, ()),
        ])  # fmt: skip
    assert not ended.value.code
    facts = json.loads((folder / ("training.json" if method == "draft_model" else "config.json")).read_text())
    assert facts["held_out_acceptance"][0] > 0.8

    prompts, asked = [[3], [17, 4], [39]], SamplingParams(max_tokens=60, temperature=0)
    with LLM(model, device="cuda", dtype="float32") as llm:
        expected = [output.outputs[0].token_ids for output in llm.generate(prompts, asked)]
    speculative = {"method": method, "model": str(folder), "adaptive": False}
    with LLM(model, device="cuda", dtype="float32", speculative=speculative, max_batch_size=4) as llm:
        assert [output.outputs[0].token_ids for output in llm.generate(prompts, asked)] == expected
        assert 1 + sum(llm.stats.num_accepted_tokens) / llm.stats.num_drafts > 2.5
