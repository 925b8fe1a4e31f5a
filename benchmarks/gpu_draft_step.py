"""What a step with drafts takes on a GPU, and where: random models in SmolLM2's shape, batch 1.

    python benchmarks/gpu_draft_step.py [plain medusa24 eagle24 …] [--trace FOLDER]
    python benchmarks/gpu_draft_step.py --device cpu --layers 4     the script itself
    python benchmarks/gpu_draft_step.py --batch_size 64 --rounds 5    with auto-control, beside plain decoding

Nothing is accepted, since heads are random (in the layouts and sizes that `slipstream train-drafter` makes): so a step
says one token, and its time is that of drafting and verifying. Milliseconds are medians of five runs of 200 steps after
a prompt of 128 tokens. Of a run under torch's profiler: kernels and copies a step, and how long at least one was at
work. --trace: a file for each engine, its kernels by time, and those of a step one after another with the gaps between.

--batch_size: so many requests at once, of different prompts, and as many drafts as pay, which is none here but for the
n-grams of texts that repeat themselves, as those of random models do. Each round asks both engines, in turn.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.profiler import ProfilerActivity, profile

from slipstream import LLM, SamplingParams
from slipstream.build.tune import describe_device
from slipstream.checkpoint.random import write_random_model
from tests.speculative.heads import write_eagle3, write_medusa, write_redrafter

SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536,
    "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152, "max_position_embeddings": 2048,
    "rope_theta": 100000.0, "tie_word_embeddings": True, "rms_norm_eps": 1e-5, "torch_dtype": "bfloat16",
}  # fmt: skip
EAGLE = {"intermediate_size": 1152, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64}
DRAFT_VOCAB, PROMPT, STEPS, LIMIT = 8192, list(range(5, 133)), 200, 512
Events = list[tuple[float, float, str]]  # microseconds


def engines_of(folder: Path, num_layers: int) -> tuple[Path, dict[str, dict[str, Any] | None]]:
    model = write_random_model(folder / "model", SMOLLM2 | {"num_hidden_layers": num_layers}, dtype="bfloat16")
    small = write_random_model(folder / "small", SMOLLM2 | {"num_hidden_layers": 3}, seed=1, dtype="bfloat16")
    medusa = sharing(write_medusa(model, folder / "medusa", 4, 3), "medusa_lm_head.safetensors", medusa_num_heads=4)
    redrafter = sharing(write_redrafter(model, folder / "redrafter", exit_dim=576), "model.safetensors")
    eagle = sharing(write_eagle3(model, folder / "eagle", DRAFT_VOCAB, **EAGLE), "model.safetensors")
    found: dict[str, dict[str, Any] | None] = {"plain": None, "ngram8": {"method": "ngram", "max_draft_len": 8}}
    for method, path, lengths in (
        ("medusa", medusa, (8, 24, 60)), ("redrafter", redrafter, (24,)), ("eagle", eagle, (24, 60)),
        ("draft_model", small, (5, 8)),
    ):  # fmt: skip
        for length in lengths:
            found[f"{method}{length}"] = {"method": method, "model": str(path), "max_draft_len": length}
    return model, {name: each and each | {"adaptive": False} for name, each in found.items()}


def sharing(folder: Path, file: str, **config: int) -> Path:
    """The head, with rows of the model's output layer instead of its own, as trained ones have."""
    tensors = load_file(folder / file)
    own = [name for name, each in tensors.items() if each.shape[:1] == (SMOLLM2["vocab_size"],)]
    for name in {*own, "lm_head.weight", "d2t", "t2d"} & tensors.keys():
        del tensors[name]
    save_file(tensors | {"draft_token_ids": torch.arange(DRAFT_VOCAB, dtype=torch.int32)}, folder / file)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


def ask(llm: LLM, num_tokens: int) -> tuple[float, int]:
    """Seconds, and the steps after the first."""
    before, start = llm.stats.num_steps, time.perf_counter()
    llm.generate([PROMPT], SamplingParams(max_tokens=num_tokens, temperature=0, ignore_eos=True))
    return time.perf_counter() - start, llm.stats.num_steps - before - 1


def tokens_a_second(llm: LLM, batch_size: int, seed: int) -> float:
    prompts = [[(index * 7 + place * 31 + seed) % 4096 for place in range(128)] for index in range(batch_size)]
    start = time.perf_counter()
    llm.generate(prompts, SamplingParams(max_tokens=STEPS, temperature=0, ignore_eos=True))
    return batch_size * STEPS / (time.perf_counter() - start)


