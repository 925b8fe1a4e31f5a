"""LLM as a caller meets it: prompts in several forms, streams, coroutines, beams, scores; refusals in a sentence."""

import asyncio
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slipstream import LLM, SamplingParams
from slipstream.api.requests import default_sampling
from slipstream.errors import CapacityError, ModelError, RequestError, SlipstreamError

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
PROMPT = [3, 14, 15, 92, 65]


def test_one_prompt_gives_one_output_and_a_list_a_list(tiny_llm: LLM) -> None:
    one = tiny_llm.generate(PROMPT, GREEDY)
    assert one.finished and one.prompt_token_ids == PROMPT
    assert len(one.outputs[0].token_ids) == 12 and one.outputs[0].finish_reason == "length"
    many = tiny_llm.generate([PROMPT, [1]], [GREEDY, SamplingParams(max_tokens=2, temperature=0)])
    assert many[0].outputs[0].token_ids == one.outputs[0].token_ids
    assert len(many[1].outputs[0].token_ids) == 2


def test_stream_grows_to_what_generate_gives(tiny_llm: LLM) -> None:
    lengths = [len(output.outputs[0].token_ids) for output in tiny_llm.stream(PROMPT, GREEDY)]
    assert lengths == list(range(1, 13))


def test_streams_of_several_show_each_as_it_is(tiny_llm: LLM) -> None:
    sampling = SamplingParams(n=3, temperature=1.0, seed=3, max_tokens=5, ignore_eos=True, logprobs=0)
    seen = [0, 0, 0]
    for output in tiny_llm.stream(PROMPT, sampling):
        lengths = [len(each.token_ids) for each in output.outputs]
        assert sum(lengths) == sum(seen) + 1 and all(new >= old for new, old in zip(lengths, seen, strict=True))
        seen = lengths
    assert seen == [5, 5, 5] and output.outputs == tiny_llm.generate(PROMPT, sampling).outputs


def test_leaving_a_stream_aborts_its_request(tiny_llm: LLM) -> None:
    for _ in tiny_llm.stream(PROMPT, SamplingParams(max_tokens=200, ignore_eos=True)):
        break
    tiny_llm.generate(PROMPT, GREEDY)  # one more step at least has passed
    assert tiny_llm.stats.num_running == 0 and tiny_llm.stats.num_blocks_used == 0


def test_coroutines_share_the_batch(tiny_llm: LLM) -> None:
    async def several() -> list[Any]:
        return await asyncio.gather(*(tiny_llm.generate_async([index], GREEDY) for index in range(6)))

    outputs = asyncio.run(several())
    assert [output.outputs[0].token_ids for output in outputs] == [
        tiny_llm.generate([index], GREEDY).outputs[0].token_ids for index in range(6)
    ]


def test_score_async_equals_score(tiny_llm: LLM) -> None:
    assert asyncio.run(tiny_llm.score_async(PROMPT)) == tiny_llm.score(PROMPT)


def test_cancelling_a_coroutine_frees_its_blocks(tiny_llm: LLM) -> None:
    async def cancelled() -> None:
        task = asyncio.create_task(tiny_llm.generate_async(PROMPT, SamplingParams(max_tokens=200, ignore_eos=True)))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancelled())
    tiny_llm.generate(PROMPT, GREEDY)
    assert tiny_llm.stats.num_blocks_used == 0


def test_threads_share_the_engine(tiny_llm: LLM) -> None:
    found: dict[int, list[int]] = {}

    def work(token_id: int) -> None:
        found[token_id] = tiny_llm.generate([token_id], GREEDY).outputs[0].token_ids

    threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {index: tiny_llm.generate([index], GREEDY).outputs[0].token_ids for index in range(8)}


def test_n_completions_differ_and_repeat_with_the_seed(tiny_llm: LLM) -> None:
    sampling = SamplingParams(n=4, temperature=1.0, seed=11, max_tokens=10, ignore_eos=True)
    first = [output.token_ids for output in tiny_llm.generate(PROMPT, sampling).outputs]
    assert len({tuple(token_ids) for token_ids in first}) == 4
    assert first == [output.token_ids for output in tiny_llm.generate(PROMPT, sampling).outputs]


