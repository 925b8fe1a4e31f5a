"""JsonObject accepts what json.loads accepts, and notices at once what cannot become that."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slipstream.text.tools.json_object import JsonObject
from tests.text.tools.writers import TEXTS, VALUES


def accepts(text: str) -> bool:
    reader = JsonObject()
    try:
        for character in text.rstrip(" \t\n\r"):
            reader.step(character)
    except ValueError:
        return False
    return reader.done


def is_object(text: str) -> bool:
    def refuse(constant: str) -> None:
        raise ValueError(constant)  # NaN and Infinity are Python's, not JSON's

    try:
        return isinstance(json.loads(text, parse_constant=refuse), dict)
    except ValueError:
        return False


@settings(max_examples=400, deadline=None)
@given(
    members=st.dictionaries(TEXTS, VALUES, max_size=4),
    indent=st.sampled_from([None, 0, 2]),
    ascii_only=st.booleans(),
    at=st.integers(0, 200),
    removed=st.integers(0, 3),
    put=st.text(alphabet='{}[]",:\\ue0-1.+ntrfalse \n\x01', max_size=3),
)
def test_accepts_what_json_loads_accepts(
    members: dict[str, object], indent: int | None, ascii_only: bool, at: int, removed: int, put: str
) -> None:
    text = json.dumps(members, indent=indent, ensure_ascii=ascii_only)
    assert accepts(text)
    at %= len(text) + 1
    damaged = text[:at] + put + text[at + removed :]
    assert accepts(damaged) == is_object(damaged), damaged


@pytest.mark.parametrize(
    "text",
    [
        '{"a": 1e+5}',
        '{"a": -0.0}',
        '{"a": "\\u00e9\\n\\/"}',
        ' \n{"a" : [ ] , "b" : { } }',
        '{"a":[[],{},[null,true]]}',
    ],
)
def test_accepts(text: str) -> None:
    assert is_object(text) and accepts(text)


@pytest.mark.parametrize(
    ("text", "taken"),
    [
        ("[]", 0), ("x", 0), ("{,", 1), ('{"a",', 4), ('{"a":}', 5), ('{"a":1,}', 7), ('{"a":[1,]', 8),
        ('{"a":[}', 6), ('{"a":01}', 7), ('{"a":1.}', 7), ('{"a":tru}', 8), ('{"a":"\n', 6), ('{"a":"\\x', 7),
        ('{"a":"\\u00g', 10), ('{"a":NaN', 5), ('{"a":1 2', 7), ("{}}", 2),
    ],
)  # fmt: skip
def test_stops_at_the_first_character_that_is_wrong(text: str, taken: int) -> None:
    reader = JsonObject()
    for character in text[:taken]:
        reader.step(character)
    with pytest.raises(ValueError):
        reader.step(text[taken])


def test_knows_the_outermost_members() -> None:
    reader = JsonObject()
    for character in '{"a": {"b": "c"}, "d": "\\u00e9\\"", "e": ["f"':
        reader.step(character)
    assert (reader.key, reader.strings, reader.depth, reader.done) == ("e", {"d": 'é"'}, 2, False)


def test_depth_and_long_numbers_are_no_danger() -> None:
    assert accepts('{"a":' + "[" * 100_000 + "]" * 100_000 + "}")
    assert not accepts('{"a":' + "1" * 100_000 + "}")
