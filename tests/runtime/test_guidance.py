"""Masks of grammars, walked at random: every text they let through matches, and some token always may come next."""

import json
import re
import sys
import threading
import time
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from slipstream.errors import RequestError
from slipstream.runtime.guidance import Guidance
from slipstream.schema.guided import Guided
from slipstream.text.tokenizer import Tokenizer
from tests.cli.conftest import write_tokenizer

EOS, VOCAB = 1, 328  # the model's logits are padded, and the tokenizer has 320 tokens


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder: Path = tmp_path_factory.mktemp("bytes")
    write_tokenizer(folder, vocab_size=320)
    return Tokenizer.open(folder)


@pytest.fixture(scope="module")
def guidance(tokenizer: Tokenizer) -> Guidance:
    return Guidance(tokenizer.to_json, {EOS})


def allowed(guidance: Guidance, *matchers: Any) -> list[set[int]]:
    logits_RV = torch.zeros(len(matchers) + 1, VOCAB)
    guidance.keep_allowed(logits_RV, dict(enumerate(matchers)))
    assert not logits_RV[-1].any(), "a row without a matcher was touched"
    return [set(row.isfinite().nonzero()[:, 0].tolist()) for row in logits_RV[:-1]]


def walk(guidance: Guidance, tokenizer: Tokenizer, guided: Guided, seed: int, most: int = 2000) -> str:
    """A text drawn from the grammar, each token from what the mask allows."""
    guidance.prepare(guided)
    matcher, generator, said = guidance.start(guided), torch.Generator().manual_seed(seed), b""
    for _ in range(most):
        (may_come,) = allowed(guidance, matcher)
        choices = sorted(may_come)
        assert choices, "the mask bans everything"
        token_id = choices[int(torch.randint(len(choices), (), generator=generator))]
        assert matcher.consume_token(token_id), matcher.get_error()
        if token_id == EOS:
            return said.decode()
        said += tokenizer.token_bytes(token_id)
    raise AssertionError(f"no end after {most} tokens: {said[-200:]!r}")


# ---- texts ----------------------------------------------------------------------------------------------------------

REGEXES = [
    r"[0-9]{3}-[a-f]+", r"(yes|no)(, (yes|no)){0,3}", r"a/b\.c", r'"quoted"', r"é{1,3}ü?", r"\d{2}", r".{1,5}",
    r"^anchored$", r"[^a-zA-Z]{2,4}", r"line\nbreak", r"(?i)case", r"The capital of [A-Z][a-z]{2,8}",
]  # fmt: skip


@pytest.mark.parametrize("regex", REGEXES)
def test_a_regex_is_matched_in_full(guidance: Guidance, tokenizer: Tokenizer, regex: str) -> None:
    for seed in range(10):
        assert re.fullmatch(regex, walk(guidance, tokenizer, Guided(regex=regex), seed))


@given(st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=6), min_size=1, max_size=6), st.integers(0))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_choice_is_written_to_the_letter_and_ends_where_one_ends(
    guidance: Guidance, tokenizer: Tokenizer, choice: list[str], seed: int
) -> None:
    guided = Guided(choice=choice)
    guidance.prepare(guided)
    matcher, said, texts = guidance.start(guided), b"", [each.encode() for each in choice]
    generator = torch.Generator().manual_seed(seed % 2**32)
    while True:
        (may_come,) = allowed(guidance, matcher)
        assert may_come and (EOS in may_come) == (said in texts)
        goes_on = sorted(may_come - {EOS})
        for token_id in goes_on:
            assert any(text.startswith(said + tokenizer.token_bytes(token_id)) for text in texts)
        if not goes_on:
            assert said in texts
            break
        token_id = goes_on[int(torch.randint(len(goes_on), (), generator=generator))]
        assert matcher.consume_token(token_id)
        said += tokenizer.token_bytes(token_id)


