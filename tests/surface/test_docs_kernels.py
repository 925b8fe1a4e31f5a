"""docs/kernels.md: its tables name every op and every candidate there is, where each runs, and nothing else."""

import re
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch

import slipstream.kernels  # noqa: F401 - registers the ops
from slipstream.kernels.registry import known_ops
from slipstream.schema.build import MAX_RECORDED_TOKENS
from tests.surface.sources import ROOT

PAGE = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
CPU, GPU = torch.device("cpu"), torch.device("cuda")


class Row(NamedTuple):
    op: str
    waits: bool
    on_cpu: list[str]
    on_gpu: list[str]
    on_any_gpu: list[str]  # without those that need conversions to E4M3
    why: str


def rows() -> Iterator[Row]:
    for line in PAGE.splitlines():
        if not line.startswith("| `"):
            continue
        ops, on_cpu, on_gpu, why = (cell.strip() for cell in line.split("|")[1:-1])
        candidates = re.findall(r"`(\w+)`(†?)", on_gpu)
        for op, waits in re.findall(r"`(\w+)`( \(\*waits\*\))?", ops):
            yield Row(
                op, bool(waits), re.findall(r"`(\w+)`", on_cpu), [name for name, _ in candidates],
                [name for name, mark in candidates if not mark], why,
            )  # fmt: skip


ROWS = list(rows())


def test_every_op_has_a_row_and_no_other() -> None:
    known = {name for name, op in known_ops().items() if op.reference.__module__.startswith("slipstream.")}
    assert sorted(row.op for row in ROWS) == sorted(known)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.op)
def test_a_row_names_the_candidates_that_run_there(row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    op = known_ops()[row.op]
    assert row.waits == op.reads_values
    assert ["reference", *row.on_cpu] == list(op.candidates(CPU, torch.float32))
    for capability, expected in (((9, 0), row.on_gpu), ((8, 0), row.on_any_gpu)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None, found=capability: found)
        assert ["reference", *expected] == list(op.candidates(GPU, torch.bfloat16))
    assert row.why.endswith(".")


def test_what_the_page_links_is_there() -> None:
    links = re.findall(r"\]\(([^)]+)\)", PAGE)
    assert links
    for link in links:
        assert (ROOT / "docs" / link).is_file(), link


def test_the_largest_recorded_step_is_the_one_told() -> None:
    how_to = (ROOT / "docs" / "adding" / "kernel.md").read_text(encoding="utf-8")
    told = f"{MAX_RECORDED_TOKENS:,} tokens (`schema/build.py: MAX_RECORDED_TOKENS`) is recorded"
    assert told in PAGE and told in how_to