def test_best_of_returns_the_most_likely(tiny_llm: LLM) -> None:
    sampling = SamplingParams(n=8, temperature=1.0, seed=5, max_tokens=6, logprobs=0, ignore_eos=True)
    everything = tiny_llm.generate(PROMPT, sampling).outputs
    best = tiny_llm.generate(
        PROMPT, SamplingParams(n=2, best_of=8, temperature=1.0, seed=5, max_tokens=6, ignore_eos=True)
    )
    ranked = sorted(everything, key=lambda output: -output.cumulative_logprob)
    assert [output.token_ids for output in best.outputs] == [output.token_ids for output in ranked[:2]]


def test_beams_are_at_least_as_likely_as_greedy(tiny_llm: LLM) -> None:
    greedy = tiny_llm.generate(PROMPT, SamplingParams(temperature=0, max_tokens=6, logprobs=0)).outputs[0]
    beams = tiny_llm.generate(PROMPT, SamplingParams(use_beam_search=True, best_of=4, n=2, max_tokens=6)).outputs
    assert len(beams) == 2 and beams[0].cumulative_logprob >= beams[1].cumulative_logprob
    assert beams[0].cumulative_logprob >= greedy.cumulative_logprob - 1e-5


def test_beams_describe_their_prompt(tiny_llm: LLM) -> None:
    sampling = SamplingParams(use_beam_search=True, n=2, max_tokens=3, prompt_logprobs=0)
    described = tiny_llm.generate(PROMPT, sampling).prompt_logprobs
    assert [entry and entry.logprob for entry in described] == pytest.approx(tiny_llm.score(PROMPT).logprobs)


def test_prefix_reuse_is_counted_and_changes_nothing(tiny_llm: LLM) -> None:
    prompt = list(range(40))
    cold = tiny_llm.generate(prompt, GREEDY, cache_salt="a")
    warm = tiny_llm.generate(prompt, GREEDY, cache_salt="a")
    other = tiny_llm.generate(prompt, GREEDY, cache_salt="b")
    assert (cold.num_cached_tokens, warm.num_cached_tokens, other.num_cached_tokens) == (0, 39, 0)
    assert cold.outputs[0].token_ids == warm.outputs[0].token_ids == other.outputs[0].token_ids


def test_score_is_the_logprob_of_each_token(tiny_llm: LLM) -> None:
    output = tiny_llm.generate(PROMPT, SamplingParams(temperature=0, max_tokens=5, logprobs=0, ignore_eos=True))
    score = tiny_llm.score(PROMPT + output.outputs[0].token_ids)
    assert score.logprobs[0] is None and len(score.logprobs) == 10
    expected = [entry.logprob for entry in output.outputs[0].logprobs]
    assert score.logprobs[5:] == pytest.approx(expected, abs=1e-4)
    assert [each.token_ids for each in tiny_llm.score([[1, 2], [3, 4]])] == [[1, 2], [3, 4]]


def test_logits_processor_decides(tiny_llm: LLM) -> None:
    def only_seven(token_ids: list[int], logits: Any) -> Any:
        assert token_ids[:5] == PROMPT
        logits[:] = float("-inf")
        logits[7] = 0
        return logits

    output = tiny_llm.generate(PROMPT, SamplingParams(max_tokens=3, logits_processors=[only_seven], ignore_eos=True))
    assert output.outputs[0].token_ids == [7, 7, 7]


def test_stop_token_ids_and_min_tokens(tiny_llm: LLM) -> None:
    free = tiny_llm.generate(PROMPT, GREEDY).outputs[0].token_ids
    stop = free[3]
    output = tiny_llm.generate(PROMPT, SamplingParams(temperature=0, max_tokens=12, stop_token_ids=[stop])).outputs[0]
    assert output.finish_reason == "stop" and output.stop_reason == stop
    assert output.token_ids == free[: free.index(stop) + 1]
    later = SamplingParams(temperature=0, max_tokens=12, min_tokens=8, stop_token_ids=[stop])
    assert len(tiny_llm.generate(PROMPT, later).outputs[0].token_ids) >= 8


