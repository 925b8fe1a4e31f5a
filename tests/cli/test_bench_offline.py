"""slipstream bench latency and throughput: the seeds' commands as they are written, and what their numbers say."""

import csv
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from slipstream.bench import shapes
from slipstream.models import baichuan, llama
from tests.cli.conftest import Call

# With the program's name changed: trtllm-bench (seed 000) and benchmark.py (seed 004).
TRTLLM_BENCH = "slipstream bench --model {model} latency --engine_dir {engine} --dataset {dataset}"
BENCHMARK_PY = (
    "slipstream bench latency -m baichuan2_7b_chat --mode plugin --engine_dir {engine} --batch_size 1 "
    '--input_output_len "32,50;128,50"'
)
# The keys of seed 004, in order.
KEYS = [
    "model_name", "world_size", "num_heads", "num_kv_heads", "num_layers", "hidden_size", "vocab_size", "precision",
    "batch_size", "input_length", "output_length", "gpu_peak_mem(gb)", "build_time(s)", "tokens_per_sec",
    "percentile95(ms)", "percentile99(ms)", "latency(ms)", "compute_cap", "generation_time(ms)",
    "total_generated_tokens", "generation_tokens_per_second",
]  # fmt: skip
BLOCKS = ["ENGINE DETAILS", "WORLD + RUNTIME INFORMATION", "PERFORMANCE OVERVIEW", "DATASET DETAILS"]


@pytest.fixture
def dataset(call: Call, talker: Path, tmp_path: Path) -> Path:
    file = tmp_path / "synthetic.txt"
    done = call("bench", "prepare-dataset", "--tokenizer", talker, "token-norm-dist", "--num_requests", 6,
                "--input_mean", 20, "--output_mean", 5)  # fmt: skip
    file.write_text(done.out)
    return file


def read_benchmark(line: str) -> dict[str, Any]:
    first, *words = line.split()
    assert first == "[BENCHMARK]" and words[::2] == KEYS
    values = zip(words[::2], words[1::2], strict=True)
    texts = ("model_name", "precision", "compute_cap")
    return {key: value if key in texts else float(value) for key, value in values}


def check_arithmetic(case: dict[str, Any]) -> None:
    """Field guide N08. Printed numbers are rounded."""
    batch, length = case["batch_size"], case["output_length"]
    assert case["tokens_per_sec"] == pytest.approx(batch * length / case["latency(ms)"] * 1e3, rel=1e-3)
    generated, seconds = case["total_generated_tokens"], case["generation_time(ms)"] / 1e3
    assert case["generation_tokens_per_second"] == pytest.approx(generated / seconds, rel=1e-3)
    assert 0 < case["generation_time(ms)"] < case["latency(ms)"]
    assert case["percentile95(ms)"] <= case["percentile99(ms)"]


def test_the_seeds_line_passes_the_same_checks() -> None:
    case = read_benchmark(
        "[BENCHMARK] model_name baichuan2_7b_chat world_size 1 num_heads 32 num_kv_heads 32 num_layers 32 hidden_size "
        "4096 vocab_size 125696 precision float16 batch_size 1 input_length 32 output_length 50 gpu_peak_mem(gb) 8.682 "
        "build_time(s) 0 tokens_per_sec 60.95 percentile95(ms) 821.977 percentile99(ms) 822.093 latency(ms) 820.348 "
        "compute_cap sm86 generation_time(ms) 798.45 total_generated_tokens 49.0 generation_tokens_per_second 61.369"
    )
    check_arithmetic(case)


