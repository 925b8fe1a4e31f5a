"""Bodies over HTTP: of infer, and what the OpenAPI document says of those that are read by hand."""

from typing import Any

from pydantic import Field

from slipstream.serve.document import Responses, schema_of
from slipstream.serve.fields import Fields
from slipstream.serve.kserve.ensemble import INPUTS, Input

_TYPES = {
    "BYTES": "string", "BOOL": "boolean", "FP16": "number", "FP32": "number", "INT32": "integer", "UINT64": "integer",
}  # fmt: skip
_BINARY = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}  # JSON, then bytes

BINARY_TOO: Responses = {200: {"content": _BINARY}}


class TensorParameters(Fields):
    binary_data_size: int | None = None


class TensorFields(Fields):
    name: str
    shape: list[int]
    datatype: str
    parameters: TensorParameters = TensorParameters()
    data: list[Any] | None = None


class OutputParameters(Fields):
    binary_data: bool | None = None


class OutputFields(Fields):
    name: str
    parameters: OutputParameters = OutputParameters()


class InferFields(Fields):
    id: str = ""
    parameters: dict[str, Any] = Field(default_factory=dict)
    inputs: list[TensorFields]
    outputs: list[OutputFields] = Field(default_factory=list)


def infer_document() -> dict[str, Any]:
    return _document(schema_of(InferFields), _BINARY)


def generate_document() -> dict[str, Any]:
    inputs = {name: _input_schema(each) for name, each in INPUTS.items()}
    inputs["max_tokens"]["description"] = "required, here or in parameters"
    whole = {"type": "integer", "minimum": 0}
    beside = {
        "id": {"type": "string"},
        "priority": whole,
        "timeout": whole | {"description": "microseconds"},
        "sequence_id": {"enum": [0, ""]},
        "sequence_start": {"enum": [False]},
        "sequence_end": {"enum": [False]},
        "triton_enable_empty_final_response": {"type": "boolean"},
    }
    nested = {"type": "object", "description": "any of the other fields, but id, as one object"}
    schema = {
        "type": "object",
        "properties": inputs | beside | {"parameters": nested},
        "required": ["text_input"],
        "additionalProperties": False,
    }
    return _document(schema, {})


def _input_schema(given: Input) -> dict[str, Any]:
    value = {"type": _TYPES[given.datatype]}
    values: dict[str, Any] = {"type": "array", "items": value}
    if not given.is_list:
        values["maxItems"] = 1
    said = {} if given.refusal is None else {"description": f"refused where it asks for something: {given.refusal}"}
    return {"anyOf": [value, values]} | said


def _document(schema: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}} | more}}
