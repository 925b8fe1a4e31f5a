"""Data sets of requests as trtllm-bench's JSONL: {"task_id": 0, "prompt": "…", "output_tokens": 9}, or "input_ids"."""

import json
import random
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from slipstream.errors import UsageError
from slipstream.text.tokenizer import Tokenizer

# Common words, nearly all of them one token with the space before them: a prompt of n of them has some n tokens.
_WORDS = (
    "time year people way day man thing woman life child world school state family student group country problem hand "
    "part place case week company system program question work number night point home water room mother area money "
    "story fact month lot right study book eye job word business issue side kind head house service friend father "
    "power hour game line end member law car city name team minute idea body back parent face level office door health"
)


@dataclass(frozen=True)
class Sample:
    """One request: a text or token ids, and how many tokens its answer is to have."""

    prompt: str | list[int]
    output_tokens: int


# --- made up ---


def normal_lengths(draw: random.Random, count: int, mean: float, stdev: float) -> list[int]:
    """Whole numbers of at least 1 around a mean; all equal where stdev is 0."""
    return [max(1, round(draw.gauss(mean, stdev))) for _ in range(count)]


def uniform_lengths(draw: random.Random, count: int, low: int, high: int) -> list[int]:
    return [draw.randint(low, high) for _ in range(count)]


def random_tokens(
    draw: random.Random, vocabulary: Sequence[int], inputs: Sequence[int], outputs: Sequence[int]
) -> list[Sample]:
    """Prompts of these lengths, of tokens that have nothing to do with each other."""
    return [Sample(draw.choices(vocabulary, k=size), wanted) for size, wanted in zip(inputs, outputs, strict=True)]


def shared_prefixes(
    draw: random.Random, vocabulary: Sequence[int], num_prefixes: int, prefix_len: int, rest: Iterable[Sample]
) -> list[Sample]:
    """Each prompt begins with one of a few prefixes, drawn at random, and goes on with its own."""
    prefixes = [draw.choices(vocabulary, k=prefix_len) for _ in range(num_prefixes)]
    return [Sample([*draw.choice(prefixes), *each.prompt], each.output_tokens) for each in rest]


def random_words(draw: random.Random, count: int, input_len: int, output_len: int) -> list[Sample]:
    """Texts of some input_len tokens, where no tokenizer is at hand."""
    words = _WORDS.split()
    return [Sample(" ".join(draw.choices(words, k=input_len)), output_len) for _ in range(count)]


def open_tokenizer(name: str) -> Tokenizer:
    """Of a tokenizer's own folder, an engine's, or any model that has one."""
    from slipstream.checkpoint import open_checkpoint, resolve  # torch
    from slipstream.engine.folder import TOKENIZER_FOLDER

    if any((Path(name) / file).is_file() for file in ("tokenizer.json", "tokenizer.model")):
        return Tokenizer.open(Path(name))
    source = resolve(name)
    if source.kind == "engine":
        return Tokenizer.open(source.path / TOKENIZER_FOLDER)
    checkpoint = open_checkpoint(source)
    try:
        with tempfile.TemporaryDirectory() as folder:
            checkpoint.write_tokenizer(Path(folder))
            return Tokenizer.open(Path(folder))
    finally:
        checkpoint.close()


# --- files ---


def read_dataset(path: Path, count: int | None = None) -> list[Sample]:
    """The first `count` requests of a JSONL file; all without it. Raises UsageError naming the line that is none."""
    lines = islice(_json_lines(path, "--dataset"), count)
    samples = [_sample(entry, f"{path}, line {number}") for number, entry in lines]
    if not samples:
        raise UsageError(f"{path} holds no request; make some with slipstream bench prepare-dataset.")
    if count is not None and len(samples) < count:
        raise UsageError(f"--num_requests is {count}, and {path} holds {len(samples)}; ask for as many at most.")
    return samples


def write_line(task_id: int, sample: Sample) -> str:
    key = "prompt" if isinstance(sample.prompt, str) else "input_ids"
    line = {"task_id": task_id, key: sample.prompt, "output_tokens": sample.output_tokens}
    return json.dumps(line, ensure_ascii=False)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Objects of a .jsonl file, or of a .json file with a list of them, as Hugging Face's viewers export them."""
    if path.suffix.lower() == ".jsonl":
        rows = [entry for _, entry in _json_lines(path, "--dataset_name")]
    else:
        rows = _whole_json(path)
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise UsageError(f"--dataset_name {path} must be a list of objects, or one object a line (.jsonl).")
    return rows


def _sample(entry: Any, where: str) -> Sample:
    values = entry if isinstance(entry, dict) else {}
    match values.get("prompt"), values.get("input_ids"), values.get("output_tokens"):
        case (str(text), None, int(wanted)) if text and wanted >= 1:
            return Sample(text, wanted)
        case (None, [_, *_] as token_ids, int(wanted)) if wanted >= 1 and all(type(each) is int for each in token_ids):
            return Sample(token_ids, wanted)
    raise UsageError(f'{where}: expected an object with "prompt" or "input_ids", and "output_tokens" of at least 1.')


def _json_lines(path: Path, flag: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(_text(path, flag).split("\n"), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except ValueError as error:
                raise UsageError(
                    f"{flag} {path}, line {number} is no JSON ({error}); give one object a line."
                ) from None


def _whole_json(path: Path) -> Any:
    try:
        return json.loads(_text(path, "--dataset_name"))
    except ValueError as error:
        raise UsageError(f"--dataset_name {path} is no JSON ({error}); give a .json or .jsonl file.") from None


def _text(path: Path, flag: str) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise UsageError(f"{flag} {path} cannot be read ({error}); give a file of UTF-8 text.") from None
