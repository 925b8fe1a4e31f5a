"""Windows and sinks through the whole engine, against Llama in float64 (tests/naive_llama.py) and transformers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from slipstream import LLM, SamplingParams
from slipstream.checkpoint.random import write_random_model
from slipstream.errors import SlipstreamError
from slipstream.models import known_models, model_file
from tests.naive_llama import NaiveLlama

PROMPT = [(7 * i * i + 3 * i + 1) % 128 for i in range(41)]
TOLERANCE = 1e-4  # absolute, float32 logprobs


def scores(llm: LLM, token_ids: list[int]) -> torch.Tensor:
    return torch.tensor(llm.score(token_ids).logprobs[1:])


def expected_scores(logits_TV: torch.Tensor, token_ids: list[int]) -> torch.Tensor:
    return logits_TV.log_softmax(-1)[:-1].gather(1, torch.tensor(token_ids[1:])[:, None])[:, 0].float()


def greedy(llm: LLM, prompt: list[int], num_tokens: int) -> Any:
    return llm.generate(prompt, SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True))


@pytest.mark.parametrize(
    ("windows", "sinks"),
    [([5], 0), ([16], 0), ([9, 128], 0), ([3, 30, 12], 0), ([8], 2), ([20], 4), ([17], 1)],
    ids=lambda value: str(value).replace(" ", ""),
)
@pytest.mark.parametrize("max_num_tokens", [64, 7, 1], ids=["whole", "chunks", "token_by_token"])
def test_what_a_token_sees_is_the_definition_however_the_prompt_is_cut(
    tiny_model: Path, windows: list[int], sinks: int, max_num_tokens: int
) -> None:
    naive = NaiveLlama(tiny_model, (windows * 3)[:3], sinks)
    with LLM(
        tiny_model, max_batch_size=1, max_num_tokens=max_num_tokens, kv_cache_max_tokens=256,
        max_attention_window_size=windows, sink_token_length=sinks,
    ) as llm:  # fmt: skip
        torch.testing.assert_close(
            scores(llm, PROMPT), expected_scores(naive.logits(PROMPT), PROMPT), rtol=0, atol=TOLERANCE
        )
        assert greedy(llm, PROMPT, 6).outputs[0].token_ids == naive.greedy(PROMPT, 6)


def test_sinks_need_no_fused_rotation(tiny_model: Path) -> None:
    with LLM(
        tiny_model, max_attention_window_size=9, sink_token_length=2, disabled_passes=["fuse_rope_kv_write"]
    ) as llm:  # fmt: skip
        expected = expected_scores(NaiveLlama(tiny_model, [9] * 3, 2).logits(PROMPT), PROMPT)
        torch.testing.assert_close(scores(llm, PROMPT), expected, rtol=0, atol=TOLERANCE)


def test_a_window_is_that_of_transformers(tiny_model: Path) -> None:
    config = MistralConfig.from_pretrained(tiny_model, sliding_window=6, attn_implementation="eager")
    reference = MistralForCausalLM.from_pretrained(tiny_model, config=config, dtype=torch.float32).eval()
    with torch.no_grad():
        logits_TV = reference(torch.tensor([PROMPT])).logits[0]
    torch.testing.assert_close(
        NaiveLlama(tiny_model, [6] * 3).logits(PROMPT).float(), logits_TV, rtol=0, atol=TOLERANCE
    )
    with LLM(tiny_model, max_batch_size=2, max_attention_window_size=6, kv_cache_max_tokens=256) as llm:
        torch.testing.assert_close(scores(llm, PROMPT), expected_scores(logits_TV, PROMPT), rtol=0, atol=TOLERANCE)


# Learned positions; heads of which a part alone is rotated; sinks of its own.
WITHOUT_SINKS = {"gpt2", "deepseek_v3", "gpt_oss"}


@pytest.mark.parametrize("name", known_models())
def test_every_rotary_model_keeps_sinks(name: str, tmp_path: Path) -> None:
    """In a text no longer than the window they change nothing: the second query is rotated as the model rotates."""
    model = write_random_model(tmp_path / name, model_file(name).TINY)
    sizes = {"max_batch_size": 2, "max_num_tokens": 32, "kv_cache_max_tokens": 256}
    with LLM(model, **sizes) as llm:
        window = min(window or 32 for window in llm.manifest.windows)
        prompt = [token_id % llm.manifest.vocab_size for token_id in PROMPT[:window]]
        expected = scores(llm, prompt)
    options = sizes | {"max_attention_window_size": window, "sink_token_length": 2}
    if name in WITHOUT_SINKS:
        with pytest.raises(SlipstreamError, match=r"sink_token_length needs plain rotary attention"):
            LLM(model, **options)
        return
    with LLM(model, **options) as llm:
        assert llm.runtime_config.kv_groups[0].sink_tokens == 2
        torch.testing.assert_close(scores(llm, prompt), expected, rtol=0, atol=TOLERANCE)


def test_alibi_has_windows_and_no_sinks(tmp_path: Path) -> None:
    model = write_random_model(tmp_path / "falcon", model_file("falcon").TINY | {"alibi": True})
    with pytest.raises(SlipstreamError, match=r"sink_token_length needs plain rotary attention .* leave it out\.$"):
        LLM(model, max_attention_window_size=8, sink_token_length=2)
    with LLM(model, max_attention_window_size=8, max_num_tokens=64) as llm, LLM(
        model, max_attention_window_size=8, max_num_tokens=3
    ) as in_chunks:  # fmt: skip
        torch.testing.assert_close(scores(llm, PROMPT), scores(in_chunks, PROMPT), rtol=0, atol=TOLERANCE)


def test_a_window_as_long_as_the_longest_sequence_is_none(tiny_model: Path) -> None:
    with LLM(tiny_model, max_seq_len=64, max_attention_window_size=64, kv_cache_max_tokens=256) as llm:
        assert [group.window for group in llm.runtime_config.kv_groups] == [0]


@pytest.mark.parametrize(("windows", "sinks"), [([8], 0), ([8, 128], 0), ([12], 3)])
def test_a_prefix_is_reused_and_changes_nothing(tiny_model: Path, windows: list[int], sinks: int) -> None:
    naive = NaiveLlama(tiny_model, (windows * 3)[:3], sinks)
    other = [*PROMPT[:36], 99, 98, 97]
    with LLM(
        tiny_model, kv_cache_max_tokens=512, max_attention_window_size=windows, sink_token_length=sinks
    ) as llm:  # fmt: skip
        greedy(llm, PROMPT, 1)
        again = greedy(llm, other, 4)
        assert again.num_cached_tokens == 36
        assert again.outputs[0].token_ids == naive.greedy(other, 4)


@pytest.mark.parametrize(("windows", "sinks"), [([20], 0), ([20, 128, 40], 0), ([20], 4)])
def test_a_chat_says_the_same_with_reuse_and_without(tiny_model: Path, windows: list[int], sinks: int) -> None:
    """Turns over one prefix, in a pool where earlier ones are evicted: what a hit takes has left windows before."""
    texts, num_cached = [], []
    for reuse in (True, False):
        with LLM(
            tiny_model, kv_cache_max_tokens=176, max_attention_window_size=windows, sink_token_length=sinks,
            max_num_tokens=24, enable_block_reuse=reuse,
        ) as llm:  # fmt: skip
            said = []
            for question in range(6):
                prompt = [*PROMPT, *(question for _ in range(5))]
                for _ in range(3):
                    answer = greedy(llm, prompt, 9)
                    num_cached.append(answer.num_cached_tokens)
                    prompt += [*answer.outputs[0].token_ids, 7, question]
                said.append(prompt)
            texts.append(said)
    assert texts[0] == texts[1]
    assert sum(num_cached[:18]) > 18 * 32 and not any(num_cached[18:])


def test_beams_share_what_a_window_keeps(tiny_model: Path) -> None:
    sampling = SamplingParams(use_beam_search=True, best_of=3, n=3, max_tokens=5, ignore_eos=True)
    outputs = []
    for reuse in (True, False):
        with LLM(
            tiny_model, kv_cache_max_tokens=512, max_attention_window_size=12, sink_token_length=3,
            enable_block_reuse=reuse,
        ) as llm:  # fmt: skip
            outputs.append([beam.token_ids for beam in llm.generate(PROMPT, sampling).outputs])
    assert outputs[0] == outputs[1]


def test_with_sinks_a_text_outgrows_the_model_in_the_same_blocks(tiny_model: Path) -> None:
    window, length = 24, 10 * 24
    with LLM(
        tiny_model, max_batch_size=1, max_num_tokens=16, max_seq_len=1000, kv_cache_max_tokens=80,
        max_attention_window_size=window, sink_token_length=4,
    ) as llm:  # fmt: skip
        used, token_ids = [], []
        sampling = SamplingParams(temperature=0, max_tokens=900, ignore_eos=True)
        for output in llm.stream(PROMPT[:5], sampling):
            used.append(llm.stats.num_blocks_used)
            token_ids = output.outputs[0].token_ids
    assert len(token_ids) == 900 > 256  # the model's own limit
    assert max(used[length:-1]) <= 1 + -(-(window - 4) // 16) + 1 <= 5  # the sinks' block and the newest tokens'
    naive = NaiveLlama(tiny_model, [window] * 3, 4)
    assert token_ids[:40] == naive.greedy(PROMPT[:5], 40)


@pytest.mark.parametrize(
    ("windows", "most"),
    [
        ([32], 3),  # of 16 tokens; what 32 tokens see lies in three
        ([32, 20, 256], 3 + 3 + 16),  # three groups of one layer, the last of which sees all 256 tokens
        ([32, 256, 32], 3 + 3 + 16),
    ],
)
def test_a_window_keeps_the_blocks_it_sees(tiny_model: Path, windows: list[int], most: int) -> None:
    with LLM(tiny_model, max_batch_size=1, max_num_tokens=16, max_attention_window_size=windows) as llm:
        used: list[int] = []
        llm.loop.on_step = lambda stats, seconds: used.append(stats.num_blocks_used)
        llm.generate(PROMPT, SamplingParams(temperature=0, max_tokens=256 - len(PROMPT), ignore_eos=True))
    assert len(used) >= 256 - len(PROMPT)  # and steps of the prompt
    assert max(used) == most


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"max_attention_window_size": 0}, r"max_attention_window_size is 0; .* such as 1024\."),
        ({"max_attention_window_size": [8, -1]}, r"max_attention_window_size is \[8, -1\]; .*\."),
        (
            {"max_attention_window_size": [8] * 4},
            r"max_attention_window_size has 4 windows; give at most 3, one a layer\.",
        ),
        ({"sink_token_length": 4, "max_seq_len": 1000}, r"give max_attention_window_size, at most 256\."),
        ({"sink_token_length": 4, "max_attention_window_size": [8, 16]}, r"one window for all layers"),
        (
            {"sink_token_length": 8, "max_attention_window_size": 8},
            r"sink_token_length is 8; it must be less than the window of 8 tokens, such as 4\.",
        ),
        ({"sink_token_length": 3, "max_attention_window_size": 3}, r"less than the window of 3 tokens, such as 2\."),
        ({"sink_token_length": -1, "max_attention_window_size": 8}, r"sink_token_length is -1"),
        ({"max_attention_window_size": 8, "max_seq_len": 1000}, r"max_seq_len is 1000"),
        ({"max_attention_window_size": "8"}, r"max_attention_window_size is '8'"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(tiny_model: Path, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(SlipstreamError, match=sentence):
        LLM(tiny_model, **options)
