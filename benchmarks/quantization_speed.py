"""Decode speed of SmolLM2-135M in each format of `slipstream quantize`, one sequence at a time.

    python benchmarks/quantization_speed.py [--device cpu|cuda] [--model smollm2] [--formats full_prec,int8_wo]

Each is quantized (with two short texts, or none where it needs none: which numbers are chosen does not change the
speed), built and run in turn: greedy, 128 tokens in, 128 out, end of sequence ignored. A row is the least time of a
token in some rounds; on a CPU processor time stands beside it, for a machine with other work. On a GPU engines are in
bfloat16, on a CPU in float32. int4_gptq runs as int4_wo does.
"""

import argparse
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

from slipstream import LLM, SamplingParams
from slipstream.build.tune import describe_device
from slipstream.checkpoint.folder import Checkpoint
from slipstream.quantize.apply import Settings, quantize
from slipstream.quantize.qformats import QFORMATS
from slipstream.quantize.texts import Texts

INPUT, OUTPUT = 128, 128
CASES = {name: Settings(qformat=name) for name in QFORMATS if name not in ("int8", "int4_gptq")} | {
    f"KV cache in {name}": Settings(qformat="full_prec", kv_cache_dtype=name) for name in ("int8", "fp8")
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--formats", default=",".join(CASES), help="of these, with commas")
    arguments = parser.parse_args()
    print(describe_device(torch.device(arguments.device)))
    print("| format | ms a token | tokens a second | processor time, ms a token | to get there |")
    print("| --- | --- | --- | --- | --- |")
    for name in arguments.formats.split(","):
        start = time.perf_counter()
        settings, device = CASES[name], torch.device(arguments.device)
        with tempfile.TemporaryDirectory() as folder:
            made = Path(folder) / "made"
            quantize(
                arguments.model, made, partial(texts_of, settings=settings), settings, dtype="bfloat16", device=device
            )
            prepared = time.perf_counter() - start
            wall, used = measure(made, arguments.device, arguments.rounds)
        print(f"| {name} | {1e3 * wall:.2f} | {1 / wall:.0f} | {1e3 * used:.1f} | {prepared:.0f} s |", flush=True)


def texts_of(checkpoint: Checkpoint, settings: Settings) -> Texts:
    needs_text = settings.method.needs_text or settings.kv_cache_dtype != "auto"
    ids = torch.randint(1000, 40000, (3 if needs_text else 1, 64), generator=torch.Generator().manual_seed(0))
    return Texts(ids[1:], ids[:1], "random")


def measure(model: Path, device: str, rounds: int) -> tuple[float, float]:
    """Seconds a token, by the clock and of the processor; what a text of one token takes is not counted."""
    dtype = "float32" if device == "cpu" else "bfloat16"
    prompt = torch.randint(1000, 40000, (INPUT,), generator=torch.Generator().manual_seed(1)).tolist()
    found = []
    with LLM(
        model, dtype=dtype, device=device, max_batch_size=1, max_seq_len=INPUT + OUTPUT, kv_cache_max_tokens=512
    ) as llm:  # fmt: skip
        for _ in range(1 + rounds):
            times = []
            for count in (1, OUTPUT):
                start = time.perf_counter(), time.process_time()
                llm.generate([prompt], SamplingParams(temperature=0, max_tokens=count, ignore_eos=True))
                times.append((time.perf_counter() - start[0], time.process_time() - start[1]))
            found.append(tuple((longer - first) / (OUTPUT - 1) for first, longer in zip(*times, strict=True)))
    return min(wall for wall, _ in found[1:]), min(used for _, used in found[1:])


if __name__ == "__main__":
    main()
