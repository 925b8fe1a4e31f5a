"""Choices: which kernel computes which op at how many rows. The engine's `model.cache`, measured on one device."""

import json
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from slipstream.engine.bounded_json import read_json
from slipstream.engine.graph import Node, TensorType
from slipstream.errors import SlipstreamError

ROW_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)  # a larger step takes the last one's choice


def bucket_of(num_rows: int) -> int:
    """Index of the smallest bucket that holds this many rows."""
    return min(bisect_left(ROW_BUCKETS, num_rows), len(ROW_BUCKETS) - 1)


def key_of(node: Node, types: Mapping[str, TensorType]) -> str:
    """What a measurement depends on: the op and what its inputs look like."""
    return f"{node.op}({', '.join('-' if name is None else str(types[name]) for name in node.inputs)})"


@dataclass(frozen=True)
class Choices:
    device: str  # name, thread count and library versions: measurements elsewhere do not count here
    kernels: dict[str, list[str]] = field(default_factory=dict)  # key_of → a kernel's name for each bucket

    def save(self, path: Path) -> None:
        partial = path.with_name(path.name + ".partial")
        partial.write_text(json.dumps({"device": self.device, "kernels": self.kernels}, indent=1) + "\n")
        partial.replace(path)


def load_choices(path: Path, device: str) -> Choices | None:
    """The stored choices, or None where there are none for this device (tune again; the weights stay good)."""
    try:
        values = read_json(path)
        kernels = values["kernels"]
        ok = values["device"] == device and all(
            isinstance(names, list) and len(names) == len(ROW_BUCKETS) and all(isinstance(name, str) for name in names)
            for names in kernels.values()
        )
    except (SlipstreamError, KeyError, TypeError, AttributeError):
        return None
    return Choices(device, kernels) if ok else None
