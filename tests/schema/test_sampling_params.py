"""Every value that SamplingParams refuses, refused by name with the value; and the good ones, taken."""

import math
from typing import Any

import pytest

from slipstream.errors import RequestError
from slipstream.schema.sampling import SamplingParams

BAD = [
    *[("n", value) for value in (0, -1, 257, 1.0, True, "1", None)],
    *[("best_of", value) for value in (0, 257, 2.5)],
    *[("temperature", value) for value in (-0.1, 100.1, math.nan, math.inf, "hot", None, True)],
    *[("top_k", value) for value in (-2, 1.5, None, True)],
    *[("top_p", value) for value in (0, 0.0, -0.5, 1.01, math.nan)],
    *[("min_p", value) for value in (-0.01, 1.01, math.nan)],
    *[("typical_p", value) for value in (0.0, 1.01, math.nan)],
    *[("repetition_penalty", value) for value in (0.0, -1.0, 100.5, math.inf)],
    *[("presence_penalty", value) for value in (-100.5, 100.5, math.nan)],
    *[("frequency_penalty", value) for value in (-100.5, 100.5, math.nan)],
    *[("length_penalty", value) for value in (-100.5, 100.5, math.nan)],
    *[("no_repeat_ngram_size", value) for value in (-1, 2.0)],
    *[("max_tokens", value) for value in (0, -1, 1.5, True)],
    *[("min_tokens", value) for value in (-1, 17, 1.5)],  # 17 is above the default max_tokens
    *[("seed", value) for value in (-1, 2**63, 0.5)],
    *[("logprobs", value) for value in (-1, 101, True)],
    *[("prompt_logprobs", value) for value in (-1, 101, 1.0)],
    *[("length_penalty", value) for value in ("long", 10**400)],
    *[("ignore_eos", value) for value in ("no", None, 0)],
    *[("skip_special_tokens", value) for value in (1, "yes")],
    *[("include_stop_str_in_output", value) for value in ([], 1)],
    *[("use_beam_search", value) for value in ("yes", 4)],
    *[("early_stopping", value) for value in ("never", 1)],
    *[("stop", value) for value in (5, b"end")],
    *[("bad_words", value) for value in (5, 1.5)],
    *[("stop_token_ids", value) for value in (5, "12")],
    *[("logits_processors", value) for value in (5, len)],
    *[("logit_bias", value) for value in ([1, 2], "5", 0)],
]


@pytest.mark.parametrize(("name", "value"), BAD)
def test_a_value_out_of_range_is_refused_by_name_and_value(name: str, value: Any) -> None:
    with pytest.raises(RequestError) as refusal:
        SamplingParams(**{name: value})
    message = str(refusal.value)
    assert message.startswith(f"{name} is {value!r}; it must be ")
    assert message.count("\n") == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stop": ["ok", ""]}, "stop holds ''"),
        ({"stop": [7]}, "stop holds 7"),
        ({"bad_words": [""]}, "bad_words holds ''"),
        ({"stop_token_ids": [3, -1]}, "stop_token_ids is -1"),
        ({"stop_token_ids": ["3"]}, "stop_token_ids is '3'"),
        ({"logit_bias": {-1: 0.5}}, "logit_bias token id is -1"),
        ({"logit_bias": {"7": 0.5}}, "logit_bias token id is '7'"),
        ({"logit_bias": {7: 1001.0}}, "logit_bias[7] is 1001.0"),
        ({"logit_bias": {7: math.nan}}, "logit_bias[7] is nan"),
        ({"logits_processors": [3]}, "logits_processors holds 3"),
        ({"top_k": 2**63}, "top_k is 9223372036854775808"),
        ({"max_tokens": 10**30}, f"and at most {2**63 - 1}"),
        ({"stop": "\ud800"}, "stop holds '\\ud800', which no text can have"),
        ({"n": 3, "best_of": 2}, "best_of is 2"),
        ({"n": 2, "temperature": 0}, "n=2, best_of=2 with greedy sampling"),
        ({"best_of": 2, "top_k": 1}, "n=1, best_of=2 with greedy sampling"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens is 5"),
        ({"use_beam_search": True}, "use_beam_search with one beam"),
    ],
)
def test_a_bad_list_or_combination_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError) as refusal:
        SamplingParams(**fields)
    assert message in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 0.7),
        ("top_k", 5),
        ("top_p", 0.5),
        ("min_p", 0.1),
        ("typical_p", 0.5),
        ("repetition_penalty", 1.1),
        ("presence_penalty", 0.5),
        ("frequency_penalty", -0.5),
        ("no_repeat_ngram_size", 2),
        ("logit_bias", {3: 1.0}),
        ("bad_words", ("darn",)),
        ("stop", ("\n",)),
        ("min_tokens", 2),
        ("logits_processors", (print,)),
    ],
)
def test_what_a_beam_search_would_ignore_is_refused(name: str, value: Any) -> None:
    with pytest.raises(RequestError) as refusal:
        SamplingParams(n=2, use_beam_search=True, **{name: value})
    assert str(refusal.value).startswith(
        f"{name} is {value!r}, which has no meaning with use_beam_search; leave it at "
    )


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"n": 256, "best_of": 256},
        {"temperature": 0},
        {"temperature": 100, "top_k": 2**40, "top_p": 1e-9, "min_p": 1, "typical_p": 1e-9},
        {"repetition_penalty": 100.0, "presence_penalty": -100.0, "frequency_penalty": 100},
        {"max_tokens": None, "min_tokens": 10**6},
        {"seed": 2**63 - 1, "logprobs": 0, "prompt_logprobs": 100},
        {"stop": ["a", "b"], "stop_token_ids": [0, 5], "bad_words": ["c"], "logit_bias": {0: -1000, 5: 1000.0}},
        {"logits_processors": [lambda token_ids, logits: logits]},
        {"n": 2, "use_beam_search": True, "temperature": 0, "logit_bias": {}, "length_penalty": -2.0},
        {"best_of": 4, "use_beam_search": True, "early_stopping": True, "stop_token_ids": [5], "logprobs": 3},
    ],
)
def test_good_values_pass(fields: dict[str, Any]) -> None:
    SamplingParams(**fields)


def test_spellings_are_made_uniform() -> None:
    params = SamplingParams(stop="end", stop_token_ids=[1, 2], bad_words=["x"], top_k=-1, n=3)
    assert params.stop == ("end",)
    assert params.stop_token_ids == (1, 2)
    assert params.bad_words == ("x",)
    assert params.top_k == 0
    assert params.best_of == params.num_sequences == 3
    assert SamplingParams(bad_words="abc").bad_words == ("abc",)  # one word, not three letters
    nothing = SamplingParams(stop=None, bad_words=None, stop_token_ids=None, logits_processors=None)
    assert nothing == SamplingParams()


@pytest.mark.parametrize(
    ("fields", "greedy"),
    [
        ({}, False),
        ({"temperature": 0}, True),
        ({"temperature": 1e-9}, True),
        ({"top_k": 1}, True),
        ({"top_k": 2}, False),
    ],
)
def test_is_greedy(fields: dict[str, Any], greedy: bool) -> None:
    assert SamplingParams(**fields).is_greedy is greedy