@pytest.mark.parametrize(
    ("prompt", "sampling", "words"),
    [
        ([[]], GREEDY, "empty"),
        ([5, 128], GREEDY, "128"),
        ([-1], GREEDY, "-1"),
        (["x"], GREEDY, "tokenizer"),
        (list(range(100)) * 3, GREEDY, "300 tokens"),
        ([1], SamplingParams(stop_token_ids=[500]), "500"),
        ([1], SamplingParams(logit_bias={400: 1.0}), "400"),
    ],
)
def test_a_bad_prompt_is_one_sentence(tiny_llm: LLM, prompt: Any, sampling: SamplingParams, words: str) -> None:
    with pytest.raises(SlipstreamError, match=words) as caught:
        raise_error_of(tiny_llm.generate(prompt[0] if prompt == ["x"] else prompt, sampling))
    assert "\n" not in str(caught.value)


def raise_error_of(outputs: Any) -> None:
    """A list comes back whole, with the error inside."""
    raise RequestError(outputs[0].error)


def test_a_bad_prompt_in_a_list_stops_no_other(tiny_llm: LLM) -> None:
    good, empty, outside = tiny_llm.generate([PROMPT, [], [999]], GREEDY)
    assert len(good.outputs[0].token_ids) == 12 and good.error is None
    assert "empty" in empty.error and "999" in outside.error
    assert outside.outputs[0].finish_reason == "error"


@pytest.mark.parametrize(
    ("prompts", "sampling", "words"),
    [
        (5, GREEDY, "5"),
        ((token_id for token_id in PROMPT), GREEDY, "generator"),
        (PROMPT, [GREEDY], "sampling_params"),
        (PROMPT, {"max_tokens": 3}, "max_tokens"),
        ([PROMPT, PROMPT], [GREEDY, 5], "5"),
    ],
)
def test_what_is_no_prompt_or_sampling_is_said_so(tiny_llm: LLM, prompts: Any, sampling: Any, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        tiny_llm.generate(prompts, sampling)


def test_what_is_no_prompt_in_a_list_stops_no_other(tiny_llm: LLM) -> None:
    nothing, good = tiny_llm.generate([None, PROMPT], [None, GREEDY])
    assert "None" in nothing.error and good.error is None and len(good.outputs[0].token_ids) == 12


@pytest.mark.parametrize(
    "fields", [{"priority": "high"}, {"priority": -(10**30)}, {"cache_salt": ["a"]}, {"cache_salt": "\ud800"}]
)
def test_a_value_of_the_wrong_type_does_not_reach_the_engine(tiny_llm: LLM, fields: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=r"(priority|cache_salt) is"):
        tiny_llm.generate(PROMPT, GREEDY, **fields)
    assert len(tiny_llm.generate(PROMPT, GREEDY).outputs[0].token_ids) == 12


def test_a_top_k_past_any_vocabulary_keeps_all(tiny_llm: LLM) -> None:
    def sampled(top_k: int) -> list[int]:
        sampling = SamplingParams(top_k=top_k, temperature=1.0, seed=1, max_tokens=8, ignore_eos=True)
        return tiny_llm.generate(PROMPT, sampling).outputs[0].token_ids

    assert sampled(2**63 - 1) == sampled(0)


def test_a_list_that_cannot_be_sent_whole_leaves_nothing_running(tiny_llm: LLM) -> None:
    with pytest.raises(ModelError, match="tokenizer"):
        tiny_llm.generate([PROMPT, "text"], SamplingParams(max_tokens=200, ignore_eos=True))
    tiny_llm.generate(PROMPT, GREEDY)
    assert tiny_llm.stats.num_running == 0 and tiny_llm.stats.num_blocks_used == 0


def test_the_best_of_several_are_streamed_once_they_are_known(tiny_llm: LLM) -> None:
    sampling = SamplingParams(n=2, best_of=4, temperature=1.0, seed=5, max_tokens=6, ignore_eos=True)
    (only,) = tiny_llm.stream(PROMPT, sampling)
    assert only.finished
    assert [each.token_ids for each in only.outputs] == [
        each.token_ids for each in tiny_llm.generate(PROMPT, sampling).outputs
    ]


def test_a_stream_left_open_outlives_its_llm(tiny_model: Path) -> None:
    with LLM(tiny_model, max_batch_size=8, max_num_tokens=64, kv_cache_max_tokens=512) as llm:
        stream = llm.stream([1], SamplingParams(max_tokens=200, ignore_eos=True))
        next(stream)
    stream.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_does_what_float32_does(tiny_model: Path, dtype: str) -> None:
    prompts = [PROMPT, [index % 128 for index in range(100)]]  # the second in chunks
    with LLM(tiny_model, dtype=dtype, max_batch_size=8, max_num_tokens=64, kv_cache_max_tokens=2048) as llm:
        sampling = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=2, prompt_logprobs=0)
        outputs = llm.generate(prompts, sampling)
        for output in outputs:
            first = output.outputs[0]
            tokens = output.prompt_token_ids + first.token_ids
            assert len(output.prompt_logprobs) == len(output.prompt_token_ids)
            # Logprobs are float32 of the rounded logits: they agree whichever way the KV came about, to its rounding.
            scored = llm.score(tokens).logprobs[len(output.prompt_token_ids) :]
            assert [entry.logprob for entry in first.logprobs] == pytest.approx(scored, abs=0.1)
        beams = llm.generate(PROMPT, SamplingParams(use_beam_search=True, n=3, max_tokens=6)).outputs
        assert beams[0].cumulative_logprob >= beams[1].cumulative_logprob


