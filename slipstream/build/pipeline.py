"""PASSES: the ordered list of rewrites. Top to bottom is the order they run in."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from slipstream.build import kv_cache, lower
from slipstream.build.passes import (
    dead_code,
    fold_constants,
    fold_scales,
    fuse_act_quant,
    fuse_add_norm,
    fuse_gate_up,
    fuse_norm_quant,
    fuse_panels_act,
    fuse_qkv,
    fuse_reduce_norm,
    fuse_rope_kv_write,
    last_token,
    pack_panels,
    renumber,
    share_weights,
)
from slipstream.build.verify import CAPTURED, FINAL, REWRITTEN, verify
from slipstream.engine.graph import Graph
from slipstream.errors import BuildError, SlipstreamError


class Pass(Protocol):
    """A name, the benefit in a few words, and run(): it rewrites the graph in place and returns how many places."""

    @property
    def name(self) -> str: ...
    @property
    def benefit(self) -> str: ...
    def run(self, graph: Graph) -> int: ...


FUSIONS: tuple[Pass, ...] = (
    # weights, before anything is made of them
    share_weights.PASS,
    fold_scales.PASS,
    # matrix products that share their input
    fuse_qkv.PASS,
    fuse_gate_up.PASS,
    # elementwise work joins its neighbour
    fuse_rope_kv_write.PASS,
    fuse_add_norm.PASS,
    # only what is asked for
    last_token.PASS,
)

LOWERING: tuple[Pass, ...] = (
    # every pass before has seen dense linears alone
    lower.PASS,
    kv_cache.PASS,
    # what quantized products read is quantized where it is made
    fuse_norm_quant.PASS,
    fuse_act_quant.PASS,
    # what ranks add up is read where it is normed
    fuse_reduce_norm.PASS,
    pack_panels.PASS,
    fuse_panels_act.PASS,
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


def run_pipeline(
    graph: Graph, *, promised: tuple[str, ...], disabled: tuple[str, ...], extra: Sequence[Pass] = (),
    sharing: Sequence[Pass] = (),
) -> list[PassReport]:  # fmt: skip
    """Rewrite a captured graph in place into one that an engine may hold.

    `promised` names the passes the model file vouches for: one that finds nothing is an error, not a log line.
    `sharing` makes it one rank's graph, before anything else (build/stages.py, build/shard.py).
    `extra` are a user's own: they see what the fusions made, and lowering and clean-up see what they made.
    """
    known = [each.name for each in (*FUSIONS, *LOWERING)]
    for name in disabled:
        if name not in known:
            raise BuildError(f"no pass to disable is called {name!r}; the passes are {', '.join(known)}.")
    verify(graph, CAPTURED)
    reports = [_run(each, graph) for each in sharing]
    reports += [_run(each, graph) for each in FUSIONS if each.name not in disabled]
    verify(graph, REWRITTEN)
    for report in reports:
        # Parts stored in different formats cannot be joined; a model that is not quantized has no such excuse.
        if report.name in promised and not report.matches and not graph.formats:
            raise BuildError(
                f"the pass {report.name} found nothing to rewrite in a model that promises it; "
                f"fix the model file, or disable the pass with --disable_pass {report.name}."
            )
    reports += [_run_extra(each, graph) for each in extra]
    reports += [_run(each, graph) for each in LOWERING if each.name not in disabled]
    reports += [_run(each, graph) for each in CLEAN_UP]
    verify(graph, FINAL)
    return reports


def _run_extra(each: Pass, graph: Graph) -> PassReport:
    """A user's pass: whatever it raises or leaves behind, the error names it."""
    if each.name in [known.name for known in (*FUSIONS, *LOWERING, *CLEAN_UP)]:
        raise BuildError(f"a pass of yours is called {each.name!r}, as one of Slipstream's own; give it another name.")
    expected = [graph.types[name] for name in graph.outputs]
    try:
        report = _run(each, graph)
        verify(graph, REWRITTEN)
        found = [graph.types[name] for name in graph.outputs]
        if found != expected:
            raise BuildError(f"its outputs became {', '.join(map(str, found))}, not {', '.join(map(str, expected))}.")
    except SlipstreamError as error:
        raise BuildError(f"the pass {each.name} broke the graph: {str(error).rstrip('.')}.") from None
    except Exception as error:
        raise BuildError(f"the pass {each.name} failed with {type(error).__name__}: {error}.") from None
    return report


def _run(each: Pass, graph: Graph) -> PassReport:
    before = len(graph.nodes)
    matches = each.run(graph)
    graph.check()
    return PassReport(each.name, each.benefit, matches, before, len(graph.nodes))
