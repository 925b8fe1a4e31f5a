"""Mixtures of experts on a GPU: ways to cut them up, checked and then timed against reading the chosen experts once.

    PYTHONPATH=. python benchmarks/gpu_experts.py [bf16] [fp8] [w4a16]

Calls are recorded into a CUDA graph over copies of the weights that no cache holds, as a step is; the median replay
counts. The floor is the bytes of the experts that tokens go to (routing is uniform, seeded by the time) at BANDWIDTH.
"""

import math
import multiprocessing
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from slipstream.kernels.linear.fp8 import quantize_fp8
from slipstream.kernels.linear.parts import dense_weight
from slipstream.kernels.triton.experts import Activation, Plan, choose_plan, experts
from slipstream.kernels.triton.linear import Tiles, Weight
from slipstream.schema.format import WeightFormat

BANDWIDTH = 3.03e12
COLD_BYTES, MOST_BYTES, CALLS, REPLAYS = 160 << 20, 24 << 30, 12, 7
SEED = time.time_ns() % 2**31
NUM_TOKENS = (1, 8, 64, 1024)
SWIGLU = Activation(1.0, 0.0, 0.0)


@dataclass(frozen=True)
class Model:
    num_experts: int
    top_k: int
    hidden_size: int
    width: int
    activation: Activation = SWIGLU


MODELS = {
    "mixtral-8x7b": Model(8, 2, 4096, 14336),
    "qwen3-30b-a3b": Model(128, 8, 2048, 768),
    "gpt-oss-20b": Model(32, 4, 2880, 2880, Activation(1.702, 7.0, 1.0)),
}
GROUPS = {"bf16": 0, "fp8": 0, "w4a16": 128}
DECODE = {
    "bf16": [
        Plan(16, Tiles(32, 256), Tiles(16, 256)),
        Plan(16, Tiles(32, 256), Tiles(32, 256, splits=2)),
        Plan(16, Tiles(64, 128, is_swapped=True), Tiles(64, 128, splits=2, is_swapped=True)),
        Plan(16, Tiles(64, 256, stages=3, is_swapped=True), Tiles(64, 256, splits=2, stages=3, is_swapped=True)),
    ],
    "fp8": [
        Plan(16, Tiles(32, 512, stages=3), Tiles(32, 256)),
        Plan(16, Tiles(64, 256, is_swapped=True), Tiles(64, 256, splits=2, is_swapped=True)),
        Plan(16, Tiles(64, 128, stages=5, is_swapped=True), Tiles(64, 128, splits=2, stages=5, is_swapped=True)),
    ],
    "w4a16": [
        Plan(16, Tiles(32, 128, stages=6), Tiles(32, 128, stages=6)),
        Plan(16, Tiles(32, 128, stages=6), Tiles(32, 128, splits=2, stages=6)),
        Plan(16, Tiles(64, 128, stages=6), Tiles(64, 128, splits=2, stages=6)),
    ],
}  # fmt: skip
PROMPT = {
    "bf16": [
        Plan(64, Tiles(128, 64), Tiles(128, 64)),
        Plan(128, Tiles(128, 64, warps=8, stages=4), Tiles(128, 64, warps=8, stages=4)),
    ],
    "fp8": [Plan(64, Tiles(128, 128), Tiles(128, 128)), Plan(128, *[Tiles(128, 128, warps=8, stages=3)] * 2)],
    "w4a16": [Plan(64, Tiles(64, 128, stages=3), Tiles(64, 128, stages=3))],
}


