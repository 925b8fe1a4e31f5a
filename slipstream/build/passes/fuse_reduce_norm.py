"""For GPUs, what ranks add up is read by the norm that goes on with it: the sum itself is never written."""

from slipstream.build.example import trace
from slipstream.build.rewrite import Rewrite, Rule, Symbol, ops
from slipstream.engine.graph import Graph


def rules(is_first: bool) -> tuple[Rule, ...]:
    """is_first: what is added up comes before the residual in their sum."""

    def summands(x: Symbol, residual: Symbol) -> tuple[Symbol, Symbol]:
        added_up = ops.all_reduce(x)
        return (added_up, residual) if is_first else (residual, added_up)

    def plain(x: Symbol, residual: Symbol, weight: Symbol, eps: Symbol, offset: Symbol) -> tuple[Symbol, ...]:
        return ops.add_rms_norm(*summands(x, residual), weight, eps=eps, weight_offset=offset)

    def plain_reduced(x: Symbol, residual: Symbol, weight: Symbol, eps: Symbol, offset: Symbol) -> tuple[Symbol, ...]:
        return ops.reduce_add_rms_norm(x, residual, weight, eps=eps, weight_offset=offset)

    def quantized(
        x: Symbol, residual: Symbol, weight: Symbol, eps: Symbol, offset: Symbol, scale: Symbol, group: Symbol,
        dtype: Symbol,
    ) -> tuple[Symbol, ...]:  # fmt: skip
        how = {"input_scale": scale, "input_group_size": group, "dtype": dtype}
        return ops.add_rms_norm_quantize(*summands(x, residual), weight, eps=eps, weight_offset=offset, **how)

    def quantized_reduced(
        x: Symbol, residual: Symbol, weight: Symbol, eps: Symbol, offset: Symbol, scale: Symbol, group: Symbol,
        dtype: Symbol,
    ) -> tuple[Symbol, ...]:  # fmt: skip
        how = {"input_scale": scale, "input_group_size": group, "dtype": dtype}
        return ops.reduce_add_rms_norm_quantize(x, residual, weight, eps=eps, weight_offset=offset, **how)

    return Rule(plain, plain_reduced), Rule(quantized, quantized_reduced)


class FuseReduceNorm(Rewrite):
    def run(self, graph: Graph) -> int:
        """A CPU's norm is part of a longer native call."""
        return 0 if graph.is_for_cpu else super().run(graph)


PASS = FuseReduceNorm("fuse_reduce_norm", "one launch instead of two where ranks meet", (*rules(True), *rules(False)))


def example() -> Graph:
    def block(x: Symbol, residual: Symbol, weight: Symbol) -> tuple[Symbol, ...]:
        return ops.add_rms_norm(residual, ops.all_reduce(x), weight, eps=1e-5, weight_offset=0.0)

    return trace(block, inputs={"x": ("T", 8), "residual": ("T", 8)}, weights={"weight": (8,)})
