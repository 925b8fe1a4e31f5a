"""slipstream bench prepare-dataset: requests to measure with, a line each."""

import random
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slipstream.errors import UsageError

if TYPE_CHECKING:
    from slipstream.bench.dataset import Sample
    from slipstream.text.tokenizer import Tokenizer

# What each kind must have, and may have besides.
KINDS = {
    "token-norm-dist": (("num_requests", "input_mean", "output_mean"), ("input_stdev", "output_stdev")),
    "token-unif-dist": (("num_requests", "input_min", "input_max", "output_min", "output_max"), ()),
    "shared-prefix": (
        ("num_requests", "num_prefixes", "prefix_len", "input_mean", "output_mean"), ("input_stdev", "output_stdev"),
    ),
    "dataset": (
        ("dataset_name", "dataset_input_key"),
        ("num_requests", "dataset_prompt", "dataset_output_key", "output_len_dist", "max_input_len"),
    ),
    "conversations": (("dataset_name",), ("num_requests", "max_input_len")),
}  # fmt: skip
EXAMPLES = {"dataset_name": "rows.jsonl", "dataset_input_key": "article", "output_len_dist": "200,10"}


def prepare_dataset(
    kind: Annotated[str, typer.Argument(help=f"{', '.join(KINDS)}.")],
    tokenizer: Annotated[
        str, typer.Option(help="Folder of a tokenizer or a model, an engine folder, .gguf file, Hub id or smollm2.")
    ],
    output: Annotated[Path | None, typer.Option(help="Write the lines there, too.  [default: to stdout alone]")] = None,
    num_requests: Annotated[int | None, typer.Option(min=1, help="How many.  [default, of a file: all]")] = None,
    input_mean: Annotated[float | None, typer.Option(min=1, help="Tokens of a prompt, on average.")] = None,
    input_stdev: Annotated[float | None, typer.Option(min=0, help="Their standard deviation.  [default: 0]")] = None,
    output_mean: Annotated[float | None, typer.Option(min=1, help="Tokens of an answer, on average.")] = None,
    output_stdev: Annotated[float | None, typer.Option(min=0, help="Their standard deviation.  [default: 0]")] = None,
    input_min: Annotated[int | None, typer.Option(min=1, help="Least tokens of a prompt.")] = None,
    input_max: Annotated[int | None, typer.Option(min=1, help="Most tokens of a prompt.")] = None,
    output_min: Annotated[int | None, typer.Option(min=1, help="Least tokens of an answer.")] = None,
    output_max: Annotated[int | None, typer.Option(min=1, help="Most tokens of an answer.")] = None,
    num_prefixes: Annotated[int | None, typer.Option(min=1, help="Prefixes that the prompts share.")] = None,
    prefix_len: Annotated[int | None, typer.Option(min=1, help="Tokens of each prefix.")] = None,
    dataset_name: Annotated[
        Path | None, typer.Option(help="File of rows: .jsonl, or .json with a list; conversations as in ShareGPT.")
    ] = None,
    dataset_input_key: Annotated[str | None, typer.Option(help="What the prompt is called in a row.")] = None,
    dataset_prompt: Annotated[str | None, typer.Option(help="A text before each prompt, such as Summarize:.")] = None,
    dataset_output_key: Annotated[
        str | None, typer.Option(help="What the answer is called; ours will be as long.")
    ] = None,
    output_len_dist: Annotated[
        str | None, typer.Option(help="Instead: mean and standard deviation of the answers' tokens, such as 200,10.")
    ] = None,
    max_input_len: Annotated[int | None, typer.Option(min=1, help="Leave longer prompts out.")] = None,
    random_seed: Annotated[int, typer.Option(help="Equal seeds give equal lines.")] = 420,
) -> None:
    """Make the requests of a benchmark, in the JSONL of trtllm-bench: task_id, prompt or input_ids, output_tokens.

    token-norm-dist and token-unif-dist are random tokens of random lengths; shared-prefix the same after a few prefixes
    that they share; dataset takes texts of a file; conversations the turns of chats, each with all before it.

    Example:
        slipstream bench prepare-dataset --tokenizer smollm2 token-norm-dist --num_requests 1000 \\
            --input_mean 500 --input_stdev 0 --output_mean 200 --output_stdev 0 > synthetic.txt
        slipstream bench prepare-dataset --tokenizer smollm2 conversations --dataset_name chats.json --output turns.txt
    """
    given = {
        "num_requests": num_requests, "input_mean": input_mean, "input_stdev": input_stdev, "output_mean": output_mean,
        "output_stdev": output_stdev, "input_min": input_min, "input_max": input_max, "output_min": output_min,
        "output_max": output_max, "num_prefixes": num_prefixes, "prefix_len": prefix_len, "dataset_name": dataset_name,
        "dataset_input_key": dataset_input_key, "dataset_prompt": dataset_prompt,
        "dataset_output_key": dataset_output_key, "output_len_dist": output_len_dist, "max_input_len": max_input_len,
    }  # fmt: skip
    values = _values_of(kind, given)
    from slipstream.bench.dataset import open_tokenizer, write_line

    samples = _make(kind, values, open_tokenizer(tokenizer), random.Random(random_seed))
    if not samples:
        raise UsageError(f"--dataset_name {dataset_name} gives no request; see --max_input_len and its answers.")
    text = "".join(f"{write_line(task_id, sample)}\n" for task_id, sample in enumerate(samples))
    if output is not None:
        try:
            output.write_text(text, encoding="utf-8")
        except OSError as error:
            raise UsageError(f"--output {output} cannot be written ({error.strerror}); name another file.") from None
        print(f"{output}: {len(samples)} requests", file=sys.stderr)
    if output is None or not sys.stdout.isatty():  # a terminal has no use for what is in a file
        sys.stdout.write(text)


