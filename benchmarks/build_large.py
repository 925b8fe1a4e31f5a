"""Building engines of large models: seconds of each stage, and the memory it takes at most.

    python benchmarks/build_large.py [llama-3-8b baichuan2-7b llama-3.3-70b] [--folder DIR]

Each model is a Hugging Face folder of the real shapes in bfloat16 whose weight file is a hole: it has its full length,
takes no disk, and reads as zeros. What a build does and holds does not depend on the values. Engines up to
KEPT_BYTES are written, opened and deleted again; larger ones go through the same writer into /dev/null.

The memory is the process's own (RssAnon, read every 2 ms, above what it was before the build). Pages of mapped files
are not counted: they are the kernel's to take back.
"""

import argparse
import json
import math
import os
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

KEPT_BYTES = 20 << 30

Shapes = dict[str, tuple[int, ...]]


def llama_shapes(options: dict[str, Any]) -> Shapes:
    hidden, inner = options["hidden_size"], options["intermediate_size"]
    kv = hidden // options["num_attention_heads"] * options["num_key_value_heads"]
    qkv = {"q_proj": (hidden, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden)}
    return _decoder_shapes(options, qkv, hidden, inner)


def baichuan_shapes(options: dict[str, Any]) -> Shapes:
    hidden = options["hidden_size"]
    return _decoder_shapes(options, {"W_pack": (3 * hidden, hidden)}, hidden, options["intermediate_size"])


