"""Options about servers that are asked over HTTP, and what they mean."""

import json
import random
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slipstream.errors import UsageError

if TYPE_CHECKING:
    from slipstream.bench.dataset import Sample
    from slipstream.bench.serving import Endpoint, Limits

Protocol = Annotated[
    str, typer.Option(help="How it is asked: openai (completions), openai-chat, tgi, or triton (KServe's generate).")
]
ModelName = Annotated[str | None, typer.Option("--model", "-m", help="The model's name there.  [default: its first]")]
InputOutputLen = Annotated[
    str, typer.Option(help="Without a --dataset: words of each prompt, some a token each, and tokens of its answer.")
]
Dataset = Annotated[Path | None, typer.Option(help="Requests, as slipstream bench prepare-dataset makes them.")]
TokenizerName = Annotated[
    str | None, typer.Option("--tokenizer", help="To write token ids as text, and count where the server does not.")
]
ApiKey = Annotated[str | None, typer.Option(help="Sent as Authorization: Bearer.")]
ExtraBody = Annotated[
    str | None, typer.Option(help='JSON for each request; null leaves a field out: {"ignore_eos": null}.')
]
Timeout = Annotated[float, typer.Option(min=1, help="Seconds without a byte after which a request has failed.")]
Seed = Annotated[int, typer.Option(help="Chooses prompts and arrivals.")]


def open_endpoint(
    url: str, protocol: str, model: str | None, tokenizer: str | None, api_key: str | None, extra_body: str | None,
    timeout: float,
) -> "tuple[Endpoint, str]":  # fmt: skip
    """With the name of its model."""
    from slipstream.bench.dataset import open_tokenizer
    from slipstream.bench.http_client import Target, first_model
    from slipstream.bench.protocols import PROTOCOLS
    from slipstream.bench.serving import Endpoint

    if not re.match(r"https?://[^/]", url):
        raise UsageError(f"The server is {url!r}; it must be a URL, such as http://127.0.0.1:8000.")
    if protocol not in PROTOCOLS:
        raise UsageError(f"--protocol is {protocol!r}; it must be one of {', '.join(PROTOCOLS)}.")
    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    target = Target(url.rstrip("/").removesuffix("/v1"), headers, timeout)
    how = PROTOCOLS[protocol]
    name = model if model is not None else how.default_model
    name = first_model(target) if name is None else name
    opened = None if tokenizer is None else open_tokenizer(tokenizer)
    if opened is None and not how.counts_tokens:
        print(
            f"note: {protocol} does not say how many tokens an answer has, so events are counted; give --tokenizer.",
            file=sys.stderr,
        )
    return Endpoint(target, how, name, _object(extra_body), opened), name


def samples_for(dataset: Path | None, input_output_len: str, count: int, seed: int) -> "list[Sample]":
    """A data set's, or as many of random words."""
    from slipstream.bench.dataset import random_words, read_dataset

    if dataset is not None:
        return read_dataset(dataset)
    found = re.fullmatch(r"([1-9]\d{0,6}),([1-9]\d{0,6})", input_output_len)
    if found is None:
        raise UsageError(f'--input_output_len is {input_output_len!r}; it must be two numbers, such as "128,64".')
    return random_words(random.Random(seed), count, int(found[1]), int(found[2]))


def parse_limits(text: str | None) -> "Limits | None":
    """ "ttft:500,tpot:50": milliseconds."""
    from slipstream.bench.serving import Limits

    if text is None:
        return None
    found = dict(re.findall(r"(?:^|[, ])(ttft|tpot|latency):(\d+(?:\.\d+)?)(?=$|[, ])", text))
    if len(found) != text.count(":") or not found:
        raise UsageError(f"--goodput is {text!r}; it must be limits in ms, such as ttft:500,tpot:50,latency:5000.")
    return Limits(**{name: float(limit) for name, limit in found.items()})


def _object(text: str | None) -> dict[str, Any]:
    try:
        value = json.loads(text or "{}")
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise UsageError(f'--extra_body is {text!r}; it must be a JSON object, such as {{"top_k": 1}}.')
    return value
