"""SmolLM2-135M on this CPU with all passes and with none: the time of a step, and the same greedy tokens.

    python benchmarks/passes_cpu.py [--rounds 5]

Both engines run in this process, a step of one after a step of the other, so that a disturbance hits both alike. Each
round is 128 tokens in and 64 out, for one sequence and for 32; the table gives medians over the steps of all rounds.
"""

import argparse
import contextlib
import datetime
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from slipstream.build import build
from slipstream.build.cache import tuned_choices
from slipstream.build.pipeline import FUSIONS, LOWERING
from slipstream.build.tune import describe_device
from slipstream.checkpoint import open_checkpoint, resolve
from slipstream.engine.folder import open_engine
from slipstream.runtime.engine import Engine, start_engine
from slipstream.schema.build import BuildConfig
from slipstream.schema.request import GenerateRequest
from slipstream.schema.sampling import SamplingParams

INPUT, OUTPUT, MANY = 128, 64, 32
CPU = torch.device("cpu")
VARIANTS = {"all passes": (), "no passes": tuple(each.name for each in (*FUSIONS, *LOWERING))}
CASES = (f"prompt of {INPUT}, batch 1", "decode, batch 1", f"decode, batch {MANY}")
Times = dict[tuple[str, str], list[float]]  # (case, variant) → seconds of each step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(1000, 40000, (MANY, INPUT), generator=generator).tolist()
    times: Times = {(case, variant): [] for case in CASES for variant in VARIANTS}
    with tempfile.TemporaryDirectory() as folder:
        engines = {
            variant: start(Path(folder) / str(index), disabled)
            for index, (variant, disabled) in enumerate(VARIANTS.items())
        }
        run(engines, prompts[:1], {key: [] for key in times})  # warms up
        for _ in range(rounds):
            run(engines, prompts[:1], times)
            run(engines, prompts, times)
        report(times, rounds)
        inspected = subprocess.run(
            [sys.executable, "-c", "from slipstream.cli import main; main()", "inspect", str(Path(folder) / "0")],
            capture_output=True,
            text=True,
            check=True,
        )
        print(inspected.stdout.partition("Passes")[2].partition("Kernels")[0].strip())


def start(path: Path, disabled: tuple[str, ...]) -> Engine:
    config = BuildConfig(dtype="float32", max_batch_size=MANY, max_seq_len=512, disabled_passes=disabled)
    with contextlib.closing(open_checkpoint(resolve("smollm2"), "float32")) as checkpoint:
        build(checkpoint, path, config)
    folder = open_engine(path)
    tokens = MANY * (INPUT + OUTPUT + config.tokens_per_block)
    return start_engine(folder, tuned_choices(folder, CPU), CPU, kv_cache_max_tokens=tokens, enable_block_reuse=False)


def run(engines: dict[str, Engine], prompts: Sequence[Sequence[int]], times: Times) -> None:
    """All prompts at once through each engine, in turns; the tokens must be the same."""
    tokens: dict[str, dict[str, list[int]]] = {variant: {} for variant in engines}
    for variant, engine in engines.items():
        for index, prompt in enumerate(prompts):
            tokens[variant][str(index)] = []
            sampling = SamplingParams(temperature=0, max_tokens=OUTPUT)
            engine.add(GenerateRequest(str(index), tuple(prompt), sampling, seed=0, max_tokens=OUTPUT))
    while any(engine.has_work for engine in engines.values()):
        for variant, engine in engines.items():
            is_decode = all(tokens[variant].values())
            started = time.perf_counter()
            events = engine.step()
            seconds = time.perf_counter() - started
            if is_decode:
                times[CASES[1] if len(prompts) == 1 else CASES[2], variant].append(seconds)
            elif len(prompts) == 1:
                times[CASES[0], variant].append(seconds)
            for event in events:
                assert event.error is None, event.error
                tokens[variant][event.request_id] += event.token_ids
    first, second = tokens.values()
    assert first == second, "the passes changed the tokens"
    assert all(len(ids) == OUTPUT for ids in first.values())


def report(times: Times, rounds: int) -> None:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    print(f"\n{datetime.date.today()}, commit {commit}, {describe_device(CPU)}, {platform.platform()}")
    print(f"float32, medians over the steps of {rounds} rounds (10th to 90th percentile); the same tokens both ways\n")
    print(f"| a step of | {' | '.join(f'{variant}, ms' for variant in VARIANTS)} | ratio |\n| --- | --- | --- | --- |")
    for case in CASES:
        cells, medians = [], []
        for variant in VARIANTS:
            found = sorted(1000 * seconds for seconds in times[case, variant])
            low, high = found[len(found) // 10], found[-1 - len(found) // 10]
            medians.append(statistics.median(found))
            cells.append(f"{medians[-1]:.1f} ({low:.1f} to {high:.1f})")
        print(f"| {case} | {' | '.join(cells)} | {medians[1] / medians[0]:.2f}× |")
    print()


if __name__ == "__main__":
    main()
