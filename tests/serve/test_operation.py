"""What an operator sees of a server: hangs, steps, profiles, health that is more than a word."""

import gzip
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from slipstream.errors import UsageError
from slipstream.schema.request import EngineStats
from slipstream.serve import engine_diagnostics
from tests.serve.conftest import Server, eventually, serving
from tests.serve.slow import HANGS

PROMPT = {"prompt": [1, 2, 3], "max_tokens": 8, "ignore_eos": True, "temperature": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("operation")


@pytest.fixture(scope="module")
def operated(engine: Path, folder: Path) -> Iterator[Server]:
    told = ["--iteration_log", folder / "steps.jsonl", "--profile_dir", folder / "profiles"]
    with (folder / "stderr").open("w") as stderr:
        plugin = ["--plugin", "tests.serve.slow", "--step_timeout", 1]
        with serving(engine, *told, *plugin, stderr=stderr) as server:
            yield server


def steps_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]


def test_health_generate_generates_a_token(operated: Server) -> None:
    before = operated.stats()["generated_tokens"]
    answer = httpx.get(f"{operated.url}/health_generate", timeout=30)
    assert answer.status_code == 200 and len(answer.json()["token_ids"]) == 1
    eventually(lambda: operated.stats()["generated_tokens"] == before + 1)


def test_each_step_is_a_line(operated: Server, folder: Path) -> None:
    num_before = len(steps_of(folder))
    assert operated.post("/v1/completions", PROMPT).status_code == 200
    eventually(lambda: len(steps_of(folder)) >= num_before + 8)
    new = [step for step in steps_of(folder)[num_before:] if step["tokens"]]
    assert [step["tokens"] for step in new] == [3 + 1] + [1] * 7
    assert all(0 < step["seconds"] < 30 for step in new)
    assert all(step["running"] == 1 for step in new[:-1]) and new[-1]["running"] == 0
    assert new[0]["free_blocks"] < new[-1]["free_blocks"] == operated.stats()["num_blocks_total"]
    assert [step["time"] for step in new] == sorted(step["time"] for step in new)


def test_a_step_that_hangs_is_told_with_its_requests(operated: Server, folder: Path) -> None:
    body = PROMPT | {"prompt": [7, 6, HANGS, 5, 4]}
    answers = []
    thread = threading.Thread(target=lambda: answers.append(operated.post("/v1/completions", body)))
    thread.start()
    eventually(lambda: operated.health().status_code == 503)
    thread.join()
    assert answers[0].status_code == 200  # it was slow, no more
    eventually(lambda: operated.health().status_code == 200)
    said = (folder / "stderr").read_text()
    told, _, stacks = said.partition("Its threads are at:")
    assert "warning: no step has ended for 1." in told
    assert "running: 5 prompt tokens, 0 generated, 0 computed" in told
    assert "tests/serve/slow.py" in stacks and "in launch" in stacks
    assert said.count("warning: no step has ended") == 1


def test_a_profile_shows_the_steps(operated: Server, folder: Path) -> None:
    refused = operated.post("/stop_profile", None)
    assert refused.status_code == 400 and "/start_profile" in refused.json()["error"]["message"]
    started = operated.post("/start_profile", None)
    assert started.status_code == 200 and started.json()["status"] == "profiling"
    assert operated.post("/start_profile", None).status_code == 400
    assert operated.post("/v1/completions", PROMPT).status_code == 200
    written = operated.post("/stop_profile", None).json()
    assert written == {"status": "written", "paths": started.json()["paths"]}
    [path] = written["paths"]
    with gzip.open(path) as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert any(str(name).startswith("aten::") for name in names)


def test_profiles_are_not_taken_without_a_folder(server: Server) -> None:
    answer = server.post("/start_profile", None)
    assert answer.status_code == 404 and "--profile_dir" in answer.json()["error"]["message"]


def test_the_log_of_steps_stays_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_diagnostics, "LOG_BYTES", 1000)
    log = engine_diagnostics.StepLog(str(tmp_path / "steps"))
    for number in range(50):
        log.note(EngineStats(num_steps=number), 1, 0.5)
    kept = [json.loads(line) for name in ("steps.1", "steps") for line in (tmp_path / name).read_text().splitlines()]
    assert [line["step"] for line in kept] == list(range(50 - len(kept), 50)) and len(kept) > 10
    assert sorted(each.name for each in tmp_path.iterdir()) == ["steps", "steps.1"]
    with pytest.raises(UsageError, match=r"--iteration_log is .* cannot be written"):
        engine_diagnostics.StepLog(str(tmp_path / "none" / "steps"))
