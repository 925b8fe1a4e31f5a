"""slipstream bench steps, then slipstream simulate."""

import json
from pathlib import Path
from typing import Any

import pytest

from slipstream.bench.costs import StepCosts
from slipstream.bench.costs_file import CostsFile
from slipstream.schema.build import RuntimeConfig
from tests.cli.conftest import Call


def test_from_a_model_to_a_forecast(call: Call, tiny_model: Path, tmp_path: Path) -> None:
    costs, report, dataset = tmp_path / "costs.json", tmp_path / "report.json", tmp_path / "requests.jsonl"
    lines = [{"task_id": index, "input_ids": [index + 1] * 9, "output_tokens": 5} for index in range(6)]
    dataset.write_text("\n".join(map(json.dumps, lines)))
    limits = ("--max_batch_size", 4, "--max_num_tokens", 32, "--max_seq_len", 64)
    assert "steps measured" in call("bench", "steps", "--model", tiny_model, "--output", costs, *limits).out
    done = call("simulate", "--costs", costs, "--dataset", dataset, "--rate", 3, "--replicas", 2, "--json", report)
    assert "3 requests/s" in done.out
    written: dict[str, Any] = json.loads(report.read_text())
    assert (written["requests"], written["output_tokens"], written["replicas"]) == (6, 30, 2)


MISTAKES = {
    "both loads": (("--rate", 1, "--concurrency", 2), "give one of them"),
    "unknown policy": (("--capacity_scheduler_policy", "fair"), "guaranteed_no_evict"),
    "no such file": ((), "slipstream bench steps --output"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_end_in_a_sentence(mistake: str, call: Call, tmp_path: Path) -> None:
    options, said = MISTAKES[mistake]
    done = call("simulate", "--costs", tmp_path / "none.json", "--dataset", tmp_path / "none.jsonl", *options)
    assert done.code == 2
    assert said in done.err


@pytest.mark.parametrize(
    "change",
    [{"costs": {"knots": [2, 1]}}, {"runtime": {"max_batch_size": 0}}, {"runtime": {"kv_groups": []}}, {"format": "x"}],
    ids=str,
)
def test_costs_that_nobody_measured_are_refused(change: dict[str, Any], call: Call, tmp_path: Path) -> None:
    costs, dataset = tmp_path / "costs.json", tmp_path / "requests.jsonl"
    CostsFile("m", "d", False, RuntimeConfig(num_blocks=64), StepCosts(1.0, (1, 2048), (0.0,), 0.0, 0.0, 0.0)).write(
        costs
    )
    dataset.write_text('{"task_id": 0, "input_ids": [1, 2], "output_tokens": 3}')
    arguments = ("simulate", "--costs", costs, "--dataset", dataset)
    assert call(*arguments).code == 0
    values = json.loads(costs.read_text())
    for key, value in change.items():
        values[key] = values[key] | value if isinstance(value, dict) else value
    costs.write_text(json.dumps(values))
    done = call(*arguments)
    assert done.code == 2
    assert str(costs) in done.err
