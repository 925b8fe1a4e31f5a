"""A large target with smaller draft models on one GPU, batch 1: what a step costs where acceptance is given.

    python benchmarks/gpu_drafts.py --folder /dev/shm      Llama-3.3-70B's shape in fp8, drafts of 1B, 3B, 8B (an H200)
    python benchmarks/gpu_drafts.py --folder /dev/shm --drafts llama-3.2-1b llama-3-8b:int4    drafts in other formats
    python benchmarks/gpu_drafts.py --device cpu --shape tiny --drafts tiny --format bf16      the script itself

ACCEPTANCE IS SYNTHETIC. All weights are random, so hardly a draft would be right: each draft is declared accepted with
the probability of --acceptance, one by one until the first that is not, and what the target really chose there comes
next. Drafting, verification and the bookkeeping of both are real, and so is the KV that later steps read. What a real
pair of models accepts is not measured here.

Tokens a second are of the tokens after the first (256 of them after 128), medians of --times runs.
"""

import argparse
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import gpu_step
import torch
from gpu_step import FORMATS, SHAPES, checkpoint_of, generate_seconds
from torch import Tensor

from slipstream import LLM
from slipstream.build import build
from slipstream.runtime.worker.drafts import Drafts
from slipstream.schema.build import BuildConfig
from slipstream.speculative.accept import Accepted

GOALS = {"llama-3.2-1b": 3.55, "llama-3.2-3b": 3.16, "llama-3-8b": 2.63}  # times plain decoding, on a 70B


def toss_coins(rate: float) -> None:
    """From now on engines of chains of drafts are told what the target has chosen."""
    accepted = Drafts.accepted

    def told(
        drafts: Drafts, slots_S: Tensor, rows_S: Tensor, sizes_S: Tensor, num_nodes: int, chosen_R: Tensor
    ) -> Accepted:
        # Of the device's own generator: a recorded step goes on where it was.
        is_right_SM = torch.rand(len(slots_S), num_nodes, device=chosen_R.device) < rate
        drafted_SM, _ = drafts.trees(slots_S, num_nodes)
        nodes_M = torch.arange(num_nodes, device=chosen_R.device)
        rows_SM = (rows_S[:, None] + nodes_M).clamp(max=len(chosen_R) - 1)
        chosen_SM, next_SM = chosen_R[rows_SM], drafted_SM.roll(-1, 1)
        said_SM = next_SM.where(is_right_SM, chosen_SM.where(chosen_SM != next_SM, next_SM ^ 1))
        said_SM = said_SM.where(1 + nodes_M < sizes_S[:, None], chosen_SM)
        return accepted(drafts, slots_S, rows_S, sizes_S, num_nodes, chosen_R.index_put((rows_SM,), said_SM))

    Drafts.accepted = told  # type: ignore[assignment]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-3.3-70b", choices=SHAPES)
    parser.add_argument("--drafts", nargs="+", default=list(GOALS), help="shapes; SHAPE:FORMAT for another --format")
    parser.add_argument("--format", default="fp8-static", choices=FORMATS, help="of target and drafts")
    parser.add_argument("--kv_cache_dtype", default="fp8", help="of target and drafts")
    parser.add_argument(
        "--acceptance", type=float, default=0.82, help="of each draft, where those before it were right"
    )
    parser.add_argument("--draft_len", type=int, nargs="+", default=[10])
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--num_out", type=int, default=256)
    parser.add_argument("--layers", type=int, help="of the target, fewer than it has, to try the script")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--folder", help="where the engines are written for as long as this runs")
    arguments = parser.parse_args()
    gpu_step.DEVICE = torch.device(arguments.device)
    if arguments.layers:
        SHAPES[arguments.shape]["num_hidden_layers"] = arguments.layers
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    name = torch.cuda.get_device_name() if arguments.device == "cuda" else "CPU"
    what = f"{arguments.shape} {arguments.format}, KV in {arguments.kv_cache_dtype}, batch 1"
    print(f"{name}, commit {found.stdout.strip() or 'unknown'}, torch {torch.__version__}; {what}, "
          f"synthetic acceptance of {arguments.acceptance}", flush=True)  # fmt: skip
    if arguments.device == "cuda":
        gpu_step.card()
        gpu_step.free_memory()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        names = dict.fromkeys((arguments.shape, *arguments.drafts))
        engines = {name: built(name, arguments, Path(folder) / name.replace(":", "-")) for name in names}
        compare(engines, arguments)


def built(name: str, arguments: argparse.Namespace, folder: Path) -> Path:
    """name: a shape, or SHAPE:FORMAT."""
    start, (shape, _, format) = time.perf_counter(), name.partition(":")
    config = BuildConfig(
        dtype="bfloat16", kv_cache_dtype=arguments.kv_cache_dtype, max_batch_size=2, max_num_tokens=256,
        max_seq_len=1024,
    )  # fmt: skip
    build(checkpoint_of(shape, format or arguments.format), folder, config, device=arguments.device)
    print(f"{name} built in {time.perf_counter() - start:.0f} s", flush=True)
    return folder


def compare(engines: dict[str, Path], arguments: argparse.Namespace) -> None:
    plain, _ = tokens_a_second(engines[arguments.shape], None, arguments)
    print(
        "| draft | drafts a step | tok/s | acceptance length | times plain | goal | ms a step |\n" + "| --- " * 7 + "|"
    )
    print(f"| none | 0 | {plain:.1f} | 1 | 1 | | {1e3 / plain:.2f} |", flush=True)
    torch.manual_seed(0)
    toss_coins(arguments.acceptance)
    for draft in arguments.drafts:
        for length in arguments.draft_len:
            speculative = {
                "method": "draft_model", "model": str(engines[draft]), "max_draft_len": length, "adaptive": False
            }  # fmt: skip
            speed, accepted = tokens_a_second(engines[arguments.shape], speculative, arguments)
            goal = GOALS.get(draft.partition(":")[0], "") if arguments.shape == "llama-3.3-70b" else ""
            row = f"{draft} | {length} | {speed:.1f} | {accepted:.2f} | {speed / plain:.2f} | {goal} | "
            print(f"| {row}{1e3 * accepted / speed:.2f} |", flush=True)


def tokens_a_second(
    engine: Path, speculative: dict[str, Any] | None, arguments: argparse.Namespace
) -> tuple[float, float]:
    """And the acceptance length."""
    with LLM(
        engine, device=arguments.device, dtype="bfloat16", max_batch_size=1, enable_block_reuse=False,
        kv_cache_max_tokens=2048, speculative=speculative,
    ) as llm:  # fmt: skip
        whole = generate_seconds(llm, 1, 128, arguments.num_out + 1, arguments.times)
        one = generate_seconds(llm, 1, 128, 1, arguments.times)
        stats = llm.stats
    accepted = 1 + sum(stats.num_accepted_tokens) / stats.num_drafts if stats.num_drafts else 1.0
    gpu_step.free_memory()
    return arguments.num_out / (whole - one), accepted


if __name__ == "__main__":
    main()
