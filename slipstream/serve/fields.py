"""Fields: what the bodies of all protocols have in common. A field is honoured, or refused by its name."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator

from slipstream.api.requests import default_sampling
from slipstream.errors import RequestError
from slipstream.schema.sampling import SamplingParams

NotHere = Mapping[str, tuple[str, tuple[Any, ...]]]  # by name: why, and the values that ask for nothing


class Fields(BaseModel):
    """A body, or a part of one. Values must be of the JSON type that is asked for; other fields are refused."""

    model_config = ConfigDict(extra="forbid", strict=True)

    not_here: ClassVar[NotHere] = {}  # fields of the protocol that are refused, with more to say than that

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_is_not_here(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        for name in cls.not_here.keys() & body.keys() - cls.model_fields.keys():
            why, neutral = cls.not_here[name]
            if body[name] is not None and body[name] not in neutral:
                raise RequestError(f"{name} is refused: {why}; leave it out.")
            body = {key: value for key, value in body.items() if key != name}
        return body


def asked_sampling(
    generation: Mapping[str, Any], given: Mapping[str, Any], *, logit_bias: Mapping[str, float] | None, **more: Any
) -> SamplingParams:
    """What was asked for; where nothing was, what the model's generation_config.json says, if that samples.

    given: by the names of SamplingParams, as more.  logit_bias: by token ids as JSON has them, which is as text.
    """
    base = default_sampling(generation) if generation.get("do_sample") else SamplingParams()
    if logit_bias is not None:
        more["logit_bias"] = {_token_id(key): bias for key, bias in logit_bias.items()}
    return replace(base, **{"best_of": None, **given, **more})


def _token_id(key: str) -> int:
    if not key.isdecimal():
        raise RequestError(f"logit_bias has the key {key!r}; its keys are token ids, such as '42'.")
    return int(key)
