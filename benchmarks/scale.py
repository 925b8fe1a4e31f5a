"""What docs/scale.md stands on: a GPU's steps as they were measured, and what a front does on this machine.

PYTHONPATH=. python benchmarks/scale.py costs h100.json     for slipstream simulate; and measured rows, simulated
PYTHONPATH=. python benchmarks/scale.py front               microseconds of a router's choice, and of tokenizing
"""

import argparse
import os
import platform
import random
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import msgspec

from slipstream.bench.costs import StepCosts, Work
from slipstream.bench.costs_file import CostsFile
from slipstream.bench.dataset import open_tokenizer, random_words
from slipstream.bench.load import Load
from slipstream.bench.simulate import Simulation
from slipstream.schema.build import RuntimeConfig
from slipstream.serve.router import Room, Router, block_keys

KV_BYTES = 32 * 8 * 128 * 2 * 2  # of a token: layers, heads, their size, keys and values, bf16
KV_ROOM = 61e9  # bytes: nine tenths of what 9 GB of weights and 2 of activations leave of 79 GB; not measured

# benchmarks/2026-11-22-h100-third.md, the shape of Llama-3-8B in fp8: seconds of steps.
DECODE = {1: 3.45e-3, 8: 3.71e-3, 64: 4.57e-3}  # by sequences, at contexts of 128 to 384
FULL = (256, 576, 12.3e-3)  # sequences, context
PREFILL = (2048, 31.2e-3)
PROMPTS = (16, 512, 115e-3)
PER_TOKEN_READ = 206e-6 * 32 / (256 * 576)  # attention of FULL, over its layers
PER_PAIR = 4 * 128 * 32 * 32 / 400e12  # operations, at half of what bf16 products reach; not measured


def costs() -> StepCosts:
    """Through every row: what reading and pairs do not explain is the rise with a step's tokens."""
    sequences, context, seconds = FULL
    rows = [(Work(batch, batch, batch * 256, 0), time) for batch, time in DECODE.items()]
    rows.append((Work(sequences, sequences, sequences * context, 0), seconds))
    rows.append((Work(PREFILL[0], 1, PREFILL[0], PREFILL[0] ** 2 // 2), PREFILL[1]))
    number, size, seconds = PROMPTS
    rows.append((Work(number * size, number, number * size, number * size**2 // 2), seconds))
    rest = [seconds - PER_TOKEN_READ * work.read - PER_PAIR * work.pairs for work, seconds in rows]
    rises = tuple(high - low for low, high in pairwise(rest))
    return StepCosts(rest[0], tuple(work.tokens for work, _ in rows), rises, 0.0, PER_TOKEN_READ, PER_PAIR)


def write_costs(path: Path) -> None:
    runtime = RuntimeConfig(num_blocks=int(KV_ROOM / KV_BYTES / 16), max_batch_size=256, max_num_tokens=8192,
                            max_seq_len=8192)  # fmt: skip
    CostsFile("Llama-3-8B's shape, fp8", "one H100", True, runtime, costs()).write(path)
    draw = random.Random(0)
    prompts = [(tuple(draw.choices(range(100_000), k=512)), 128) for _ in range(256)]
    outcome = Simulation(runtime, costs(), prompts, Load(), runs_ahead=True).run()
    print(f"256 requests 512→128 at once: {outcome.run.output_rate:.0f} out tokens/s in {len(outcome.steps)} steps; "
          "measured 9854 in 144")  # fmt: skip


def measure_front() -> None:
    print(f"{platform.platform()}, load {os.getloadavg()[0]:.1f}")
    draw = random.Random(0)
    for num_replicas in (8, 64, 1000):
        router = Router()
        for replica in range(num_replicas):
            router.join(replica, Room(16, 29_000, 256, 1280))
        prefixes = [tuple(draw.choices(range(100_000), k=2048)) for _ in range(200)]
        loads = {replica: draw.randint(100, 110) for replica in range(num_replicas)}
        asked = iter([draw.choice(prefixes) + tuple(draw.choices(range(100_000), k=256)) for _ in range(400)])
        seconds = least(lambda: router.choose(next(asked), loads), 400)  # noqa: B023 - called here
        print(f"a choice among {num_replicas} replicas, prompt of 2304 tokens: {seconds * 1e6:.0f} us")
    news = msgspec.msgpack.encode([list(block_keys(draw.choices(range(100_000), k=2304), "", 16)) for _ in range(100)])
    decoder = msgspec.msgpack.Decoder(list[list[int]])

    def hear() -> None:
        for keys in decoder.decode(news):
            router.note(0, keys)

    print(f"hearing of such a prompt from another front: {least(hear, 20) / 100 * 1e6:.0f} us")
    tokenizer = open_tokenizer("smollm2")
    for num_words in (32, 512, 2048):
        texts = iter([str(sample.prompt) for sample in random_words(draw, 200, num_words, 1)])
        seconds = least(lambda: tokenizer.encode(next(texts)), 200)  # noqa: B023
        print(f"tokens of a text of {num_words}: {seconds * 1e6:.0f} us")


def least(call: Callable[[], object], count: int) -> float:
    """Seconds of processor time of a call, the first quartile: others use this machine, too."""
    found = []
    for _ in range(count):
        started = time.process_time()
        call()
        found.append(time.process_time() - started)
    return sorted(found)[count // 4]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["costs", "front"])
    parser.add_argument("file", type=Path, nargs="?", default=Path("h100.json"))
    arguments = parser.parse_args()
    if arguments.what == "costs":
        write_costs(arguments.file)
    else:
        measure_front()


if __name__ == "__main__":
    main()