def schemas(depth: int = 2) -> st.SearchStrategy[dict[str, Any]]:
    """Small schemas of what llguidance follows. Each has an end: no text or number of any length."""
    leaves = st.one_of(
        st.tuples(st.integers(-50, 50), st.integers(0, 300)).map(
            lambda ends: {"type": "integer", "minimum": ends[0], "maximum": ends[0] + ends[1]}
        ),
        st.tuples(st.integers(0, 3), st.integers(0, 4)).map(
            lambda ends: {"type": "string", "minLength": ends[0], "maxLength": ends[0] + ends[1]}
        ),
        st.lists(
            st.text(max_size=4) | st.integers(-(2**53), 2**53) | st.booleans() | st.none(), min_size=1, max_size=4
        ).map(lambda values: {"enum": values}),
        st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"type": "string", "pattern": "^[a-c]{2}x?$"}]),
        st.sampled_from([{"type": "string", "format": name} for name in ("date", "ipv4", "uuid")]),
    )
    if depth == 0:
        return leaves
    inner = schemas(depth - 1)
    arrays = st.tuples(inner, st.integers(0, 2), st.integers(0, 2)).map(
        lambda each: {"type": "array", "items": each[0], "minItems": each[1], "maxItems": each[1] + each[2]}
    )
    objects = st.tuples(st.dictionaries(st.text(max_size=4), inner, max_size=3), st.data()).map(
        lambda each: {
            "type": "object",
            "properties": each[0],
            "required": each[1].draw(st.permutations(sorted(each[0])))[: each[1].draw(st.integers(0, 3))],
            "additionalProperties": False,
        }
    )
    return leaves | arrays | objects | st.lists(inner, min_size=1, max_size=2).map(lambda all_: {"anyOf": all_})


@given(schemas(), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_what_a_schema_lets_through_validates(
    guidance: Guidance, tokenizer: Tokenizer, schema: dict[str, Any], seed: int
) -> None:
    text = walk(guidance, tokenizer, Guided(json_schema=schema), seed)
    jsonschema.validate(json.loads(text), schema, format_checker=jsonschema.FormatChecker())


def test_keys_come_in_the_order_of_the_schema(guidance: Guidance, tokenizer: Tokenizer) -> None:
    schema = {
        "type": "object",
        "properties": {"b": {"enum": [1]}, "a": {"enum": [2]}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }
    for seed in range(5):
        text = walk(guidance, tokenizer, Guided(json_schema=schema), seed)
        assert list(json.loads(text)) == ["b", "a"]
        assert max(map(len, re.findall(r"\s+", text)), default=0) <= 20


def test_any_object_is_an_object_and_nothing_else(guidance: Guidance, tokenizer: Tokenizer) -> None:
    guided = Guided(json_object=True)
    guidance.prepare(guided)
    (may_come,) = allowed(guidance, guidance.start(guided))
    assert {tokenizer.token_bytes(token_id)[:1] for token_id in may_come} == {b"{"}
    matcher = guidance.start(guided, tokenizer.encode('{"is": [1, {"any": null}]}'))
    assert allowed(guidance, matcher) == [{EOS}]


@pytest.mark.parametrize(
    "grammar",
    [
        'start: greeting " " name\ngreeting: "hello" | "bye"\nname: /[A-Z][a-z]{1,4}/',
        'root ::= greeting " " name\ngreeting ::= "hello" | "bye"\nname ::= [A-Z] [a-z] [a-z]?',
    ],
    ids=["lark", "gbnf"],
)
def test_grammars_of_both_kinds(guidance: Guidance, tokenizer: Tokenizer, grammar: str) -> None:
    for seed in range(10):
        assert re.fullmatch("(hello|bye) [A-Z][a-z]{1,4}", walk(guidance, tokenizer, Guided(grammar=grammar), seed))


# ---- many at once ---------------------------------------------------------------------------------------------------


def test_each_row_has_the_mask_that_it_has_alone(guidance: Guidance, tokenizer: Tokenizer) -> None:
    guideds = [Guided(regex=regex) for regex in REGEXES]
    for guided in guideds:
        guidance.prepare(guided)
    matchers = [guidance.start(guided) for guided in guideds]
    together = allowed(guidance, *matchers)
    assert together == [allowed(guidance, guidance.start(guided))[0] for guided in guideds]
    assert len(set(map(frozenset, together))) > 5


def test_a_matcher_resumed_is_one_that_went_on(guidance: Guidance, tokenizer: Tokenizer) -> None:
    guided = Guided(regex="(The capital of France is Paris, ){3}")
    guidance.prepare(guided)
    matcher, token_ids = guidance.start(guided), tokenizer.encode("The capital of France is Paris, The cap")
    for count, token_id in enumerate(token_ids):
        assert allowed(guidance, matcher) == allowed(guidance, guidance.start(guided, token_ids[:count]))
        if not matcher.consume_token(token_id):
            break
    assert count > 3


def test_threads_prepare_and_start_at_once_and_more_than_are_kept(tokenizer: Tokenizer) -> None:
    guidance, failures = Guidance(tokenizer.to_json, {EOS}), []

    def work(name: int) -> None:
        try:
            for number in range(40):
                guided = Guided(regex=f"{name}x{number}")
                guidance.prepare(guided)
                guidance.prepare(Guided(regex="shared"))
                assert re.fullmatch(f"{name}x{number}", walk(guidance, tokenizer, guided, seed=0))
        except Exception as failure:
            failures.append(failure)

    threads = [threading.Thread(target=work, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    matcher = guidance.start(Guided(regex="0x0"))  # dropped since: compiled once more
    assert not matcher.is_error() and len(guidance._compiled) <= 64


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"regex": "[a-z"}, "guided.regex cannot be followed: unclosed character class."),
        ({"regex": r"(a)\1"}, "guided.regex cannot be followed: backreferences are not supported."),
        ({"regex": "(?<=a)b"}, "guided.regex cannot be followed: look-around"),
        ({"regex": r"[^\s\S]"}, "guided.regex matches no text"),
        ({"json_schema": {"type": "objekt"}}, "guided.json_schema cannot be followed: Invalid type: objekt."),
        ({"json_schema": {"not": {}}}, 'guided.json_schema cannot be followed: Unimplemented keys: ["not"].'),
        ({"json_schema": {"allOf": [{"const": 1}, {"const": 2}]}}, "guided.json_schema cannot be followed: Unsatis"),
        ({"json_schema": {"$ref": "http://localhost/schema.json"}}, "guided.json_schema cannot be followed: Resource"),
        ({"json_schema": nested(200)}, "guided.json_schema cannot be followed: recursion limit exceeded"),
        ({"json_schema": '{"const": NaN}'}, "guided.json_schema cannot be followed: "),
        ({"json_schema": {"$ref": "#"}}, "guided.json_schema matches no text"),
        ({"grammar": "start: there"}, "guided.grammar cannot be followed: at 1(8): unknown name"),
        ({"grammar": "start: start"}, "guided.grammar matches no text"),
        ({"grammar": "root ::= there"}, "guided.grammar is no GBNF: Rule 'there' not found; give Lark or GBNF."),
        ({"grammar": "root ::= " + "(" * 30_000}, "guided.grammar is no GBNF: maximum recursion depth"),
    ],
)
def test_what_cannot_be_followed_is_refused_in_a_sentence(
    guidance: Guidance, fields: dict[str, Any], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RequestError) as refusal:
        guidance.prepare(Guided(**fields))
    assert str(refusal.value).startswith(message)
    assert len(str(refusal.value)) < 400 and "\n" not in str(refusal.value)
    assert capfd.readouterr() == ("", "")


