"""Every op of an engine's graph is timed by itself, with inputs that its kernels take, and set beside its floor."""

from pathlib import Path

import pytest
import torch

from slipstream.bench.kernels import bench_kernels
from slipstream.bench.machine import Machine, measure_machine
from slipstream.bench.step import make_step
from slipstream.build import build, timing
from slipstream.checkpoint import open_checkpoint, resolve
from slipstream.checkpoint.random import write_random_model
from slipstream.engine.choices import ROW_BUCKETS, Choices, key_of
from slipstream.engine.folder import Engine, open_engine
from slipstream.errors import UsageError
from slipstream.kernels.costs import Work
from slipstream.kernels.registry import Kernel
from slipstream.models import model_file
from slipstream.schema.build import BuildConfig
from tests.checkpoint.naive_formats import FORMATS
from tests.checkpoint.test_formats import SHAPES, write_quantized

CPU = torch.device("cpu")
LIMITS = BuildConfig(max_batch_size=4, max_num_tokens=32, tokens_per_block=4)


def engine_of(model: Path, folder: Path) -> Engine:
    build(open_checkpoint(resolve(model)), folder / "engine", LIMITS)
    return open_engine(folder / "engine")


@pytest.fixture
def llama(tiny_model: Path, tmp_path: Path) -> Engine:
    return engine_of(tiny_model, tmp_path)


MODELS = ("llama", "gemma2", "gpt2", "deepseek_v3", "mixtral", "gpt_oss", "baichuan")


@pytest.mark.parametrize("model_type", MODELS)
def test_every_node_of_a_graph_is_timed(model_type: str, tmp_path: Path) -> None:
    """Sliding windows, learned positions, latent attention, experts, sinks, ALiBi: whatever indices an op takes."""
    check_all_nodes(write_random_model(tmp_path / "model", model_file(model_type).TINY), tmp_path)


@pytest.mark.parametrize("name", ["gptq-4-act-order", "ct-float-dynamic", "ct-int-w8a8"])
def test_packed_weights_are_timed(name: str, tmp_path: Path) -> None:
    model, _ = write_quantized(tmp_path / "model", SHAPES, FORMATS[name])
    check_all_nodes(model, tmp_path)


def check_all_nodes(model: Path, folder: Path) -> None:
    engine = engine_of(model, folder)
    report = bench_kernels(engine.graph, engine.manifest, Choices("", {}), CPU, rows=[1, 3, 10], contexts=[4, 7])
    for rows in (1, 3, 10):
        for context in (4, 7):
            step = [line for line in report.lines if line.rows == rows and line.context in (None, context)]
            assert sum(line.times for line in step) == len(engine.graph.nodes)
            (total,) = [each for each in report.totals if (each.rows, each.context) == (rows, context)]
            assert total.seconds == pytest.approx(sum(line.times * line.seconds[line.kernel] for line in step))
            assert total.floor == pytest.approx(sum(line.times * report.floor(line) for line in step))
    for line in report.lines:
        assert all(0 < seconds < 60 for seconds in line.seconds.values())
        assert report.fraction(line) == report.machine.floor(line.work) / line.seconds[line.kernel]


def test_a_step_reads_each_weight_once_and_of_the_embedding_its_rows(llama: Engine) -> None:
    report = bench_kernels(llama.graph, llama.manifest, Choices("", {}), CPU, rows=[1], contexts=[4])
    read = sum(line.times * line.work.num_bytes for line in report.lines if line.op == "linear")
    weights = {name for node in llama.graph.nodes if node.op == "linear" for name in node.inputs}
    in_weights = sum(llama.weights.read(str(name)).nbytes for name in weights if name in llama.graph.weights)
    widths = [(llama.graph.types[str(n.inputs[0])], llama.graph.types[n.outputs[0]]) for n in llama.graph.nodes
              if n.op == "linear"]  # fmt: skip
    assert read == in_weights + 4 * sum(int(x.shape[1]) + int(y.shape[1]) for x, y in widths)
    (embedding,) = [line for line in report.lines if line.op == "embedding"]
    assert embedding.work.num_bytes < 1000


