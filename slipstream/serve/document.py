"""What the OpenAPI document says of answers: the error bodies of a protocol, and where an answer may be a stream."""

from typing import Any

from pydantic import TypeAdapter

Responses = dict[int | str, dict[str, Any]]  # as FastAPI takes them

STREAM: Responses = {200: {"content": {"text/event-stream": {}}}}  # beside the JSON


def errors_as(body: Any) -> Responses:
    """Of all endpoints of a protocol whose errors have this body, which is always JSON."""
    content = {"application/json": {"schema": schema_of(body)}}
    return {
        "4XX": {"content": content, "description": "The request is refused, or comes when there is no room for it."},
        "5XX": {"content": content, "description": "It failed, or there is no engine at the moment."},
    }


def schema_of(body: Any) -> dict[str, Any]:
    """Its JSON schema in one piece, as what FastAPI does not read itself has no place for the parts."""
    schema = TypeAdapter(body).json_schema()
    inlined: dict[str, Any] = _inlined(schema, schema.get("$defs", {}))
    return inlined


def _inlined(schema: Any, parts: dict[str, Any]) -> Any:
    match schema:
        case {"$ref": name}:
            return _inlined(parts[name.removeprefix("#/$defs/")], parts)
        case dict():
            return {key: _inlined(value, parts) for key, value in schema.items() if key != "$defs"}
        case list():
            return [_inlined(each, parts) for each in schema]
    return schema