def _decoder_shapes(options: dict[str, Any], qkv: Shapes, hidden: int, inner: int) -> Shapes:
    attention = qkv | {"o_proj": (hidden, hidden)}
    mlp = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    shapes: Shapes = {"model.embed_tokens.weight": (options["vocab_size"], hidden)}
    for layer in range(options["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        shapes |= {f"{name}.self_attn.{part}.weight": shape for part, shape in attention.items()}
        shapes |= {f"{name}.mlp.{part}.weight": shape for part, shape in mlp.items()}
        shapes |= {f"{name}.{norm}_layernorm.weight": (hidden,) for norm in ("input", "post_attention")}
    return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (options["vocab_size"], hidden)}


def options_of(model_type: str, **sizes: Any) -> dict[str, Any]:
    names = {"hidden": "hidden_size", "inner": "intermediate_size", "layers": "num_hidden_layers",
             "heads": "num_attention_heads", "kv": "num_key_value_heads", "vocab": "vocab_size",
             "positions": "max_position_embeddings"}  # fmt: skip
    return {"model_type": model_type, "torch_dtype": "bfloat16"} | {names[key]: value for key, value in sizes.items()}


MODELS = {
    "llama-3-8b": (llama_shapes, options_of(
        "llama", hidden=4096, inner=14336, layers=32, heads=32, kv=8, vocab=128256, positions=8192)),
    "baichuan2-7b": (baichuan_shapes, options_of(
        "baichuan", hidden=4096, inner=11008, layers=32, heads=32, vocab=125696, positions=4096)),
    "llama-3.3-70b": (llama_shapes, options_of(
        "llama", hidden=8192, inner=28672, layers=80, heads=64, kv=8, vocab=128256, positions=131072)),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help=", ".join(MODELS))
    parser.add_argument("--folder", type=Path, help="where the engines are written; a temporary one by default")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        return measure(arguments.measure, arguments.folder)
    print(f"commit {commit()}")
    print(f"| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}", flush=True)
    for name in arguments.models or MODELS:
        with tempfile.TemporaryDirectory(
            dir=arguments.folder
        ) as folder:  # a process each, so that none inherits memory
            command = [sys.executable, __file__, "--measure", name, "--folder", folder]
            subprocess.run(command, check=True, env=os.environ | {"SLIPSTREAM_CACHE": folder})
    return None


COLUMNS = (
    "model", "engine GB", "capture s", "rewrite s", "write s", "in all s", "again s", "memory GB",
    "largest layer GB", "index MB", "limit GB",
)  # fmt: skip


def measure(name: str, folder: Path) -> None:
    import torch

    from slipstream.build import BuildReport, cache, plan_build, write_engine
    from slipstream.checkpoint import Checkpoint, open_checkpoint, resolve
    from slipstream.engine.folder import open_engine
    from slipstream.schema.build import BuildConfig

    shapes_of, options = MODELS[name]
    shapes = shapes_of(options)
    source = resolve(hollow_model(folder / name, options, shapes))
    config, cpu = BuildConfig(dtype="bfloat16"), torch.device("cpu")
    reports: list[BuildReport] = []

    def build(checkpoint: Checkpoint, engine: Path, *_: Any, progress: Any = lambda *_: None, **__: Any) -> None:
        """As slipstream.build.build, without measuring kernels, which says nothing about the build."""
        plan = plan_build(checkpoint, config)
        reports.append(write_engine(plan, engine, measure_kernels=False, progress=progress))

    is_kept = sum(2 * math.prod(shape) for shape in shapes.values()) <= KEPT_BYTES
    again = "-"
    with PeakMemory() as memory:
        started = time.perf_counter()
        if is_kept:
            cache.build = build  # type: ignore[assignment]
            cache.cached_engine(source, config, cpu, lambda *_: None)
        else:
            checkpoint = open_checkpoint(source, "bfloat16")
            build(checkpoint, folder / "engine", progress=discarding(folder / "engine"))
            checkpoint.close()
        seconds_in_all = time.perf_counter() - started
    (report,) = reports
    if is_kept:
        started = time.perf_counter()
        open_engine(cache.cached_engine(source, config, cpu, lambda *_: None)).close()
        again = f"{time.perf_counter() - started:.2f}"
    layer = largest_layer(shapes)
    index = (folder / name / "model.safetensors.header").stat().st_size
    cells = [
        name, gigabytes(report.memory["weights"]) + ("" if is_kept else " (discarded)"),
        *(f"{report.seconds[stage]:.1f}" for stage in ("capture", "rewrite", "write")),
        f"{seconds_in_all:.1f}", again, gigabytes(memory.peak), gigabytes(layer),
        f"{index / 1e6:.2f}", gigabytes(2 * layer + index),
    ]  # fmt: skip
    print(f"| {' | '.join(cells)} |", flush=True)


def hollow_model(folder: Path, options: dict[str, Any], shapes: Shapes) -> Path:
    """A Hugging Face folder whose weights are a hole in a file, each told from the others by its first number."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(options))
    header, position = {}, 0
    for name, shape in shapes.items():
        end = position + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    (folder / "model.safetensors.header").write_bytes(text)  # for its size alone
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + position)
        for number, entry in enumerate(header.values(), 1):  # equal weights would be stored once
            file.seek(8 + len(text) + entry["data_offsets"][0])
            file.write(struct.pack("<H", number))
    return folder


def discarding(engine: Path) -> Any:
    """A progress callback that puts /dev/null where the weights are about to be written, by the real writer."""
    os.fsync = lambda _: None  # type: ignore[assignment]  # /dev/null refuses it

    def progress(stage: str, done: int, total: int) -> None:
        target = engine / "rank0.engine.partial"
        if stage == "tune" and not target.is_symlink():
            target.symlink_to(os.devnull)

    return progress


def largest_layer(shapes: Shapes) -> int:
    """Bytes of the largest of: one decoder layer, the embedding, the head."""
    sizes: dict[str, int] = {}
    for name, shape in shapes.items():
        layer = name.split(".")[2] if ".layers." in name else name
        sizes[layer] = sizes.get(layer, 0) + 2 * math.prod(shape)
    return max(sizes.values())


class PeakMemory:
    """The process's own memory at its highest within a `with`, above what it was before."""

    def __enter__(self) -> "PeakMemory":
        self.peak, self._before, self._stop = 0, _own_memory(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.002):
            self.peak = max(self.peak, _own_memory() - self._before)


def _own_memory() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f}"


def commit() -> str:
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