def test_seed_004(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from slipstream.build import build
    from slipstream.checkpoint import open_checkpoint, resolve
    from slipstream.checkpoint.random import write_random_model
    from slipstream.schema.build import BuildConfig

    model = write_random_model(tmp_path / "baichuan", baichuan.TINY)
    checkpoint = open_checkpoint(resolve(model), "float32")
    build(checkpoint, tmp_path / "engine", BuildConfig(max_batch_size=8, max_num_tokens=64))
    checkpoint.close()
    monkeypatch.chdir(tmp_path)
    done = call(*shlex.split(BENCHMARK_PY.format(engine=tmp_path / "engine"))[1:], "--csv")
    assert (done.code, done.err) == (0, "")
    cases = [read_benchmark(line) for line in done.out.splitlines()]
    assert [(case["input_length"], case["output_length"]) for case in cases] == [(32, 50), (128, 50)]
    for case in cases:
        check_arithmetic(case)
        assert case["total_generated_tokens"] == 49
        assert (case["model_name"], case["num_heads"], case["hidden_size"], case["vocab_size"]) == (
            "baichuan2_7b_chat", 4, 64, 128,
        )  # fmt: skip
        assert (case["compute_cap"], case["build_time(s)"], case["gpu_peak_mem(gb)"]) == ("cpu", 0, 0)
    with Path("baichuan2_7b_chat_float32_tp1_plugin_fp8linear0_cpu.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [*KEYS, "quantization"]
    assert [float(row["latency(ms)"]) for row in rows] == [case["latency(ms)"] for case in cases]


def test_a_shape_by_name_has_random_weights_and_a_build_time(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(shapes.SHAPES, "llama_tiny", llama.TINY)  # type: ignore[arg-type]
    done = call("bench", "latency", "-m", "llama_tiny", "--batch_size", "1;3", "--input_output_len", "8,4",
                "--num_runs", 2, "--warm_up", 0, "--quantization", "int8_wo")  # fmt: skip
    assert (done.code, done.err) == (0, "")
    cases = [read_benchmark(line) for line in done.out.splitlines()]
    assert [(case["batch_size"], case["total_generated_tokens"]) for case in cases] == [(1, 3), (3, 9)]
    for case in cases:
        check_arithmetic(case)
        assert case["build_time(s)"] > 0 and case["num_kv_heads"] == 2


def read_blocks(text: str) -> dict[str, dict[str, str]]:
    parts = re.split(r"^=+\n= (.+)\n=+\n", text, flags=re.MULTILINE)
    return {
        title: dict(re.findall(r"^([^\[\n-][^:\n]*): +(.+)$", body, re.MULTILINE))
        for title, body in zip(parts[1::2], parts[2::2], strict=True)
    }


def check_overview(overview: dict[str, str], num_requests: int, concurrency: int) -> None:
    value = {name: float(number) for name, number in overview.items()}
    tokens = num_requests * value["Average Output Length (tokens)"]
    seconds = value["Total Latency (ms)"] / 1e3
    # N03: generated tokens by the whole time, the first ones included.
    assert value["Total Output Throughput (tokens/sec)"] == pytest.approx(tokens / seconds, rel=1e-3)
    assert value["Request Throughput (req/sec)"] == pytest.approx(num_requests / seconds, rel=1e-3)
    average = value["Average request latency (ms)"]
    assert value["Average time-to-first-token [TTFT] (ms)"] < average
    tpot = value["Average time-per-output-token [TPOT] (ms)"]
    assert value["Per User Output Speed [1/TPOT] (tokens/sec/user)"] == pytest.approx(1e3 / tpot, rel=1e-2)
    busy = average * num_requests / concurrency
    assert value["Total Latency (ms)"] >= busy * 0.999


def test_seed_000(call: Call, talker: Path, engine: Path, dataset: Path, tmp_path: Path) -> None:
    typed = TRTLLM_BENCH.format(model=talker, engine=engine, dataset=dataset)
    done = call(*shlex.split(typed)[1:], "--report_json", tmp_path / "r.json")
    assert (done.code, done.err) == (0, "")
    blocks = read_blocks(done.out)
    assert list(blocks) == BLOCKS
    assert blocks["ENGINE DETAILS"]["Engine Directory"] == str(engine)
    assert blocks["ENGINE DETAILS"]["Dtype"] == "float32"
    assert blocks["WORLD + RUNTIME INFORMATION"]["Max Runtime Batch Size"] == "8"
    overview = blocks["PERFORMANCE OVERVIEW"]
    check_overview(overview, 6, concurrency=1)
    lengths = ("Average Input Length (tokens)", "Average Output Length (tokens)", "Number of requests")
    assert [float(overview[name]) for name in lengths] == [20, 5, 6]
    values = json.loads((tmp_path / "r.json").read_text())
    assert float(overview["Total Latency (ms)"]) == pytest.approx(values["seconds"] * 1e3, abs=1e-3)
    assert re.search(rf"^\[TTFT\] P99 +: {values['ttft_ms']['p99']:.4f}$", done.out, re.MULTILINE)


def test_throughput(call: Call, engine: Path, dataset: Path) -> None:
    done = call("bench", "throughput", "--engine_dir", engine, "--dataset", dataset, "--concurrency", 3)
    assert (done.code, done.err) == (0, "")
    blocks = read_blocks(done.out)
    assert blocks["WORLD + RUNTIME INFORMATION"]["Requests"] == "3 at a time"
    check_overview(blocks["PERFORMANCE OVERVIEW"], 6, concurrency=3)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("latency --engine_dir {engine}", 'Give either --dataset FILE or --input_output_len "32,50;128,50"; neither '
         "was given."),
        ("latency --engine_dir {engine} --input_output_len 32x50", "--input_output_len is '32x50'; it must be pairs of "
         'numbers, such as "32,50;128,50".'),
        ("latency --engine_dir {engine} --input_output_len 32,50 --batch_size 0", "--batch_size is '0'; it must be "
         'numbers with ; between them, such as "1;8".'),
        ("latency --engine_dir {engine} --input_output_len 32,50 --batch_size 9", "--batch_size is 9, and the engine "
         "takes 8; raise --max_batch_size, or build one that takes more."),
        ("latency --engine_dir {engine} --input_output_len 250,50", "Request 0 wants 250 + 50 tokens, and a sequence "
         "holds 256; raise --max_seq_len, or take shorter requests."),
        ("throughput --engine_dir {engine}", "There is no --dataset; make one with slipstream bench prepare-dataset."),
        ("throughput --engine_dir {engine} --dataset nowhere", "--dataset nowhere cannot be read ([Errno 2] No such "
         "file or directory: 'nowhere'); give a file of UTF-8 text."),
        ("throughput --engine_dir {engine} --dataset {dataset} --num_requests 7", "--num_requests is 7, and {dataset} "
         "holds 6; ask for as many at most."),
    ],
)  # fmt: skip
def test_a_mistake_is_a_sentence(call: Call, engine: Path, dataset: Path, arguments: str, sentence: str) -> None:
    places = {"engine": engine, "dataset": dataset}
    done = call("bench", *arguments.format(**places).split())
    assert (done.code, done.err) == (2, f"error: {sentence.format(**places)}\n")


def test_without_a_model_the_shapes_are_named(call: Call, dataset: Path) -> None:
    done = call("bench", "throughput", "--dataset", dataset)
    assert done.code == 2 and "gpt_350m" in done.err and done.err.endswith("neither was given.\n")
