"""Bodies of TGI's protocol. A field is honoured, or refused by its name; the fields here are all there are.

The meanings are those of its router (router/src/lib.rs, validation.rs): a filter or a temperature asks for sampling as
do_sample does, and without any of them the likeliest token is taken.
"""

import random
from typing import Any, ClassVar, Literal

from pydantic import Field

from slipstream.errors import RequestError
from slipstream.schema.guided import Guided
from slipstream.schema.sampling import MAX_LOGPROBS, SamplingParams
from slipstream.serve.fields import Fields, NotHere

MAX_STOPS = 256  # each is looked for in every character of the text


class GrammarFields(Fields):
    type: Literal["json", "json_schema", "regex"]
    value: str | dict[str, Any]

    def guided(self) -> Guided:
        match self.type, self.value:
            case "regex", str(pattern):
                return Guided(regex=pattern)
            case "json_schema", {"schema": schema}:
                return Guided(json_schema=schema)
            case "json", schema:
                return Guided(json_schema=schema)
        form = "a string" if self.type == "regex" else 'an object such as {"schema": {"type": "object"}}'
        raise RequestError(f"grammar.value must be {form} where grammar.type is {self.type}.")


class ParameterFields(Fields):
    not_here: ClassVar[NotHere] = {
        "adapter_id": ("adapters (LoRA) are not here yet", ()),
        "watermark": ("texts are not marked here", (False,)),
    }

    best_of: int | None = Field(None, description="completions made; the likeliest token by token is the answer")
    decoder_input_details: bool | None = Field(None, description="details with the prompt's own logprobs")
    details: bool | None = None
    do_sample: bool | None = None
    frequency_penalty: float | None = None
    grammar: GrammarFields | None = None
    max_new_tokens: int | None = Field(100, ge=1, description="null: as many as fit")
    repetition_penalty: float | None = None
    return_full_text: bool | None = Field(None, description="the prompt before the text")
    seed: int | None = None
    stop: list[str] | None = Field(None, max_length=MAX_STOPS)
    stop_sequences: list[str] | None = Field(None, max_length=MAX_STOPS, description="stop by its older name")
    temperature: float | None = Field(None, gt=0)
    top_k: int | None = Field(None, ge=1)
    top_n_tokens: int | None = Field(None, ge=0, le=MAX_LOGPROBS, description="likeliest tokens beside each one")
    top_p: float | None = Field(None, gt=0, lt=1)
    truncate: int | None = Field(None, ge=1, description="keep only the last tokens of the prompt")
    typical_p: float | None = Field(None, gt=0, lt=1)

    @property
    def has_details(self) -> bool:
        return bool(self.details or self.decoder_input_details)

    @property
    def samples(self) -> bool:
        filters = (self.top_k, self.top_p, self.typical_p)
        return bool(self.do_sample) or self.temperature not in (None, 1.0) or any(filters)

    def sampling(self) -> SamplingParams:
        if self.stop and self.stop_sequences:
            raise RequestError("stop and stop_sequences are two names of one list; give one of them.")
        if self.best_of is not None and self.best_of > 1:
            self._check_best_of()
        given = self.model_dump(
            include={"top_k", "top_p", "typical_p", "repetition_penalty", "frequency_penalty", "temperature"},
            exclude_none=True,
        )
        if not self.samples:
            given["temperature"] = 0.0
        return SamplingParams(
            **given,
            n=1 if self.best_of is None else self.best_of,
            max_tokens=self.max_new_tokens,
            seed=random.getrandbits(63) if self.seed is None else self.seed,  # drawn here, since details tell it
            stop=self.stop or self.stop_sequences or (),
            include_stop_str_in_output=True,  # as TGI does
            logprobs=self.top_n_tokens or 0,
            prompt_logprobs=0 if self.decoder_input_details else None,
            guided=None if self.grammar is None else self.grammar.guided(),
        )

    def _check_best_of(self) -> None:
        if not self.samples:
            raise RequestError(f"best_of is {self.best_of}, which needs sampling; set do_sample, or best_of to 1.")
        if self.seed is not None:
            raise RequestError(f"seed is {self.seed} and best_of {self.best_of}; with several texts leave seed out.")


class GenerateFields(Fields):
    inputs: str
    parameters: ParameterFields = ParameterFields.model_validate({})
    stream: bool = Field(False, description="of POST / only; the other endpoints say it themselves")

    def sampling(self, *, streams: bool) -> SamplingParams:
        if not self.inputs:
            raise RequestError("inputs is empty; give at least one character.")
        sampling = self.parameters.sampling()
        for name, is_given in (
            ("best_of", (self.parameters.best_of or 1) > 1),
            ("decoder_input_details", self.parameters.decoder_input_details),
        ):
            if streams and is_given:
                raise RequestError(f"{name} is shown with a whole answer only; leave it out, or do not stream.")
        return sampling
