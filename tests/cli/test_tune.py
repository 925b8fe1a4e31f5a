"""slipstream tune, from a model and a load to a file that serve takes."""

import json
from pathlib import Path

import pytest
import yaml

from tests.cli.conftest import Call

RECORD = Path(__file__).parent.parent / "surface" / "cli_options.json"


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    file = tmp_path / "requests.jsonl"
    lines = [{"task_id": index, "input_ids": [index + 1] * 12, "output_tokens": 6} for index in range(4)]
    file.write_text("\n".join(map(json.dumps, lines)))
    return file


def test_a_file_that_serve_takes(call: Call, tiny_model: Path, dataset: Path, tmp_path: Path) -> None:
    output = tmp_path / "tuned.yaml"
    drafts = '{"method": "ngram", "max_draft_len": 2}'
    done = call("tune", tiny_model, "--dataset", dataset, "--output", output, "--quantization", "none,int8_wo",
                "--speculative", drafts, "--concurrency", 2, "--price_per_hour", 2, "--rounds", 1)  # fmt: skip
    assert done.code == 0, done.err
    for told in (
        "as it is",
        "quantization int8_wo",
        "2 at a time",
        "8 n-gram drafts",
        "the drafts asked for",
        "price of 1M",
    ):
        assert told in done.out
    written = output.read_text()
    for told in ("defaults", "2 n-gram drafts", "8 n-gram drafts", "the drafts asked for"):
        assert told in written  # each contender, with its score
    known = {name for flags in json.loads(RECORD.read_text())["serve"] for name in flags.replace("--", "").split()}
    assert set(yaml.safe_load(written)) <= known


def test_limits_that_nothing_keeps(call: Call, tiny_model: Path, dataset: Path, tmp_path: Path) -> None:
    options = ("--dataset", dataset, "--output", tmp_path / "tuned.yaml", "--max_latency_ms", 0.1)
    done = call("tune", tiny_model, *options)
    assert done.code == 2
    assert "raise them" in done.err
    assert not (tmp_path / "tuned.yaml").exists()


def test_clients_and_limits_are_two_kinds_of_goal(call: Call, tiny_model: Path, dataset: Path, tmp_path: Path) -> None:
    options = ("--dataset", dataset, "--output", tmp_path / "tuned.yaml", "--max_ttft_ms", 9, "--concurrency", 1)
    done = call("tune", tiny_model, *options)
    assert done.code == 2
    assert "give one of the two" in done.err


def test_without_a_load_there_is_nothing_to_tune_for(call: Call, tiny_model: Path, tmp_path: Path) -> None:
    done = call("tune", tiny_model, "--output", tmp_path / "tuned.yaml")
    assert done.code == 2
    assert "prepare-dataset" in done.err
