"""`slipstream quantize` on layers as wide as a 70B's: peak memory and time, and a SIGKILL in the middle.

    python benchmarks/quantize_large.py FOLDER [--layers 2] [--qformats fp8,int4_awq] [--calib_size 4] [--kill fp8]

Writes a model of random weights with the widths and the vocabulary of Llama 3.1 70B into FOLDER (once), quantizes it in
a process of its own, and prints what that took. --kill: those formats are quantized twice more, by a process killed
after its first layer and by one that goes on from there, whose weights must be the same bytes.
"""

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from slipstream.checkpoint import open_checkpoint, resolve
from slipstream.engine.tensor_file import write_tensor_file

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "hidden_size": 8192,
    "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256,
    "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": False,
}  # fmt: skip
LAYERS_OF_70B = 80


@dataclass(frozen=True)
class Cost:
    seconds: float
    processor: float
    resident: float  # GiB at most, pages of mapped files among them, which the system takes back when it needs them
    own: float  # GiB at most, without these


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--qformats", default="fp8,int4_awq")
    parser.add_argument("--calib_size", default="4")
    parser.add_argument("--length", default="32", help="tokens of a text; 16 are judged by")
    parser.add_argument("--kill", default="", help="of the qformats")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    model = arguments.folder / "model"
    if not model.exists():
        write_model(model, arguments.layers)
    print(f"load average {os.getloadavg()[0]:.1f}, {torch.get_num_threads()} threads", flush=True)
    print("| qformat | time | processor time | a layer | peak | of it no mapped file |\n" + 6 * "| --- " + "|")
    same = True
    for qformat in arguments.qformats.split(","):
        made = arguments.folder / qformat
        command = [
            sys.executable,
            "-c",
            "from slipstream.cli import main; main()",
            "quantize",
            "--model_dir",
            str(model),
        ]
        command += ["--qformat", qformat, "--output_dir", str(made), "--device", arguments.device]
        command += ["--calib_size", arguments.calib_size, "--calib_max_seq_length", arguments.length]
        cost, layer = run(command, made)
        print(
            f"| {qformat} | {cost.seconds:.0f} s | {cost.processor:.0f} s | {layer:.0f} s | {cost.resident:.1f} GiB "
            f"| {cost.own:.1f} GiB |",
            flush=True,
        )
        expected = digest(made)
        if qformat in arguments.kill.split(","):
            run(command, made, kills=True)
            done = sorted(path.name for path in made.with_name(made.name + ".partial").glob("block-*"))
            run(command, made)
            same &= digest(made) == expected
            print(f"{qformat}: killed with {done} on the disk; {'the same' if same else 'OTHER'} bytes after going on")
        shutil.rmtree(made)
    return int(not same)


def run(command: list[str], made: Path, *, kills: bool = False) -> tuple[Cost, float]:
    """(its cost, seconds between the first two layers' files)"""
    shutil.rmtree(made, ignore_errors=True)
    blocks = made.with_name(made.name + ".partial")
    start, own, resident = time.monotonic(), 0, 0
    written: dict[str, float] = {}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while (ended := os.wait4(process.pid, os.WNOHANG))[0] == 0:
        found = status(process.pid)
        own, resident = max(own, found.get("RssAnon", 0)), max(resident, found.get("VmHWM", 0))
        for path in blocks.glob("block-*"):
            written.setdefault(path.name, time.monotonic())
        if kills and "block-0001.safetensors" in written:
            time.sleep(5)  # into the next layer
            os.kill(process.pid, signal.SIGKILL)
            kills = False
        time.sleep(0.2)
    process.returncode = os.waitstatus_to_exitcode(ended[1])
    if process.returncode not in (0, -signal.SIGKILL):
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}.")
    used = ended[2].ru_utime + ended[2].ru_stime
    times = sorted(written.values())
    layer = times[1] - times[0] if len(times) > 1 else 0.0
    return Cost(time.monotonic() - start, used, resident / 2**20, own / 2**20), layer


def status(pid: int) -> dict[str, int]:
    """Its sizes in KiB; {} once it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    return {name: int(size.split()[0]) for name, _, size in (line.partition(":") for line in lines) if "kB" in size}


def digest(folder: Path) -> str:
    found = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            found.update(hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()


def write_model(folder: Path, num_layers: int) -> None:
    """One weight in memory at a time, each from a seed of its own."""
    folder.mkdir(parents=True)
    entries = [
        (name, shape, torch.bfloat16, lambda shape=shape, seed=seed: weight(shape, seed))
        for seed, (name, shape) in enumerate(weights(num_layers))
    ]
    write_tensor_file(folder / "model.safetensors", entries, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": num_layers}))
    tokenizer = open_checkpoint(resolve("smollm2"))  # whose 49,152 tokens are among these
    tokenizer.write_tokenizer(folder)
    tokenizer.close()


def weights(num_layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, inner, vocab, kv = 8192, 28672, 128256, 1024
    yield "model.embed_tokens.weight", (vocab, hidden)
    for layer in range(num_layers):
        for name, shape in {
            "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner), "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
        }.items():  # fmt: skip
            yield f"model.layers.{layer}.{name}.weight", shape
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocab, hidden)


def weight(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    made = torch.empty(shape, dtype=torch.bfloat16)
    for rows in made.split(1024):
        rows.copy_(torch.randn(rows.shape, generator=generator) * shape[1] ** -0.5)
    return made


if __name__ == "__main__":
    sys.exit(main())
