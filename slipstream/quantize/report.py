"""quantization_report.json and the model card: what was done to a model, and what it cost."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from slipstream import __version__
from slipstream.errors import ModelError
from slipstream.kernels.registry import known_ops
from slipstream.quantize.apply import Result, Settings
from slipstream.quantize.qformats import qformat_of
from slipstream.quantize.texts import Texts
from slipstream.schema.units import human_bytes

REPORT_FILE, CARD_FILE = "quantization_report.json", "README.md"


def report_of(name: str, result: Result, settings: Settings, texts: Texts, device: torch.device) -> dict[str, Any]:
    """device: that the numbers were found on, and where they are taken to run."""
    num_calibration, length = texts.calibration.shape
    return {
        "model": name,
        "slipstream": __version__,
        "settings": asdict(settings),
        "text": {"calibration": num_calibration, "length": length, "digest": texts.digest},
        "bytes": result.num_bytes,
        "formats": result.num_by_kind,
        "device": device.type,
        "widened": [kind for kind in result.num_by_kind if _is_widened(kind, device)],
        "reference_bytes": result.reference_num_bytes,
        "quality": result.quality.summary(),
    }


def _is_widened(kind: str, device: torch.device) -> bool:
    """No kernel here multiplies such numbers as they are: each product makes others of the whole weight first."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    return [*known_ops()[f"linear_{kind}"].candidates(device, dtype)] == ["reference"]


def rows_of(report: dict[str, Any]) -> Sequence[tuple[str, str]]:
    """What a reader wants to know, a line each."""
    title = qformat_of(report["settings"]["qformat"]).title
    kinds = ", ".join(f"{kind} ({count})" for kind, count in report["formats"].items())
    widened = ", ".join(report["widened"])
    return (
        ("format", title),
        ("weights by format", kinds),
        *([("slow here", f"no kernel of a {report['device']} multiplies {widened} as it is")] if widened else ()),
        size_row(report),
        *quality_rows(report["quality"]),
    )


def size_row(report: dict[str, Any]) -> tuple[str, str]:
    size, reference = report["bytes"], report["reference_bytes"]
    return "size", f"{human_bytes(reference)} → {human_bytes(size)} ({100 * size / reference:.0f} %)"


def quality_rows(quality: dict[str, Any]) -> Sequence[tuple[str, str]]:
    """quality: a Quality's summary."""
    worst = ", ".join(f"{each['layer']} ({100 * each['error']:.1f} %)" for each in quality["worst_layers"])
    return (
        (
            "perplexity",
            f"{quality['reference_perplexity']:.3f} → {quality['perplexity']:.3f} "
            f"({quality['perplexity_change_percent']:+.2f} %)",
        ),
        ("KL divergence", f"{quality['kl_nats']:.4f} nats a token"),
        ("same most probable token", f"{100 * quality['top1_agreement']:.1f} %"),
        ("worst layers (error of their results)", worst or "the models have different ones"),
        ("judged on", f"{quality['tokens']} tokens that were held out"),
    )


def write_report(folder: Path, report: dict[str, Any]) -> None:
    write_json(folder / REPORT_FILE, report)
    lines = [f"# {report['model']}, {report['settings']['qformat']}", "", "| | |", "| --- | --- |"]
    lines += [f"| {name} | {value} |" for name, value in rows_of(report)]
    lines += ["", f"Quantized by Slipstream {report['slipstream']}; all numbers are in {REPORT_FILE}.", ""]
    (folder / CARD_FILE).write_text("\n".join(lines))


def write_json(path: Path, report: dict[str, Any]) -> None:
    """Raises ModelError where that cannot be."""
    try:
        path.write_text(json.dumps(report, indent=1) + "\n")
    except OSError as error:
        raise ModelError(f"{path} cannot be written ({error.strerror}); give another file.") from None