class Case:
    def __init__(self, kind: str, name: str, num_tokens: int, copies: int) -> None:
        self.kind, self.name, self.model, self.num_tokens = kind, name, MODELS[name], num_tokens
        self.generator = torch.Generator("cuda").manual_seed(SEED)
        model = self.model
        self.x_TH = self.normal(num_tokens, model.hidden_size)
        scores_TE = torch.rand(num_tokens, model.num_experts, generator=self.generator, device="cuda")
        self.shares_TK, self.ids_TK = scores_TE.softmax(1).topk(model.top_k, 1)
        self.weights = [self.stacks() for _ in range(copies)]
        self.plans = [self.default(), *(DECODE if self.rows <= 16 else PROMPT)[kind]]

    @property
    def rows(self) -> float:
        return self.ids_TK.numel() / self.model.num_experts

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, device="cuda", dtype=torch.bfloat16)

    def stacks(self) -> tuple[Weight, ...]:
        hidden_size, width = self.model.hidden_size, self.model.width
        return tuple(self.stack(*shape) for shape in ((width, hidden_size), (width, hidden_size), (hidden_size, width)))

    def stack(self, num_out: int, num_in: int) -> Weight:
        num_experts, group = self.model.num_experts, GROUPS[self.kind]
        if self.kind == "bf16":
            return Weight(self.normal(num_experts, num_out, num_in) * num_in**-0.5)
        groups = (num_experts, num_out, math.ceil(num_in / group) if group else 1)
        scale_ENG = (torch.rand(groups, generator=self.generator, device="cuda") + 0.5) * num_in**-0.5
        if self.kind == "fp8":
            return Weight(self.normal(num_experts, num_out, num_in).to(torch.float8_e4m3fn), scale_ENG)
        packed = torch.empty(num_experts, num_out, num_in // 2, dtype=torch.uint8, device="cuda")
        return Weight(packed.random_(generator=self.generator), scale_ENG / 4, None, group)

    def quantize(self, x_MK: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.kind != "fp8":
            return x_MK, None
        return quantize_fp8.kernels["triton"].function(x_MK, 0.0, 0)

    def default(self) -> Plan:
        x_type = torch.float8_e4m3fn if self.kind == "fp8" else torch.bfloat16
        gate, sizes = self.weights[0][0], (self.model.hidden_size, self.model.width)
        return choose_plan(self.ids_TK.numel(), self.model.num_experts, *sizes, gate, x_type)

    def run(self, plan: Plan, copy: int = 0) -> Tensor:
        return experts(
            self.x_TH, self.shares_TK, self.ids_TK, self.weights[copy], (None,) * 3, self.model.activation,
            self.quantize, plan,
        )  # fmt: skip

    def floor(self) -> float:
        """Bytes of the experts that are read, and of activations once in and once out."""
        chosen = len(self.ids_TK.unique()) / self.model.num_experts
        stored = sum(part.nbytes for weight in self.weights[0] for part in weight[:3] if part is not None)
        return chosen * stored + 2 * self.x_TH.nbytes

    def flops(self) -> float:
        return 6 * self.ids_TK.numel() * self.model.hidden_size * self.model.width

    def expected(self) -> Tensor:
        """In float32, of the numbers as they are stored, activations rounded as the format does."""
        out_TH = torch.zeros(self.x_TH.shape, device="cuda")
        alpha, limit, up_offset = self.model.activation
        for expert in self.ids_TK.unique().tolist():
            token, k = (self.ids_TK == expert).nonzero(as_tuple=True)
            gate, up, down = (self.dense(weight, expert) for weight in self.weights[0])
            x_RH = self.rounded(self.x_TH[token])
            g, u = x_RH @ gate.t(), x_RH @ up.t()
            if limit:
                g, u = g.clamp(max=limit), u.clamp(-limit, limit)
            hidden = self.rounded((g * torch.sigmoid(alpha * g) * (u + up_offset)).bfloat16())
            out_TH.index_add_(0, token, hidden @ down.t() * self.shares_TK[token, k, None])
        return out_TH

    def dense(self, weight: Weight, expert: int) -> Tensor:
        packed, scale_NG = weight.packed[expert], weight.scale_NG
        if scale_NG is None:
            return packed.float()
        num_in = packed.shape[1] * (2 if self.kind == "w4a16" else 1)
        format = WeightFormat(kind=self.kind, group_size=weight.group_size)
        return dense_weight(format, {"packed": packed, "scale": scale_NG[expert]}, num_in)

    def rounded(self, x_MK: Tensor) -> Tensor:
        values_MK, scale_MG = self.quantize(x_MK)
        return values_MK.float() if scale_MG is None else values_MK.float() * scale_MG


def describe(plan: Plan) -> str:
    def tiles(each: Tiles) -> str:
        split = f"/{each.splits}" if each.splits > 1 else ""
        return f"{'s' * each.is_swapped}{each.rows}x{each.columns}{split}w{each.warps}s{each.stages}"

    return f"{plan.pairs}: {tiles(plan.gate_and_up)} {tiles(plan.down)}"


def seconds(case: Case, plan: Plan) -> float:
    case.run(plan)
    torch.cuda.synchronize()
    calls = math.ceil(CALLS / len(case.weights)) * len(case.weights)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(calls):
            case.run(plan, index % len(case.weights))
    times = []
    for _ in range(REPLAYS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000 / calls)
    return statistics.median(times)


def error(case: Case, plan: Plan, expected_TH: Tensor) -> float:
    poison = torch.full((case.ids_TK.numel(), case.model.hidden_size), math.nan, device="cuda")
    del poison  # the allocator gives its memory to what is made next
    return float((case.run(plan).float() - expected_TH).norm() / expected_TH.norm())


def measure(kind: str, name: str, num_tokens: int) -> str:
    model = MODELS[name]
    stored = 3 * model.num_experts * model.hidden_size * model.width * {"bf16": 2, "fp8": 1, "w4a16": 0.5}[kind]
    chosen = stored * min(1.0, num_tokens * model.top_k / model.num_experts)
    copies = max(2, min(CALLS, math.ceil(COLD_BYTES / chosen), int(MOST_BYTES / stored)))
    label, start = f"{kind:6}{name:15}{num_tokens:5}", time.perf_counter()
    try:
        case = Case(kind, name, num_tokens, copies)
        expected_TH, floor = case.expected(), case.floor()
    except Exception as caught:
        return f"{label} {type(caught).__name__}: {' '.join(str(caught).split())[:120]}"
    best = (math.inf, "nothing ran")
    for index, plan in enumerate(case.plans):
        how = ("* " if not index else "  ") + describe(plan)
        try:
            wrong, took = error(case, plan, expected_TH), seconds(case, plan)
        except Exception as caught:
            print(f"{label} {how:44} {type(caught).__name__}: {' '.join(str(caught).split())[:100]}", flush=True)
            continue
        share = 100 * floor / BANDWIDTH / took
        numbers = f"{took * 1e6:9.1f} us {share:6.1f} %{case.flops() / took / 1e12:6.0f} TFLOP/s  error {wrong:.1e}"
        print(f"{label} {how:44}{numbers}", flush=True)
        if wrong < 1e-2:
            best = min(best, (took, f"{how:44}{took * 1e6:9.1f} us {share:6.1f} %"))
    return f"{label} {best[1]}   ({time.perf_counter() - start:.1f} s)"


def compile_ahead(job: tuple[str, str, int]) -> None:
    """Fills Triton's cache; one process a case."""
    try:
        case = Case(*job, copies=1)
    except Exception:
        return
    for plan in case.plans:
        try:
            case.run(plan)
        except Exception:
            continue


def jobs(kinds: list[str]) -> Iterator[tuple[str, str, int]]:
    for kind in kinds:
        for name in MODELS:
            yield from ((kind, name, num_tokens) for num_tokens in NUM_TOKENS)


def main() -> None:
    todo, start = list(jobs(sys.argv[1:] or list(GROUPS))), time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(8) as pool:
        pool.map(compile_ahead, todo, chunksize=1)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, compiled in {time.perf_counter() - start:.0f} s")
    print("*: the plan that shapes choose; share of the bytes' floor")
    best = [measure(*job) for job in todo]
    print("\nThe best of each:", *best, f"{time.perf_counter() - start:.0f} s in all", sep="\n")


if __name__ == "__main__":
    main()