def compare(plain: LLM, drafting: LLM, batch_size: int, rounds: int) -> str:
    """A row: both engines' tokens a second, and the ratios of the rounds."""
    for llm in (plain, drafting):
        tokens_a_second(llm, batch_size, 0)
    pairs = [
        tuple(tokens_a_second(llm, batch_size, seed) for llm in (plain, drafting)) for seed in range(1, 1 + rounds)
    ]
    ratios = [drafted / alone for alone, drafted in pairs]
    alone, drafted = (statistics.median(speeds) for speeds in zip(*pairs, strict=True))
    before = drafting.stats
    share = sum(before.num_accepted_tokens) / max(1, before.num_draft_tokens)
    return f"{alone:.0f} | {drafted:.0f} | {statistics.median(ratios):.3f} ({min(ratios):.3f}) | {share:.0%}"


def milliseconds(llm: LLM) -> list[float]:
    """Of a step, in each of five runs."""
    ask(llm, 32)
    found = []
    for _ in range(5):
        seconds, num_steps = ask(llm, STEPS)
        found.append(1e3 * (seconds - ask(llm, 1)[0]) / num_steps)
    return found


def kernels(llm: LLM) -> tuple[Events, int]:
    with profile(activities=[ProfilerActivity.CUDA]) as traced:
        _, num_steps = ask(llm, 100)
    on_device = [each for each in traced.events() if each.device_type == torch.autograd.DeviceType.CUDA]
    return sorted((each.time_range.start, each.time_range.end, each.name) for each in on_device), num_steps


def busy(events: Events) -> float:
    """Microseconds in which something ran."""
    total = last = 0.0
    for start, end, _ in events:
        total += max(0.0, end - max(start, last))
        last = max(last, end)
    return total


def write_trace(path: Path, events: Events, num_steps: int) -> None:
    by_name: dict[str, list[float]] = defaultdict(list)
    for start, end, name in events:
        by_name[name].append(end - start)
    lines = [
        f"{len(each) / num_steps:8.1f} a step {sum(each) / num_steps:9.2f} us  {name[:110]}"
        for name, each in sorted(by_name.items(), key=lambda item: -sum(item[1]))
    ]
    first = 3 * len(events) // 4
    of_a_step = events[first : first + 3 * len(events) // (2 * num_steps)]
    for before, (start, end, name) in pairwise(of_a_step):
        lines.append(f"{start - before[1]:8.1f} us later {end - start:7.1f} us  {name[:110]}")
    path.write_text("\n".join(lines) + "\n")


def compare_all(arguments: argparse.Namespace) -> None:
    print("\n| engine | plain, tok/s | with drafts | times plain, median (least) | accepted of all drafts |")
    print("| --- " * 5 + "|", flush=True)
    limits = {"max_batch_size": arguments.batch_size, "kv_cache_max_tokens": LIMIT * arguments.batch_size}
    limits |= {"device": arguments.device, "dtype": "bfloat16", "enable_block_reuse": False}
    with tempfile.TemporaryDirectory() as folder:
        model, engines = engines_of(Path(folder), arguments.layers)
        with LLM(model, **limits) as plain:
            for name in arguments.engines or [each for each in engines if each != "plain"]:
                with LLM(model, **limits, speculative=(engines[name] or {}) | {"adaptive": True}) as llm:
                    print(f"| {name} | {compare(plain, llm, arguments.batch_size, arguments.rounds)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engines", nargs="*", help="of those in the table; by default all")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--trace", type=Path, help="folder for a file for each engine")
    parser.add_argument("--batch_size", type=int, help="requests at once, with auto-control")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    print(f"{describe_device(torch.device(arguments.device))}, torch {torch.__version__}")
    if arguments.batch_size:
        compare_all(arguments)
        return
    print("\n| engine | ms a step, median (least) | kernels | copies | busy, ms |\n" + "| --- " * 5 + "|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        model, engines = engines_of(Path(folder), arguments.layers)
        for name in arguments.engines or engines:
            with LLM(
                model, device=arguments.device, dtype="bfloat16", max_batch_size=1, kv_cache_max_tokens=2048,
                enable_block_reuse=False, speculative=engines[name],
            ) as llm:  # fmt: skip
                times = milliseconds(llm)
                row = f"| {name} | {statistics.median(times):.3f} ({min(times):.3f})"
                if arguments.device == "cuda":
                    events, num_steps = kernels(llm)
                    num_copies = sum(each[2].startswith("Mem") for each in events)
                    row += f" | {(len(events) - num_copies) / num_steps:.0f} | {num_copies / num_steps:.0f}"
                    row += f" | {busy(events) / num_steps / 1e3:.3f}"
                    if arguments.trace:
                        arguments.trace.mkdir(parents=True, exist_ok=True)
                        write_trace(arguments.trace / f"{name}.txt", events, num_steps)
                print(f"{row} |", flush=True)


if __name__ == "__main__":
    main()