def test_a_kv_cache_that_does_not_fit_names_one_that_does(tiny_model: Path) -> None:
    with pytest.raises(CapacityError, match=r"--kv_cache_max_tokens to [1-9]"):
        LLM(tiny_model, kv_cache_max_tokens=10**12)


def test_limits_above_the_engine_are_refused(tiny_llm: LLM) -> None:
    with pytest.raises(CapacityError, match="max_batch_size is 65"):
        LLM(tiny_llm._folder.path, max_batch_size=65)


@pytest.mark.parametrize("name", ["max_batch_size", "max_num_tokens", "max_seq_len"])
@pytest.mark.parametrize("value", [0, -5, 1.5, "8"])
def test_limits_no_engine_could_have_are_refused_before_the_build(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: Any
) -> None:
    forbid_builds(monkeypatch)
    with pytest.raises(CapacityError, match=f"{name} is .*at least 1"):
        LLM(tiny_model, **{name: value})


def forbid_builds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slipstream.api.building.cached_engine", lambda *args, **more: pytest.fail("it was built"))


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("kv_cache_max_tokens", "5", "is '5'; it must be a whole number"),
        ("kv_cache_max_tokens", 0, "is 0; it must be a whole number of at least 1"),
        ("kv_cache_max_bytes", "8GiB", "is '8GiB'; it must be a whole number of at least 1, such as 2**30"),
        ("kv_cache_free_memory_fraction", "half", "is 'half'; it must be a number above 0"),
        ("kv_cache_free_memory_fraction", float("nan"), "is nan; it must be a number above 0"),
        ("tokenizer", 5, "is 5; it must be the path of a folder"),
        ("disabled_passes", "fuse_qkv", "is 'fuse_qkv'; it must be a list of names, such as ['fuse_qkv']"),
        ("extra_passes", [5], "is [5]; it must be a list of names"),
        ("enable_block_reuse", "no", "is 'no'; it must be True or False"),
        ("deterministic", 1, "is 1; it must be True or False"),
        ("chat_template", Path("my.jinja"), "it must be the text of a template"),
        ("model_cls_file", 5, "is 5; it must be the path of a Python file"),
        ("device", None, "is None; it must be a string, such as 'auto'"),
    ],
)
def test_options_of_a_wrong_type_are_refused_before_the_build(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, option: str, value: Any, words: str
) -> None:
    forbid_builds(monkeypatch)
    with pytest.raises(SlipstreamError, match=f"^{option} is ") as caught:
        LLM(tiny_model, **{option: value})
    assert words in str(caught.value)


