"""Every field that our OpenAPI document has does what it says, or is refused by its name; so is any that it has not."""

import json
import re
import shutil
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest
from tokenizers import Tokenizer, processors

from tests.serve.conftest import serving
from tests.serve.field_effects import ENDPOINTS, SHOWS_ALL, Body, Effect, Note, Refused, TimesOut

VOLATILE = {
    "id", "item_id", "created", "created_at", "prompt_tokens_details", "input_tokens_details", "seed",
}  # fmt: skip
BODILESS = {"/v2/repository/index", "/start_profile", "/stop_profile"}
WRONG = (1.5, "\0wrong", True, [[[]]], {"wrong": 1})

FIELDS = [(path, name) for path, endpoint in ENDPOINTS.items() for name in endpoint.table]


@pytest.fixture(scope="module")
def client(engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """The tiny model with a tokenizer that puts a special token first, behind a template that shows all it gets."""
    folder = tmp_path_factory.mktemp("every_field")
    shutil.copytree(engine, folder / "engine")
    file = folder / "engine" / "tokenizer" / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.post_processor = processors.TemplateProcessing("<|im_start|> $A", None, [("<|im_start|>", 0)])
    tokenizer.save(str(file))
    template = folder / "shows_all.jinja"
    template.write_text(SHOWS_ALL)
    with (
        serving(folder / "engine", "--chat_template", template) as server,
        httpx.Client(base_url=server.url, timeout=30) as client,  # one, as opening it takes longer than most answers
    ):
        yield client


@pytest.fixture(scope="module")
def document(client: httpx.Client) -> Any:
    return client.get("/openapi.json").json()


def test_no_field_is_without_an_entry(document: Any) -> None:
    for path, methods in document["paths"].items():
        if "post" not in methods or path in BODILESS:
            continue
        known = path.replace("/versions/{version}", "")
        found = dict(_fields(document, _body_schema(document, path)))
        assert set(found) == set(ENDPOINTS[known].table), path


@pytest.mark.parametrize(("path", "name"), FIELDS)
def test_a_field_has_its_effect_or_is_refused(client: httpx.Client, document: Any, path: str, name: str) -> None:
    endpoint = ENDPOINTS[path]
    entry = endpoint.table[name]
    match entry:
        case Refused(with_):
            _assert_refused(client.post(_url(path), json={**endpoint.plain, **with_}), name.split(".")[-1])
        case TimesOut(with_):
            assert client.post(_url(path), json={**endpoint.plain, **with_}).status_code == 504
        case Note(with_, without):
            answers = [_answer(client, path, {**endpoint.plain, **(body or {})}) for body in (without, with_)]
            assert _steady(answers[0]) == _steady(answers[1])
        case Effect(with_, without, sees, before, tries):
            for body in before:
                _answer(client, path, {**endpoint.plain, **body})
            changed = _answer(client, path, {**endpoint.plain, **with_})
            plain = (_answer(client, path, {**endpoint.plain, **(without or {})}) for _ in range(tries))
            if sees is None:
                assert _steady(changed) != _steady(next(plain))
            else:
                assert sees(changed) and not all(map(sees, plain))  # asked until one is another


@pytest.mark.parametrize(("path", "name"), FIELDS)
def test_a_wrong_type_and_an_unknown_neighbour_are_refused_by_name(
    client: httpx.Client, document: Any, path: str, name: str
) -> None:
    endpoint, last = ENDPOINTS[path], name.split(".")[-1]
    schema = {**dict(_fields(document, _body_schema(document, path)))[name], "components": document["components"]}
    is_valid = jsonschema.Draft202012Validator(schema).is_valid
    wrong = next(value for value in WRONG if not is_valid(value))
    entry = endpoint.table[name]
    neighbours = [] if isinstance(entry, Refused) else [("nonsense", 1)]  # that is refused already
    for key, value in ((last, wrong), *neighbours):
        body = deepcopy({**endpoint.plain, **entry.with_})
        _object_with(body, name)[key] = value
        _assert_refused(client.post(_url(path), json=body), key)


def _fields(document: Any, schema: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(where it is, its schema) of all fields of a body, those of all variants of its parts."""
    if "$ref" in schema:
        schema = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    for variant in [*schema.get("anyOf", ()), *schema.get("oneOf", ())]:
        yield from _fields(document, variant, path)
    if "items" in schema:
        yield from _fields(document, schema["items"], f"{path}[]")
    for name, field in schema.get("properties", {}).items():
        where = f"{path}.{name}" if path else name
        yield where, field
        yield from _fields(document, field, where)


def _body_schema(document: Any, path: str) -> Any:
    return document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]


def _url(path: str) -> str:
    return path.format(name="talker")


def _answer(client: httpx.Client, path: str, body: Body) -> Any:
    """What was answered, a stream as the list of its events."""
    response = client.post(_url(path), json=body)
    assert response.status_code == 200, (body, response.text)
    if response.headers["content-type"].startswith("text/event-stream"):
        lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: {")]
        return [json.loads(line) for line in lines]
    return response.json() if response.headers["content-type"] == "application/json" else response.content


def _steady(answer: Any) -> Any:
    """Without what is another each time."""
    match answer:
        case {"cache_read_input_tokens": num_cached, "input_tokens": num_others, **rest}:
            return _steady(rest) | {"input_tokens": num_cached + num_others}
        case dict():
            return {name: _steady(value) for name, value in answer.items() if name not in VOLATILE}
        case list():
            return [_steady(value) for value in answer]
    return answer


def _assert_refused(response: httpx.Response, name: str) -> None:
    assert 400 <= response.status_code < 500, response.text
    error = response.json()["error"]
    message = error if isinstance(error, str) else error["message"]
    assert re.search(rf"\b{name}\b", message) and "\n" not in message, message


def _object_with(body: Any, path: str) -> Any:
    """The object that holds the field of this path."""
    *way, last = path.replace("[]", "").split(".")
    level = [body]
    for name in way:
        parts = [each[name] for each in level if name in each]
        level = [part for each in parts for part in (each if isinstance(each, list) else [each])]
    return next(each for each in level if last in each)
