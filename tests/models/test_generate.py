"""Every architecture answers as transformers does: greedy tokens of requests in flight together, with blocks reused.

The outputs are longer than the windows of the models that have one, so blocks are given up on the way.
"""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import tests.models.baichuan_reference  # noqa: F401 - what transformers lacks
from slipstream import LLM, SamplingParams
from slipstream.checkpoint.random import write_random_model
from slipstream.models import known_models, model_file

NUM_NEW = 24
SHARED = list(range(2, 36))  # longer than two blocks: the third prompt finds them kept
PROMPTS = [[*SHARED, 7, 8], [90, 3, 41], [*SHARED, 101]]
MAX_SEQ_LEN = 64


@pytest.mark.parametrize("model_type", known_models())
def test_greedy_tokens_equal_transformers(model_type: str, tmp_path: Path) -> None:
    model = write_random_model(tmp_path / "model", model_file(model_type).TINY, seed=11)
    with LLM(model, dtype="float32", max_seq_len=MAX_SEQ_LEN, max_num_tokens=16, max_batch_size=2) as llm:
        outputs = llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=NUM_NEW, ignore_eos=True))
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager").eval()
    assert [list(output.outputs[0].token_ids) for output in outputs] == [greedy(reference, each) for each in PROMPTS]
    assert outputs[2].num_cached_tokens > 0


@torch.no_grad()
def greedy(reference: torch.nn.Module, prompt: list[int]) -> list[int]:
    """The whole sequence again for each token: nothing is cached, so nothing can be cached wrongly."""
    token_ids = list(prompt)
    for _ in range(NUM_NEW):
        token_ids.append(int(reference(torch.tensor([token_ids])).logits[0, -1].argmax()))
    return token_ids[len(prompt) :]
