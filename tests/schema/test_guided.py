"""What Guided refuses, and that what it keeps is text."""

from typing import Any

import pytest

from slipstream.errors import RequestError
from slipstream.schema.guided import MAX_CHARS, Guided
from slipstream.schema.sampling import SamplingParams

DEEP: dict[str, Any] = {}
for _ in range(100_000):
    DEEP = {"not": DEEP}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "guided has nothing; give exactly one of json_schema, json_object, regex, choice, grammar."),
        ({"regex": "a", "choice": ["a"]}, "guided has regex and choice; give exactly one"),
        ({"json_object": True, "json_schema": {}}, "guided has json_schema and json_object; give exactly one"),
        ({"json_object": 1}, "guided.json_object is 1; it must be True or False"),
        ({"json_schema": [1]}, "guided.json_schema is [1]; it must be a JSON schema"),
        ({"json_schema": "[1]"}, "guided.json_schema is '[1]'; it must be a JSON schema"),
        ({"json_schema": "{"}, "guided.json_schema is '{'; it must be a JSON schema"),
        ({"json_schema": {"const": {1, 2}}}, "guided.json_schema is {'const': {1, 2}}; it must be a JSON schema"),
        ({"json_schema": {"const": float("nan")}}, "guided.json_schema is {'const': nan}; it must be a JSON schema"),
        ({"json_schema": "[" * 100_000}, "guided.json_schema is '[[[["),
        ({"regex": ""}, "guided.regex is ''; it must be a regular expression"),
        ({"regex": b"a"}, "guided.regex is b'a'; it must be a regular expression"),
        ({"choice": []}, "guided.choice is []; it must be a list of texts"),
        ({"choice": "yes"}, "guided.choice is 'yes'; it must be a list of texts"),
        ({"choice": ["yes", ""]}, "guided.choice is ['yes', '']; it must be a list of texts"),
        ({"choice": ["yes", 1]}, "guided.choice is ['yes', 1]; it must be a list of texts"),
        ({"grammar": 5}, "guided.grammar is 5; it must be a grammar"),
        ({"regex": "\ud800"}, "guided.regex holds a lone surrogate"),
        ({"json_schema": {"const": "\udfff"}}, "guided.json_schema holds a lone surrogate"),
        ({"regex": "a" * (MAX_CHARS + 1)}, f"guided.regex has {MAX_CHARS + 1} characters; it must have at most"),
        ({"choice": ["ab"] * MAX_CHARS}, f"guided.choice has {2 * MAX_CHARS} characters; it must have at most"),
    ],
)
def test_what_is_no_grammar_is_refused_in_a_sentence(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError) as refusal:
        Guided(**fields)
    assert str(refusal.value).startswith(message)
    assert len(str(refusal.value)) < 400 and "\n" not in str(refusal.value)


def test_a_schema_too_deep_to_be_text_is_refused() -> None:
    with pytest.raises(RequestError, match="it must be a JSON schema"):
        Guided(json_schema=DEEP)


def test_it_is_kept_as_text_that_can_be_compared() -> None:
    schema = {"properties": {"b": {"const": "é"}, "a": {}}}
    guided = Guided(json_schema=schema)
    assert guided.json_schema == '{"properties": {"b": {"const": "é"}, "a": {}}}'
    assert guided == Guided(json_schema=guided.json_schema) and hash(guided) == hash(Guided(json_schema=schema))
    assert Guided(choice=["a", "b"]).choice == ("a", "b")
    assert repr(Guided(regex="a")) == "Guided(regex='a')" and len(repr(Guided(regex="a" * 10_000))) < 100


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"guided": "[0-9]+"}, r"guided is '\[0-9\]\+'; it must be Guided"),
        ({"guided": Guided(regex="a"), "ignore_eos": True}, "ignore_eos is True, but with guided"),
        ({"guided": Guided(regex="a"), "min_tokens": 3}, "min_tokens is 3, but with guided"),
        ({"guided": Guided(regex="a"), "use_beam_search": True, "n": 2}, "guided is Guided.*no meaning with use_beam"),
    ],
)
def test_what_does_not_go_with_it_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        SamplingParams(**fields)
