"""PASSES: the ordered list of rewrites. Top to bottom is the order they run in."""

from dataclasses import dataclass
from typing import Protocol

from slipstream.build.passes import (
    dead_code,
    fold_constants,
    fuse_add_norm,
    fuse_gate_up,
    fuse_qkv,
    fuse_rope_kv_write,
    last_token,
    renumber,
)
from slipstream.build.verify import CAPTURED, FINAL, REWRITTEN, verify
from slipstream.engine.graph import Graph
from slipstream.errors import BuildError


class Pass(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def benefit(self) -> str: ...
    def run(self, graph: Graph) -> int: ...


FUSIONS: tuple[Pass, ...] = (
    # matrix products that share their input
    fuse_qkv.PASS,
    fuse_gate_up.PASS,
    # elementwise work joins its neighbour
    fuse_rope_kv_write.PASS,
    fuse_add_norm.PASS,
    # only what is asked for
    last_token.PASS,
)

CLEAN_UP: tuple[Pass, ...] = (
    fold_constants.PASS,
    dead_code.PASS,
    # names last, when nothing is made or moved any more
    renumber.PASS,
)


@dataclass(frozen=True)
class PassReport:
    name: str
    benefit: str
    matches: int
    ops_before: int
    ops_after: int


def run_pipeline(graph: Graph, *, promised: tuple[str, ...], disabled: tuple[str, ...]) -> list[PassReport]:
    """Rewrite a captured graph in place into one that an engine may hold.

    `promised` names the passes the model file vouches for: one that finds nothing is an error, not a log line.
    """
    known = [each.name for each in FUSIONS]
    for name in disabled:
        if name not in known:
            raise BuildError(f"no pass to disable is called {name!r}; the passes are {', '.join(known)}.")
    verify(graph, CAPTURED)
    reports = [_run(each, graph) for each in FUSIONS if each.name not in disabled]
    verify(graph, REWRITTEN)
    for report in reports:
        if report.name in promised and not report.matches:
            raise BuildError(
                f"the pass {report.name} found nothing to rewrite in a model that promises it; "
                f"fix the model file, or disable the pass with --disable_pass {report.name}."
            )
    reports += [_run(each, graph) for each in CLEAN_UP]
    verify(graph, FINAL)
    return reports


def _run(each: Pass, graph: Graph) -> PassReport:
    before = len(graph.nodes)
    matches = each.run(graph)
    graph.check()
    return PassReport(each.name, each.benefit, matches, before, len(graph.nodes))
