"""A table of what each format of `slipstream quantize` costs a model and what it gains: quality, size and speed.

    python benchmarks/quantization_table.py --json FOLDER [--model smollm2] [--device cpu|cuda] [--rows "fp8;int4_wo"]

A row is what follows --qformat. It goes through three commands: `slipstream quantize` with its report, `slipstream
build`, and `slipstream bench latency` (128 greedy tokens after 128, 1 and 8 sequences). --jobs rows are quantized and
built at once, then each engine is measured alone, with its kernels chosen again. A row that fails, or for which no time
is left (--within), is left out, and the others go on. Seconds to quantize are those of the command, start of Python and
all, beside as many others.

The table is printed at the end, and FOLDER/quantization.json has what there is at any time.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from slipstream.build.tune import describe_device
from slipstream.engine.folder import CACHE_FILE
from slipstream.quantize.report import REPORT_FILE
from slipstream.schema.units import human_bytes

INPUT, OUTPUT, BATCHES = 128, 128, (1, 8)
ROWS = (
    "full_prec", "int8_wo", "int8", "int8_sq", "fp8", "fp8_block", "int4_wo", "int4_gptq",
    "int4_gptq --auto_quantize_bits 5.0", "int4_awq", "w4a8_awq", "nvfp4", "full_prec --kv_cache_dtype int8",
    "full_prec --kv_cache_dtype fp8", "full_prec --kv_cache_dtype fp8 --kv_cache_dtype_skip_layers 1,2,4,10",
)  # fmt: skip


@dataclass
class Row:
    words: str
    folder: Path
    seconds: float = 0.0  # to quantize
    report: dict[str, Any] = field(default_factory=dict)  # of slipstream quantize
    speeds: dict[int, float] = field(default_factory=dict)  # tokens a second, by batch size
    failed: str = ""

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint"

    @property
    def engine(self) -> Path:
        return self.folder / "engine"


class Table:
    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self._arguments, self._began = arguments, time.monotonic()
        self._rows = [Row(words, folder / str(index)) for index, words in enumerate(arguments.rows.split(";"))]
        self._writes = threading.Lock()

    def make(self) -> bool:
        """-> whether every row is whole."""
        with ThreadPoolExecutor(self._arguments.jobs) as threads:
            list(threads.map(self._prepare, self._rows))
        for row in self._rows:
            self._measure(row)
        print("\n" + self.text(), flush=True)
        return not any(row.failed for row in self._rows)

    def _prepare(self, row: Row) -> None:
        arguments, start = self._arguments, time.monotonic()
        try:
            self._slipstream(
                row, "quantize", "--model_dir", arguments.model, "--output_dir", str(row.checkpoint), "--calib_size",
                str(arguments.calib_size), "--qformat", *row.words.split(), *arguments.options.split(),
            )  # fmt: skip
            row.seconds = time.monotonic() - start
            row.report = json.loads((row.checkpoint / REPORT_FILE).read_text())
            self._tell(f"{row.words}: {cells(row)}")
            if not arguments.no_speed:
                self._slipstream(
                    row, "build", "--checkpoint_dir", str(row.checkpoint), "--output_dir", str(row.engine),
                    "--max_batch_size", str(max(BATCHES)), "--max_num_tokens", str(INPUT * max(BATCHES)),
                    "--max_seq_len", str(INPUT + OUTPUT),
                )  # fmt: skip
                self._tell(f"{row.words}: built")
        except (OSError, RuntimeError) as error:
            self._fail(row, error)

    def _measure(self, row: Row) -> None:
        if row.failed or self._arguments.no_speed:
            return
        found = row.folder / "speed.json"
        try:
            if self._arguments.jobs > 1:
                (row.engine / CACHE_FILE).unlink()  # measured while others were
            self._slipstream(
                row, "bench", "latency", "--engine_dir", str(row.engine), "--input_output_len", f"{INPUT},{OUTPUT}",
                "--batch_size", ";".join(map(str, BATCHES)), "--warm_up", "2", "--num_runs",
                str(self._arguments.rounds), "--json", str(found),
            )  # fmt: skip
            cases = json.loads(found.read_text())["cases"]
            row.speeds = {case["batch_size"]: case["generation_tokens_per_second"] for case in cases}
            self._tell(f"{row.words}: {cells(row)}")
        except (OSError, RuntimeError) as error:
            self._fail(row, error)

    def _slipstream(self, row: Row, *words: str) -> None:
        """Raises RuntimeError where the command fails or no time is left."""
        left = self._arguments.within - (time.monotonic() - self._began)
        command = [sys.executable, "-m", "slipstream", *words, "--device", self._arguments.device]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=max(0.1, left))
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"slipstream {words[0]} had no time left") from None
        if done.returncode:
            print(done.stderr[-4000:], flush=True)
            said = (done.stderr.strip() or "nothing").splitlines()[-1]
            raise RuntimeError(f"slipstream {words[0]} ended with {done.returncode}: {said}")

    def _fail(self, row: Row, error: Exception) -> None:
        row.failed = str(error)
        self._tell(f"{row.words}: {error}")

    def _tell(self, what: str) -> None:
        with self._writes:
            print(f"{time.monotonic() - self._began:4.0f} s  {what}", flush=True)
            made = {"device": device_name(self._arguments.device), "settings": vars(self._arguments)}
            rows = [
                {"row": row.words, "seconds": row.seconds, "tokens_per_second": row.speeds, "failed": row.failed,
                 "report": row.report} for row in self._rows
            ]  # fmt: skip
            text = json.dumps(made | {"rows": rows}, indent=1, default=str)
            (self._arguments.json / "quantization.json").write_text(text + "\n")

    def text(self) -> str:
        columns = (
            "qformat", "size", "perplexity", "KL, nats a token", "same most probable token", "worst layers",
            "to quantize", *(f"tokens/s, {size} at once" for size in BATCHES),
        )  # fmt: skip
        lines = [" | ".join(columns), " | ".join(["---"] * len(columns))]
        lines += [f"{row.words} | {cells(row)}" for row in self._rows if row.report]
        lines = [f"| {line} |" for line in lines]
        return "\n".join([*lines, *(f"{row.words}: {row.failed}" for row in self._rows if row.failed)])


def cells(row: Row) -> str:
    report, quality = row.report, row.report["quality"]
    size, reference = report["bytes"], report["reference_bytes"]
    worst = ", ".join(f"{each['layer']} ({each['error']:.1%})" for each in quality["worst_layers"][:3])
    return " | ".join((
        f"{human_bytes(size)} ({size / reference:.0%})",
        f"{quality['perplexity']:.3f} ({quality['perplexity_change_percent']:+.2f} %)",
        f"{quality['kl_nats']:.4f}", f"{quality['top1_agreement']:.1%}", worst, f"{row.seconds:.0f} s",
        *(f"{row.speeds[size]:.0f}" if size in row.speeds else "" for size in BATCHES),
    ))  # fmt: skip


def device_name(device: str) -> str:
    return describe_device(torch.device(device))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="folder for quantization.json")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", default=";".join(ROWS), help="what follows --qformat, with ; between them")
    parser.add_argument("--calib_size", type=int, default=32)
    parser.add_argument("--options", default="--dtype bfloat16", help="of slipstream quantize, for every row")
    parser.add_argument("--rounds", type=int, default=4, help="that are measured of each batch, after two others")
    parser.add_argument(
        "--jobs", type=int, default=0, help="rows prepared at once [1; on a GPU half the cores, 8 at most]"
    )
    parser.add_argument("--within", type=float, default=24 * 3600.0, help="seconds after which nothing more begins")
    parser.add_argument("--no_speed", action="store_true", help="quality and size alone")
    arguments = parser.parse_args()
    arguments.jobs = arguments.jobs or (1 if arguments.device == "cpu" else max(1, min(8, (os.cpu_count() or 1) // 2)))
    arguments.json.mkdir(parents=True, exist_ok=True)
    print(
        f"{device_name(arguments.device)}, load average {os.getloadavg()[0]:.1f}, {arguments.jobs} at once", flush=True
    )
    with tempfile.TemporaryDirectory() as folder:
        return int(not Table(arguments, Path(folder)).make())


if __name__ == "__main__":
    sys.exit(main())
