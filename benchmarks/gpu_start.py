"""Where the start of an engine goes on a GPU, and what recordings of steps take.

    python benchmarks/gpu_start.py [--shape llama-3-8b] [--layers 32]

Random weights of real shapes (gpu_step.py). The rate of loading weights from the page cache, the measured peaks beside
the planned ones, then the first tokens, and for each recorded size its seconds and the memory that it took.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from gpu_step import SHAPES, checkpoint_of, prompts

from slipstream import LLM, SamplingParams
from slipstream.build import build
from slipstream.runtime.worker import worker as worker_module
from slipstream.runtime.worker.recorded import RecordedSteps
from slipstream.schema.build import BuildConfig


def timed(owner: Any, name: str, show: Any) -> None:
    """Print seconds and change in free memory of every call of a function."""
    call = getattr(owner, name)

    def wrapper(*arguments: Any, **more: Any) -> Any:
        torch.cuda.synchronize()
        free, start = torch.cuda.mem_get_info()[0], time.perf_counter()
        result = call(*arguments, **more)
        torch.cuda.synchronize()
        seconds, taken = time.perf_counter() - start, free - torch.cuda.mem_get_info()[0]
        print(f"  {name}{show(arguments, result)}: {seconds:.3f} s, {taken / 2**20:+.0f} MiB", flush=True)
        return result

    setattr(owner, name, wrapper)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-3-8b", choices=SHAPES)
    parser.add_argument("--layers", type=int)
    arguments = parser.parse_args()
    if arguments.layers:
        SHAPES[arguments.shape]["num_hidden_layers"] = arguments.layers
    timed(
        worker_module,
        "load_weights",
        lambda given, result: f" of {sum(w.nbytes for w in result.values()) / 1e9:.2f} GB",
    )
    timed(worker_module, "peak_memory", lambda given, result: f" = {result / 2**20:.0f} MiB")
    timed(RecordedSteps, "reserve", lambda given, result: f" {given[1] / 2**20:.0f} MiB")
    timed(RecordedSteps, "_record", lambda given, result: f" {given[1].num_tokens} x {given[1].table_width}")
    with tempfile.TemporaryDirectory() as folder:
        config = BuildConfig(dtype="bfloat16", max_batch_size=256, max_num_tokens=8192, max_seq_len=4096)
        build(checkpoint_of(arguments.shape, "bf16"), Path(folder) / "engine", config, device="cuda")
        torch.cuda.empty_cache()
        start = time.perf_counter()
        with LLM(Path(folder) / "engine", device="cuda") as llm:
            print(f"opened in {time.perf_counter() - start:.2f} s:", llm.startup_seconds)
            planned = {name: f"{size / 2**20:.0f} MiB" for name, size in llm.manifest.memory.items()}
            print(f"planned {planned}; {llm.runtime_config.num_blocks} KV blocks; now free "
                  f"{torch.cuda.mem_get_info()[0] / 2**30:.1f} GiB")  # fmt: skip
            for count, num_out in ((1, 1), (1, 64), (16, 64), (256, 64)):
                before = time.perf_counter()
                sampling = [
                    SamplingParams(temperature=0, max_tokens=num_out + i % 5, ignore_eos=True) for i in range(count)
                ]
                outputs = llm.generate(prompts(count, 128, llm.manifest.vocab_size), sampling)
                assert not any(output.error for output in outputs), outputs[0].error
                print(f"{count} requests, 128 -> {num_out}: {time.perf_counter() - before:.2f} s", flush=True)


if __name__ == "__main__":
    main()
