"""Answers under JSON schemas: a hundred schemas, a model that knows nothing, a hundred answers that are valid."""

import asyncio
import json
import random
from typing import Any

import jsonschema
import openai

from tests.serve.conftest import Server

NUM_SCHEMAS = 100


def schema(rng: random.Random, depth: int = 0) -> dict[str, Any]:
    """One that has short answers only: the model's texts are 256 tokens long, and it chooses at random."""
    kinds = ["string", "integer", "number", "boolean", "null", "enum", "const", "any_of"]
    kind = rng.choice(kinds if depth else [*(["object"] * 4), "array"]) if depth < 2 else rng.choice(kinds[:-1])
    match kind:
        case "object":
            names = rng.sample(["city", "rank", "size", "is_new", "né", 'a "b"'], rng.randint(1, 2))
            required = rng.sample(names, rng.randint(0, len(names)))
            properties = {name: schema(rng, depth + 1) for name in names}
            return {"type": kind, "properties": properties, "required": required, "additionalProperties": False}
        case "array":
            low = rng.randint(0, 1)
            return {"type": kind, "items": schema(rng, depth + 1), "minItems": low, "maxItems": low + rng.randint(0, 1)}
        case "string":
            return rng.choice(
                [{"type": kind, "minLength": 1, "maxLength": 8}, {"type": kind, "pattern": "^[a-d]{2,5}$"}]
            )
        case "integer":
            low = rng.randint(-50, 50)
            return {"type": kind, "minimum": low, "maximum": low + rng.randint(0, 1000)}
        case "number":
            return {"type": kind, "minimum": 0, "maximum": 1, "multipleOf": 0.25}
        case "enum":
            return {"enum": rng.sample(["red", "blue", 1, 2.5, True, None, "naïve"], 3)}
        case "const":
            return {"const": rng.choice(["x", 7, False])}
        case "any_of":
            return {"anyOf": [{"type": "boolean"}, {"type": "string", "maxLength": 4}]}
    return {"type": kind}


def test_a_hundred_of_a_hundred_answers_are_valid(server: Server, no_blanks: dict[str, float]) -> None:
    schemas = [schema(random.Random(number)) for number in range(NUM_SCHEMAS)]
    assert len({json.dumps(each) for each in schemas}) > NUM_SCHEMAS / 2

    async def all_answers() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:

            async def answer(number: int) -> str:
                form: Any = {"name": "form", "schema": schemas[number], "strict": True}
                completion = await client.chat.completions.create(
                    model="talker",
                    messages=[{"role": "user", "content": "?"}],
                    response_format={"type": "json_schema", "json_schema": form},
                    seed=number,
                    temperature=1.0,
                    logit_bias=no_blanks,  # type: ignore[arg-type]
                )
                (choice,) = completion.choices
                assert choice.finish_reason == "stop", (schemas[number], choice.message.content)
                return choice.message.content or ""

            return await asyncio.gather(*map(answer, range(NUM_SCHEMAS)))

    for text, wanted in zip(asyncio.run(all_answers()), schemas, strict=True):
        jsonschema.validate(json.loads(text), wanted)
