"""slipstream bench serve: its tables and file for a real server, and a sentence for each mistake."""

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Call
from tests.serve.conftest import Server
from tests.serve.conftest import engine as engine
from tests.serve.conftest import server as server


def test_a_sweep_of_clients(call: Call, server: Server, tmp_path: Path) -> None:
    file = tmp_path / "serve.json"
    done = call("bench", "serve", f"{server.url}/v1/", "--concurrency", "1,6", "--input_output_len", "8,12",
                "--num_requests", 12, "--goodput", "ttft:1000000,latency:0", "--json", file)  # fmt: skip
    assert done.code == 0, done.err
    assert done.out.startswith(f"talker at {server.url}/v1/")
    values = json.loads(file.read_text())
    assert [load["load"] for load in values["loads"]] == ["1 at a time", "6 at a time"]
    for load in values["loads"]:
        assert (load["requests"], load["failed"], load["output_tokens"]) == (12, 0, 144)
        assert load["output_tokens_per_second"] == pytest.approx(144 / load["seconds"])
        assert load["ttft_ms"]["p50"] <= load["ttft_ms"]["p99"] <= load["latency_ms"]["max"]
        assert load["goodput"]["limits_ms"] == {"ttft": 1e6, "latency": 0} and load["goodput"]["share"] == 0
        assert f"{load['ttft_ms']['p99']:.1f}" in done.out
        assert load["client"]["share_of_a_core"] > 0


def test_requests_by_chance_from_a_data_set_with_too_few(call: Call, server: Server, tmp_path: Path) -> None:
    file = tmp_path / "d.txt"
    file.write_text('{"prompt": "One", "output_tokens": 3}\n{"input_ids": [5, 6, 7], "output_tokens": 4}\n')
    done = call("bench", "serve", server.url, "--request_rate", "50", "--dataset", file, "--num_requests", 5,
                "--warm_up", 0, "--json", tmp_path / "r.json")  # fmt: skip
    assert done.code == 0, done.err
    assert "note: 2 requests are asked again and again; a prefix cache may know them." in done.err
    [load] = json.loads((tmp_path / "r.json").read_text())["loads"]
    assert (load["load"], load["output_tokens"]) == ("50 requests/s", 3 + 4 + 3 + 4 + 3)


def test_a_page_and_a_record(call: Call, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["bench", "serve", server.url, "--num_requests", "4", "--input_output_len", "4,6", "--html", "serve.html",
             "--record", "tiny"]  # fmt: skip
    monkeypatch.setattr("sys.argv", ["slipstream", *words])
    done = call(*words)
    assert done.code == 0, done.err
    page = Path("serve.html").read_text()
    assert f"talker at {server.url}" in page and page.count("<svg") == 4
    [record] = Path("benchmarks").iterdir()
    assert record.name.endswith("-tiny.md")
    text = record.read_text()
    assert f"- command: `slipstream {' '.join(words)}`" in text
    row = next(line for line in done.out.splitlines() if line.startswith("1 at a time"))
    assert all(cell in text for cell in row.split()[2:])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("localhost:8000", "The server is 'localhost:8000'; it must be a URL, such as http://127.0.0.1:8000."),
        ("{url} --protocol grpc", "--protocol is 'grpc'; it must be one of openai, openai-chat, tgi, triton."),
        ("{url} --concurrency 0", "--concurrency is '0'; it must be whole numbers from 1, such as 1,8,64."),
        ("{url} --request_rate x", "--request_rate is 'x'; it must be numbers above 0, such as 1,2.5."),
        ("{url} --request_rate 1 --concurrency 1", "--concurrency and --request_rate were both given; leave one of "
         "them out."),
        ("{url} --goodput ttft=5", "--goodput is 'ttft=5'; it must be limits in ms, such as "
         "ttft:500,tpot:50,latency:5000."),
        ("{url} --goodput ttft:5,e2e:7", "--goodput is 'ttft:5,e2e:7'; it must be limits in ms, such as "
         "ttft:500,tpot:50,latency:5000."),
        ("{url} --record a/b", "--record is 'a/b'; it must be a name for a file, such as serve-smollm2."),
        ("{url} --input_output_len 8", "--input_output_len is '8'; it must be two numbers, such as \"128,64\"."),
        ("{url} --extra_body [1]", "--extra_body is '[1]'; it must be a JSON object, such as {{\"top_k\": 1}}."),
        ("http://127.0.0.1:9 -m x", "http://127.0.0.1:9 cannot be reached ([Errno 111] Connection refused); start the "
         "server, or give its URL."),
        ("{url} -m nobody --input_output_len 8,8", "No answer came; "),
    ],
)  # fmt: skip
def test_a_mistake_is_a_sentence(call: Call, server: Server, arguments: str, sentence: str) -> None:
    done = call("bench", "serve", *arguments.format(url=server.url).split())
    assert done.code == 2
    assert done.err.startswith(f"error: {sentence.format()}"), done.err
    assert done.err.count("\n") == 1