HOSTILE = {
    "deep": {"json_schema": nested(200)},
    "enum": {"json_schema": {"enum": [f"word {number}" for number in range(4000)]}},
    "properties": {"json_schema": {"properties": {f"p{number}": {"type": "string"} for number in range(2000)}}},
    "products": {
        "json_schema": {"allOf": [{"anyOf": [{"minimum": n}, {"maximum": -n}, {"minLength": n}]} for n in range(20)]}
    },
    "lengths": {"json_schema": {"type": "array", "minItems": 10**6, "items": {"minLength": 10**6, "type": "string"}}},
    "repeats": {"regex": "((a{1,1000}){1,1000}){1,1000}"},
    "subsets": {"regex": "(.*a.{30}|.*b.{29}|.*c.{50})+"},
    "backtracking": {"regex": "(a?){500}a{500}"},
    "ambiguous": {"grammar": "start: start start start | /a?/ | /a*/"},
    "choices": {"choice": [f"{number:x}" * 2 for number in range(6000)]},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_ones_cost_a_bounded_time(guidance: Guidance, name: str) -> None:
    """Refused, or followed for a while, until they end or are too complex; in a minute where they ask for ages."""
    started = time.perf_counter()
    guided = Guided(**HOSTILE[name])
    try:
        guidance.prepare(guided)
    except RequestError:
        pass
    else:
        matcher, generator = guidance.start(guided), torch.Generator().manual_seed(0)
        for _ in range(50):
            (may_come,) = allowed(guidance, matcher)
            choices = sorted(may_come)
            token_id = choices[int(torch.randint(len(choices), (), generator=generator))]
            if not matcher.consume_token(token_id) or token_id == EOS:
                break
    assert time.perf_counter() - started < 60


def test_what_is_missing_is_named(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    guided = Guided(regex="a")
    with pytest.raises(RequestError, match="guided needs a tokenizer"):
        Guidance(None, {EOS}).prepare(guided)
    with pytest.raises(RequestError, match="guided needs a token that ends a text"):
        Guidance(tokenizer.to_json, ()).prepare(guided)
    with pytest.raises(RequestError, match="guided cannot read this model's tokenizer"):
        Guidance(lambda: "{}", {EOS}).prepare(guided)
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(RequestError, match=r"pip install 'slipstream\[guided\]'"):
        Guidance(tokenizer.to_json, {EOS}).prepare(guided)