def test_the_kernel_is_the_one_that_the_engine_runs_at_so_many_rows(llama: Engine) -> None:
    head = next(node for node in reversed(llama.graph.nodes) if node.op == "linear")
    key = key_of(head, llama.graph.types)
    names = ["reference" if size < 4 else "weight_first" for size in ROW_BUCKETS]
    report = bench_kernels(
        llama.graph, llama.manifest, Choices("", {key: names}), CPU, rows=[2, 4], contexts=[4], patterns=["linear"]
    )
    heads = [line for line in report.lines if line.times == 1]  # the other linears are in each of three layers
    assert [(line.rows, line.kernel) for line in heads] == [(2, "reference"), (4, "weight_first")]
    assert all(set(line.seconds) == {"reference", "weight_first", "native"} for line in report.lines)


def test_only_what_reads_the_cache_is_timed_at_each_context(llama: Engine) -> None:
    report = bench_kernels(
        llama.graph, llama.manifest, Choices("", {}), CPU, rows=[2], contexts=[4, 9], patterns=["attention", "*norm"]
    )
    assert sorted((line.op, line.context or 0) for line in report.lines) == [
        ("add_rms_norm", 0), ("attention", 4), ("attention", 9), ("rms_norm", 0)
    ]  # fmt: skip
    near, far = (line for line in report.lines if line.op == "attention")
    assert far.work.num_bytes > near.work.num_bytes
    with pytest.raises(UsageError, match=r"--ops is conv\*, which no op of this engine fits; they are add_rms_norm, "):
        bench_kernels(llama.graph, llama.manifest, Choices("", {}), CPU, rows=[2], contexts=[4], patterns=["conv*"])


def test_few_rows_are_sequences_and_many_are_prompts(llama: Engine) -> None:
    decode = make_step(llama.manifest, 3, 9, CPU)
    assert decode.inputs["step.query_starts"].tolist() == [0, 1, 2, 3]
    assert decode.inputs["step.kv_lens"].tolist() == [9, 9, 9]
    assert decode.inputs["step.positions"].tolist() == [8, 8, 8]
    prompts = make_step(llama.manifest, 20, 9, CPU)
    assert prompts.inputs["step.query_starts"].tolist() == [0, 9, 18, 20]
    assert prompts.inputs["step.kv_lens"].tolist() == [9, 9, 2]
    for step in (decode, prompts):
        tables, slots = step.inputs["step.block_tables"], step.inputs["step.slots"]
        used = [block for row, kv_len in zip(tables.tolist(), step.inputs["step.kv_lens"].tolist(), strict=True)
                for block in row[: -(-kv_len // 4)]]  # fmt: skip
        assert len(used) == len(set(used)) and 0 not in used
        assert max(used) < step.sizes["N"]
        assert set((slots // 4).tolist()) <= set(used) and len(set(slots.tolist())) == len(slots)


def test_a_floor_is_what_takes_longer_bytes_or_products() -> None:
    machine = measure_machine("float32", CPU)
    assert list(machine.products) == ["float32", "int8"]  # a CPU has no kernels of E4M3 to measure
    slow = machine.floor(Work(0, 10**12, torch.float32))
    assert slow == 1e12 / machine.products["float32"] == machine.floor(Work(0, 10**12, torch.float8_e4m3fn))
    assert machine.floor(Work(10**9)) == 1e9 / max(machine.read, machine.copy)
    assert machine.floor(Work(10**9, 10**12, torch.float32)) == max(slow, machine.floor(Work(10**9)))


def test_of_two_measurements_the_faster_counts() -> None:
    once, again = (
        Machine("m", 5.0, 2.0, {"float32": 7.0, "int8": 1.0}),
        Machine("m", 4.0, 3.0, {"float32": 6.0, "int8": 9.0}),
    )
    assert once.at_best(again) == again.at_best(once) == Machine("m", 5.0, 3.0, {"float32": 7.0, "int8": 9.0})


def test_times_are_seconds_of_a_call_and_cold_arguments_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock of its own, which goes on by what each call takes: the fastest counts."""
    monkeypatch.undo()  # rounds of their real length
    seen: list[int] = []
    clock = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])

    def take(number: int, *, seconds: float) -> None:
        seen.append(number)
        clock[0] += seconds * number

    kernel = Kernel("take", take, lambda device, dtype: True)
    found = timing.time_kernels({"take": kernel}, [[3], [1], [2]], {"seconds": 0.001}, CPU)
    assert found["take"] == pytest.approx(0.001)
    assert seen[:6] == [3, 1, 2, 3, 1, 2]
