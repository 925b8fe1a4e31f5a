"""SmolLM2-135M from its GGUF file to a conversation on a GPU, with the commands that one types on a CPU.

    python benchmarks/gpu_smollm2.py SmolLM2-135M-Instruct.Q4_1.gguf [--device cuda]

Converts, builds and runs in float32 and in bfloat16, prints what was typed and what came back, and compares greedy
tokens with those of a CPU in float32: equal in float32 (else the exit code is 1), as often as stated in bfloat16.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from slipstream import LLM, SamplingParams
from slipstream.build.tune import describe_device
from tests.models.test_smollm2 import PROMPTS

SAID = ("How do I count to nine in French?", "And to three in German?", "/reset", "What did I ask before?", "/exit")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tokens", type=int, default=128, help="of each of the 20 texts that are compared")
    arguments = parser.parse_args()
    print(describe_device(torch.device(arguments.device)))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for dtype in ("float32", "bfloat16"):
            chain(arguments.model.resolve(), folder, dtype, arguments.device)
        expected = greedy(folder / "engine-float32", "cpu", arguments.tokens)
        same = compare(expected, greedy(folder / "engine-float32", arguments.device, arguments.tokens), "float32")
        compare(expected, greedy(folder / "engine-bfloat16", arguments.device, arguments.tokens), "bfloat16")
    return int(not same)


def chain(model: Path, folder: Path, dtype: str, device: str) -> None:
    checkpoint, engine = f"checkpoint-{dtype}", f"engine-{dtype}"
    slipstream(folder, "convert", "--model_dir", str(model), "--output_dir", checkpoint, "--dtype", dtype)
    options = ("--dtype", dtype, "--device", device)
    slipstream(folder, "build", "--checkpoint_dir", checkpoint, "--output_dir", engine, *options)
    text = "The capital of France is"
    slipstream(
        folder, "run", "--engine_dir", engine, "--device", device, "--input_text", text, "--max_output_len", "16"
    )
    typed = "".join(f"{line}\n" for line in SAID)
    options = ("--device", device, "--temperature", "0", "--repetition_penalty", "1.1", "--max_output_len", "80")
    slipstream(folder, "chat", engine, *options, typed=typed)


def slipstream(folder: Path, *words: str, typed: str = "") -> None:
    """One command as a person types it, its answer printed. Raises CalledProcessError where it fails."""
    print("\n$ slipstream " + " ".join(f'"{word}"' if " " in word else word for word in words))
    print("".join(f"> {line}\n" for line in typed.splitlines()), end="", flush=True)
    command = [sys.executable, "-c", "from slipstream.cli import main; main()", *words]
    start = time.perf_counter()
    done = subprocess.run(command, cwd=folder, input=typed, capture_output=True, text=True, check=False)
    print(done.stdout, end="")
    print(f"({time.perf_counter() - start:.1f} s)", flush=True)
    if done.returncode:
        print(done.stderr)
        done.check_returncode()


def greedy(engine: Path, device: str, num_tokens: int) -> list[list[int]]:
    with LLM(engine, device=device, max_seq_len=512) as llm:
        sampling = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
        start = time.perf_counter()
        outputs = llm.generate(PROMPTS, sampling)
        print(f"{llm.manifest.dtype} on {device}: {time.perf_counter() - start:.1f} s for {len(PROMPTS)} texts")
    assert not any(output.error for output in outputs)
    return [output.outputs[0].token_ids for output in outputs]


def compare(expected: list[list[int]], found: list[list[int]], dtype: str) -> bool:
    """Print how many tokens come before the first that differs; -> whether there is none."""
    alike = []
    for one, other in zip(expected, found, strict=True):
        pairs = zip(one, other, strict=True)
        alike.append(next((index for index, (mine, its) in enumerate(pairs) if mine != its), len(one)))
    whole = sum(count == len(one) for count, one in zip(alike, expected, strict=True))
    total = sum(map(len, expected))
    print(
        f"{dtype}: {whole} of {len(expected)} texts equal to the CPU's in float32, {100 * sum(alike) / total:.1f} % of "
        "the tokens before the first that differs"
    )
    return whole == len(expected)


if __name__ == "__main__":
    sys.exit(main())
