"""The real default model against transformers: 20 prompts, 128 greedy tokens each, float32."""

from typing import Any

import pytest
import torch

from slipstream import SamplingParams

PROMPTS = [
    "How do I count to nine in French?",
    "The capital of France is",
    "Write a haiku about the sea.",
    "def fibonacci(n):\n    ",
    "What is the second highest mountain in the world?",
    "Once upon a time, in a village by a river,",
    "List three uses of a paper clip.",
    "1, 1, 2, 3, 5, 8, 13,",
    "Translate to Spanish: Where is the library?",
    "The three laws of motion are",
    "Explain photosynthesis to a child.",
    "SELECT name, age FROM people WHERE",
    "Dear Sir or Madam,",
    "¿Qué es la gravedad?",
    "Roses are red, violets are blue,",
    "In 1969, the first humans landed on",
    "Give me a recipe for pancakes with four ingredients.",
    "The difference between a virus and a bacterium is that",
    "世界上第二高的山峰是哪座?",
    "Form a three-digit number from the digits 1, 3 and 5 that is divisible by 5.",
]
NUM_TOKENS = 128

pytestmark = pytest.mark.real_model


def test_greedy_tokens_equal_transformers(smollm2_llm: Any, smollm2_reference: Any) -> None:
    """Greedy decoding is the argmax at each position given the tokens before it, so one forward over our tokens shows
    what transformers would have chosen at each step."""
    sampling = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    outputs = smollm2_llm.generate(PROMPTS, sampling)
    assert len({tuple(output.outputs[0].token_ids) for output in outputs}) == len(PROMPTS) == 20
    for output in outputs:
        ours = output.outputs[0].token_ids
        assert len(ours) == NUM_TOKENS
        known = torch.tensor([output.prompt_token_ids + ours])
        with torch.no_grad():
            theirs = smollm2_reference(known).logits[0].argmax(-1).tolist()
        assert ours == theirs[len(output.prompt_token_ids) - 1 : -1], output.prompt


def test_greedy_tokens_equal_generate(smollm2_llm: Any, smollm2_reference: Any) -> None:
    """The same through transformers' own generation loop and KV cache, for one prompt."""
    output = smollm2_llm.generate(PROMPTS[3], SamplingParams(temperature=0, max_tokens=32))
    assert len(output.outputs[0].token_ids) == 32
    prompt = torch.tensor([output.prompt_token_ids])
    theirs = smollm2_reference.generate(prompt, max_new_tokens=32, do_sample=False)
    assert output.outputs[0].token_ids == theirs[0, prompt.shape[1] :].tolist()


@pytest.mark.parametrize("reuse", [True, False])
def test_logprobs_equal_transformers(smollm2_llm: Any, smollm2_reference: Any, reuse: bool) -> None:
    """Output and prompt logprobs, with the prefix in the cache and without."""
    prompt = PROMPTS[8] + " " + PROMPTS[9]
    salt = "same" if reuse else "cold"
    sampling = SamplingParams(temperature=0.7, seed=3, max_tokens=16, logprobs=5, prompt_logprobs=2, ignore_eos=True)
    if reuse:
        smollm2_llm.generate(prompt, SamplingParams(max_tokens=1), cache_salt=salt)
        cached = smollm2_llm.generate(prompt, SamplingParams(max_tokens=16, logprobs=5, seed=3), cache_salt=salt)
        assert cached.num_cached_tokens > 0
        check_output_logprobs(cached, smollm2_reference)
    output = smollm2_llm.generate(prompt, sampling, cache_salt=salt)
    expected = check_output_logprobs(output, smollm2_reference)
    assert output.prompt_logprobs[0] is None
    for position, entry in enumerate(output.prompt_logprobs[1:]):
        assert entry.token_id == output.prompt_token_ids[position + 1]
        assert entry.logprob == pytest.approx(expected[position, entry.token_id].item(), abs=1e-4)
        assert [token_id for token_id, _ in entry.top] == expected[position].topk(2).indices.tolist()


def check_output_logprobs(output: Any, reference: Any) -> torch.Tensor:
    completion = output.outputs[0]
    known = torch.tensor([output.prompt_token_ids + completion.token_ids])
    with torch.no_grad():
        expected = reference(known).logits[0].log_softmax(-1)
    first = len(output.prompt_token_ids) - 1
    for position, entry in enumerate(completion.logprobs, start=first):
        row = expected[position]
        assert entry.logprob == pytest.approx(row[entry.token_id].item(), abs=1e-4)
        assert entry.rank == 1 + (row > row[entry.token_id]).sum().item()
        assert [token_id for token_id, _ in entry.top] == row.topk(5).indices.tolist()
        assert [logprob for _, logprob in entry.top] == pytest.approx(row.topk(5).values.tolist(), abs=1e-4)
    return expected
