"""slipstream bench kernels: the table and the file of the talker's engine, and a sentence for each mistake."""

import json
import re
from pathlib import Path

import pytest

from slipstream.bench import machine
from slipstream.build import timing
from tests.cli.conftest import Call


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "_ROUND_SECONDS", 1e-5)
    monkeypatch.setattr(timing, "_COLD_BYTES", 1)
    monkeypatch.setitem(machine.READ_BYTES, "cpu", 1 << 20)
    monkeypatch.setitem(machine.PRODUCT_SIZE, "cpu", 64)


def test_a_table_for_each_number_of_rows_and_the_same_in_a_file(call: Call, engine: Path, tmp_path: Path) -> None:
    file = tmp_path / "kernels.json"
    done = call("bench", "kernels", engine, "--rows", "1,20", "--context", "16,40", "--json", file, "--device", "cpu")
    assert (done.code, done.err) == (0, "")
    for part in ("reads ", "copies ", "float32 products ", "1 row: the next token of one sequence", "20 rows: prompts"):
        assert part in done.out
    values = json.loads(file.read_text())
    ops = values["ops"]
    assert len(re.findall(r"^linear +\S+, \S+ +3 +\w+ +[\d.]+ +\d+% +", done.out, re.MULTILINE)) == 2 * 4
    assert sum(line["times"] for line in ops if line["rows"] == 1 and line["context"] in (None, 16)) == sum(
        line["times"] for line in ops if line["rows"] == 20 and line["context"] in (None, 40)
    )
    assert {line["context"] for line in ops if line["op"] == "attention"} == {16, 40}
    assert [(each["rows"], each["context"]) for each in values["steps"]] == [(1, 16), (1, 40), (20, 16), (20, 40)]
    assert set(values["machine"]) == {"name", "read", "copy", "products"}
    for line in ops:
        bandwidth = max(values["machine"]["read"], values["machine"]["copy"])
        floor = max(line["bytes"] / bandwidth, line["flops"] / values["machine"]["products"]["float32"])
        assert line["floor_seconds"] == pytest.approx(floor)
        assert line["fraction_of_floor"] == pytest.approx(floor / line["seconds"][line["kernel"]])


def test_the_usual_numbers_that_fit_the_engine(call: Call, engine: Path) -> None:
    done = call("bench", "kernels", engine, "--ops", "attention,rms_norm")  # at most 64 tokens a step, 256 a sequence
    assert done.code == 0, done.err
    rows = re.findall(r"^(\d+) rows?: ", done.out, re.MULTILINE)
    assert rows == ["1", "8", "64"]
    assert re.findall(r"^attention .* (\d+) +3 ", done.out, re.MULTILINE) == ["256"] * 3
    assert "linear" not in done.out


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--rows", "0"), "--rows is '0'; it must be numbers from 1 to 64, max_num_tokens, such as 1,8."),
        (("--rows", "1,x"), "--rows is '1,x'; it must be numbers from 1 to 64, max_num_tokens, such as 1,8."),
        (("--rows", "65"), "--rows is '65'; it must be numbers from 1 to 64, max_num_tokens, such as 1,8."),
        (("--context", "4096"), "--context is '4096'; it must be numbers from 1 to 256, max_seq_len, such as 1,8."),
        (("--json", "/nowhere/x.json", "--ops", "silu*"), "--json /nowhere/x.json cannot be written (No such file or "
         "directory); name another file."),
    ],
)  # fmt: skip
def test_a_mistake_is_a_sentence(call: Call, engine: Path, flags: tuple[str, ...], sentence: str) -> None:
    done = call("bench", "kernels", engine, *flags)
    assert (done.code, done.err) == (2, f"error: {sentence}\n")