def _values_of(kind: str, given: dict[str, Any]) -> dict[str, Any]:
    """What was given for this kind. Raises UsageError for what is missing or of another kind."""
    if kind not in KINDS:
        raise UsageError(f"The kind is {kind!r}; it must be one of {', '.join(KINDS)}.")
    needed, possible = KINDS[kind]
    values = {name: value for name, value in given.items() if value is not None}
    for name in needed:
        if name not in values:
            raise UsageError(f"{kind} needs --{name}; give it, such as --{name} {EXAMPLES.get(name, 100)}.")
    for name in values:
        if name not in needed and name not in possible:
            raise UsageError(f"--{name} means nothing to {kind}; leave it out.")
    return values


def _make(kind: str, values: dict[str, Any], tokenizer: "Tokenizer", draw: random.Random) -> "list[Sample]":
    from slipstream.bench import dataset, recorded

    count = values.get("num_requests")
    if kind == "conversations":
        rows = dataset.read_rows(values["dataset_name"])
        return recorded.from_conversations(rows, tokenizer, count, values.get("max_input_len"))
    if kind == "dataset":
        return list(islice(_from_rows(values, tokenizer, draw), count))
    assert count is not None
    lengths = [_lengths(values, side, count, draw) for side in ("input", "output")]
    vocabulary = [each for each in range(tokenizer.vocab_size) if each not in tokenizer.special_ids]
    samples = dataset.random_tokens(draw, vocabulary, *lengths)
    if kind == "shared-prefix":
        return dataset.shared_prefixes(draw, vocabulary, values["num_prefixes"], values["prefix_len"], samples)
    return samples


def _lengths(values: dict[str, Any], side: str, count: int, draw: random.Random) -> list[int]:
    from slipstream.bench.dataset import normal_lengths, uniform_lengths

    if f"{side}_mean" in values:
        return normal_lengths(draw, count, values[f"{side}_mean"], values.get(f"{side}_stdev", 0.0))
    low, high = values[f"{side}_min"], values[f"{side}_max"]
    if low > high:
        raise UsageError(f"--{side}_min is {low}, more than --{side}_max {high}; swap them.")
    return uniform_lengths(draw, count, low, high)


def _from_rows(values: dict[str, Any], tokenizer: "Tokenizer", draw: random.Random) -> "Iterator[Sample]":
    from slipstream.bench.dataset import read_rows
    from slipstream.bench.recorded import from_rows

    if ("dataset_output_key" in values) == ("output_len_dist" in values):
        raise UsageError("dataset needs either --dataset_output_key or --output_len_dist; give one of them.")
    lengths = _mean_and_deviation(values["output_len_dist"]) if "output_len_dist" in values else None
    return from_rows(
        read_rows(values["dataset_name"]), tokenizer, input_key=values["dataset_input_key"],
        prompt=values.get("dataset_prompt", ""), output_key=values.get("dataset_output_key"),
        output_lengths=lengths, max_input_len=values.get("max_input_len"), draw=draw,
    )  # fmt: skip


def _mean_and_deviation(text: str) -> tuple[float, float]:
    try:
        mean, deviation = (float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"--output_len_dist is {text!r}; it must be mean,deviation, such as 200,10.") from None
    return mean, deviation