def test_deterministic_runs_are_refused_on_a_cpu_before_the_build(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid_builds(monkeypatch)
    with pytest.raises(SlipstreamError, match=r"^deterministic needs a GPU .*; leave it out\.$"):
        LLM(tiny_model, device="cpu", deterministic=True)


def test_more_tokens_than_the_model_has_positions_are_refused_before_the_build(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SLIPSTREAM_CACHE", str(tmp_path))
    monkeypatch.setattr("slipstream.build.cache.build", lambda *args, **more: pytest.fail("it was built"))
    with pytest.raises(SlipstreamError, match=r"max_seq_len is 9999; .* takes 1 to 256"):
        LLM(tiny_model, max_seq_len=9999)


def test_ids_of_numpy_are_ids_and_bytes_are_not(tiny_llm: LLM) -> None:
    expected = tiny_llm.generate(PROMPT, GREEDY).outputs[0].token_ids
    assert tiny_llm.generate([np.int64(token_id) for token_id in PROMPT], GREEDY).outputs[0].token_ids == expected
    assert tiny_llm.generate([np.array(PROMPT)], GREEDY)[0].outputs[0].token_ids == expected
    for prompts in (b"ab", bytearray(b"ab")):
        with pytest.raises(RequestError, match="it must be a string"):
            tiny_llm.generate(prompts, GREEDY)
        assert "it must be a string" in tiny_llm.generate([prompts], GREEDY)[0].error


@pytest.mark.real_model
@pytest.mark.parametrize("messages", [None, 5, [], "hello", [{"content": "x"}]])
def test_what_is_no_conversation_is_said_so(smollm2_llm: LLM, messages: Any) -> None:
    with pytest.raises(RequestError, match="messages"):
        smollm2_llm.chat(messages)


@pytest.mark.real_model
def test_a_sampling_value_is_not_lost_in_the_chat_template(smollm2_llm: LLM) -> None:
    with pytest.raises(RequestError, match="max_tokens is no value of a chat template"):
        smollm2_llm.chat([{"role": "user", "content": "Hi"}], max_tokens=5)


def test_a_request_larger_than_the_pool_is_refused_and_says_what_fits(tiny_model: Path) -> None:
    with LLM(tiny_model, max_batch_size=8, max_num_tokens=64, kv_cache_max_tokens=32) as llm:
        with pytest.raises(SlipstreamError, match="max_tokens"):
            llm.generate([1, 2, 3], SamplingParams(max_tokens=100))
        assert len(llm.generate([1, 2, 3], SamplingParams(max_tokens=8, ignore_eos=True)).outputs[0].token_ids) == 8


def test_nothing_runs_after_close(tiny_model: Path) -> None:
    llm = LLM(tiny_model, max_batch_size=8, max_num_tokens=64, kv_cache_max_tokens=32)
    llm.close()
    llm.close()
    with pytest.raises(SlipstreamError, match="closed"):
        llm.generate([1], GREEDY)


def test_unknown_choices_list_the_known_ones(tiny_model: Path) -> None:
    with pytest.raises(RequestError, match="max_utilization"):
        LLM(tiny_model, max_batch_size=8, max_num_tokens=64, capacity_scheduler_policy="greedy")
    with pytest.raises(ModelError, match="bfloat16"):
        LLM(tiny_model, dtype="float8")


def test_generation_config_means_what_it_means_in_hugging_face() -> None:
    assert default_sampling({}).is_greedy
    assert default_sampling({"temperature": 0.6, "top_p": 0.9}).is_greedy
    sampling = default_sampling({"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 40, "max_new_tokens": 9})
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.max_tokens) == (0.6, 0.9, 40, 9)


@pytest.mark.real_model
def test_stop_strings_cut_the_text_wherever_tokens_end(smollm2_llm: LLM) -> None:
    free = smollm2_llm.generate("Count: one, two, three,", SamplingParams(temperature=0, max_tokens=40)).outputs[0].text
    stop = free[11:16]
    sampling = SamplingParams(temperature=0, max_tokens=40, stop=stop)
    output = smollm2_llm.generate("Count: one, two, three,", sampling).outputs[0]
    assert output.text == free[: free.index(stop)] and (output.finish_reason, output.stop_reason) == ("stop", stop)
    pieces = [o.outputs[0].text_diff for o in smollm2_llm.stream("Count: one, two, three,", sampling)]
    assert "".join(pieces) == output.text


@pytest.mark.real_model
def test_chat_answers(smollm2_llm: LLM) -> None:
    question = [{"role": "user", "content": "What is the capital of France?"}]
    output = smollm2_llm.chat(question, SamplingParams(temperature=0, max_tokens=30))
    assert "Paris" in output.outputs[0].text and output.outputs[0].finish_reason == "stop"
    again = smollm2_llm.chat(question, SamplingParams(temperature=0, max_tokens=30))
    assert again.num_cached_tokens == len(again.prompt_token_ids) - 1


@pytest.mark.real_model
def test_bad_words_are_not_said(smollm2_llm: LLM) -> None:
    question = [{"role": "user", "content": "What is the capital of France?"}]
    sampling = SamplingParams(temperature=0, max_tokens=20, bad_words=["Paris"])
    assert "Paris" not in smollm2_llm.chat(question, sampling).outputs[0].text
