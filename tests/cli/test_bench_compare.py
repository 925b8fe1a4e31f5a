"""slipstream bench compare: an engine, a server and transformers side by side; a sentence for each mistake."""

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Call
from tests.serve.conftest import Server
from tests.serve.conftest import engine as engine
from tests.serve.conftest import server as server


def test_an_engine_a_server_and_transformers(
    call: Call, engine: Path, server: Server, talker: Path, tmp_path: Path
) -> None:
    file = tmp_path / "compare.json"
    done = call("bench", "compare", f"ours={engine}", f"server={server.url}", f"transformers:{talker}", "--rounds", 6,
                "--concurrency", 2, "--num_requests", 3, "--input_output_len", "6,8", "--json", file)  # fmt: skip
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("6 rounds of 3 requests, 2 at a time")
    values = json.loads(file.read_text())
    names = ["ours", "server", f"transformers:{talker}"]
    assert [each["name"] for each in values["contestants"]] == names
    for each in values["contestants"]:
        assert [(run["output_tokens"], run["failed"]) for run in each["rounds"]] == [(3 * 8, 0)] * 6
    assert {(duel["other"], duel["metric"]) for duel in values["duels"]} >= {
        (name, metric) for name in names[1:] for metric in ("tokens/s", "TTFT p50")
    }
    for duel in values["duels"]:
        assert duel["low"] <= duel["ratio"] <= duel["high"] and len(duel["pairs"]) == 6
        is_within = duel["low"] <= 1 <= duel["high"]
        assert (duel["verdict"] == "within the noise") == is_within
    verdicts = [line.rstrip() for line in done.out.splitlines() if " to " in line and "ratio" not in line]
    assert sum("no difference beyond the noise" in line for line in verdicts) == sum(
        duel["verdict"] == "within the noise" for duel in values["duels"]
    )


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("smollm2", "There is nothing to compare smollm2 with; give two contestants or more."),
        ("a=smollm2 b=smollm2 --rounds 5", "--rounds is 5; with fewer than 6 nothing can be told from noise."),
        ("transformers:{engine} smollm2", "transformers:{engine} is an own engine, which transformers cannot read; "
         "give the model it was made of."),
    ],
)  # fmt: skip
def test_a_mistake_is_a_sentence(call: Call, engine: Path, arguments: str, sentence: str) -> None:
    done = call("bench", "compare", *arguments.format(engine=engine).split())
    assert (done.code, done.err) == (2, f"error: {sentence.format(engine=engine)}\n")
