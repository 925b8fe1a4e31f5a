"""Station 2: a model becomes a checkpoint of fewer bits, and what that costs is measured.

from slipstream.quantize import quantize

report = quantize("smollm2", "checkpoints/smollm2-awq", qformat="int4_awq")
print(report["quality"]["perplexity_change_percent"])
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slipstream.checkpoint import Checkpoint
    from slipstream.quantize.apply import Result
    from slipstream.quantize.texts import Texts

HELD_OUT = 16  # texts to judge by, unless another number is asked for


def quantize(
    model: str | Path,
    output_dir: str | Path,
    *,
    calib_size: int = 128,
    calib_dataset: str | Path | None = None,
    calib_max_seq_length: int = 512,
    dtype: str = "auto",
    export_format: str = "slipstream",
    device: str = "auto",
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
    **settings: Any,
) -> dict[str, Any]:
    """Write a quantized checkpoint folder; returns its quantization_report.json. A killed call goes on where it was.

    calib_size, calib_dataset, calib_max_seq_length: texts to calibrate with, whose file they are of (.txt, .jsonl; or
    what Python brings along), and tokens of each. export_format: "slipstream", or "hf" for a Hugging Face folder.
    settings: of quantize/apply.py: Settings; qformat at least.

    Raises ModelError for what cannot be, and CapacityError where memory does not suffice.
    """
    from slipstream.build.cache import device_for
    from slipstream.quantize.apply import Settings, quantize_model
    from slipstream.quantize.report import report_of, write_report
    from slipstream.quantize.texts import texts_for

    wanted, where = Settings(**settings), device_for(device)
    dataset = None if calib_dataset is None else Path(calib_dataset)
    used: list[Texts] = []
    report: dict[str, Any] = {}

    def texts_of(checkpoint: "Checkpoint") -> "Texts":
        used.append(
            texts_for(checkpoint, dataset, num_calibration=calib_size, length=calib_max_seq_length, seed=wanted.seed)
        )
        return used[0]

    def describe(folder: Path, result: "Result") -> None:
        report.update(report_of(str(model), result, wanted, used[0], where))
        write_report(folder, report)

    quantize_model(
        model, output_dir, texts_of, wanted, dtype=dtype, export_format=export_format, device=where, progress=progress,
        describe=describe,
    )  # fmt: skip
    return report


__all__ = ["quantize"]
