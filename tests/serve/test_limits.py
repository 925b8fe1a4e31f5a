"""Limits of one request: its time, and what it may keep others from. The server takes its options from a file."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.serve.conftest import Server, eventually, serving

ENDLESS = {"prompt": [1, 2, 3], "max_tokens": 1_000_000, "ignore_eos": True}
SLOW = {"prompt": [1, 2, 3], "max_tokens": 4, "guided_regex": "slowly|no"}

FILE = """\
request_timeout: 4  # seconds
served_model_name: talker
max-batch-size: 4
plugin: [tests.serve.slow]
sink_token_length: 4
max_attention_window_size: [64]
max_seq_len: 2000000
max_queue_size: 7
"""


@pytest.fixture(scope="module")
def limited(engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    config = tmp_path_factory.mktemp("config") / "serve.yaml"
    config.write_text(FILE, encoding="utf-8")
    with serving(engine, "--config", config, "--max_batch_size", 3) as server:
        yield server


def test_the_file_says_what_the_flags_do_not(limited: Server) -> None:
    assert "at most 3 sequences" in limited.ready_line
    assert httpx.get(f"{limited.url}/v1/models").json()["data"][0]["id"] == "talker"


def test_a_request_ends_after_its_time(limited: Server) -> None:
    started = time.monotonic()
    answers = []
    thread = threading.Thread(target=lambda: answers.append(limited.post("/v1/completions", ENDLESS)))
    thread.start()
    with httpx.stream("POST", f"{limited.url}/v1/completions", json=ENDLESS | {"stream": True}, timeout=30) as stream:
        assert stream.status_code == 200
        last = [line for line in stream.iter_lines() if line][-2:]
    thread.join()
    assert time.monotonic() - started > 3.5
    assert json.loads(last[0].removeprefix("data: "))["error"]["code"] == 504 and last[1] == "data: [DONE]"
    assert answers[0].status_code == 504 and "4 seconds" in answers[0].json()["error"]["message"]
    eventually(lambda: limited.stats()["num_blocks_used"] == 0)


def test_a_text_that_becomes_no_vector_in_its_time(limited: Server) -> None:
    """Three steps of at most 64 tokens, each of which takes three seconds (slow.py: HANGS)."""
    answer = limited.post("/v1/embeddings", {"input": [319] * 130})
    assert answer.status_code == 504 and "4 seconds" in answer.json()["error"]["message"]
    eventually(lambda: limited.stats()["num_blocks_used"] == 0, 30)


def test_a_grammar_that_compiles_keeps_nobody_waiting(limited: Server) -> None:
    answers = []
    thread = threading.Thread(target=lambda: answers.append(limited.post("/v1/completions", SLOW)))
    thread.start()
    time.sleep(0.3)  # it is there
    assert limited.post("/v1/completions", {"prompt": [1, 2], "max_tokens": 2}).status_code == 200
    assert thread.is_alive()
    thread.join()
    assert answers[0].status_code == 200 and answers[0].json()["choices"][0]["text"]


def test_who_leaves_while_a_grammar_compiles_leaves_nothing(limited: Server) -> None:
    with pytest.raises(httpx.ReadTimeout):
        body = SLOW | {"guided_regex": "slowly[a-z]*", "max_tokens": 100_000}
        httpx.post(f"{limited.url}/v1/completions", json=body, timeout=0.5)
    steps = limited.stats()["num_steps"]
    time.sleep(3)  # it is compiled
    assert limited.stats()["num_steps"] == steps


def test_a_config_that_cannot_be_is_refused_in_a_sentence(tmp_path: Path) -> None:
    for text, sentence in (
        ("prot: 8000", "has 'prot', which is no option; perhaps port is meant."),
        ("port: {a: 1}", "has port: {'a': 1}; give one value"),
        ("port: [1, 2]", "has port: [1, 2]; give one value"),
        ("just words", "holds no options"),
        ("a: b: c", "is no YAML"),
        ("port: many", "--port is many; it must be a valid integer"),
    ):
        file = tmp_path / "serve.yaml"
        file.write_text(text, encoding="utf-8")
        command = [sys.executable, "-c", "import slipstream.cli; slipstream.cli.main()", "serve", "--config", str(file)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 2 and sentence in done.stderr, done.stderr
        assert "Traceback" not in done.stderr
