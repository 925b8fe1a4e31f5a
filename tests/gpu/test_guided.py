"""Guided rows on the GPU: masks made while it computes, beside plain rows of recorded steps. Only on a GPU."""

import json
from pathlib import Path

import pytest
import torch

from slipstream import LLM, Guided, SamplingParams
from slipstream.checkpoint.random import write_random_model
from slipstream.models.llama import TINY
from tests.cli.conftest import write_tokenizer

pytest.importorskip("llguidance")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 999}, "b": {"enum": ["x", "yes", None]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}


def test_guided_and_plain_rows_say_what_they_say_on_the_cpu(tmp_path: Path) -> None:
    model = write_random_model(tmp_path / "model", TINY | {"vocab_size": 328, "eos_token_id": 1}, seed=4)
    write_tokenizer(model, vocab_size=320)
    sampling = [
        SamplingParams(
            guided=Guided(json_schema=SCHEMA) if index % 2 else None, temperature=0.8, seed=index, max_tokens=200
        )
        for index in range(12)
    ]
    found = {}
    for device in ("cpu", "cuda"):
        with LLM(model, device=device, dtype="float32", max_batch_size=8, max_num_tokens=48) as llm:
            outputs = llm.generate(["The capital"] * len(sampling), sampling)
        assert not any(output.error for output in outputs)
        found[device] = [output.outputs[0].text for output in outputs]
    assert found["cuda"] == found["cpu"]
    for text in found["cuda"][1::2]:
        assert json.loads(text)["b"] in ("x", "yes", None)
