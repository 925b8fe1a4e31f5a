"""Mixtures of experts on the GPU against float64: each format, routing, number of tokens and way to cut products up."""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from slipstream.kernels.linear.groups import dequantize
from slipstream.kernels.linear.w4a16 import pack
from slipstream.kernels.registry import known_ops
from slipstream.schema.format import INTEGERS_OF_4_BITS, QUANTIZES_ACTIVATIONS
from tests.seed import SEED

grouped = pytest.importorskip("slipstream.kernels.triton.experts")

IS_GPU = torch.cuda.is_available()
HALF = torch.bfloat16 if IS_GPU else torch.float16  # the interpreter multiplies the bits of bfloat16s
FORMATS = {  # columns of a weight that share a scale, of an activation, and whether there are zero points
    "dense": (0, 0, False),
    "w4a16": (32, 0, False),
    "w4a16 zeros": (64, 0, True),
    "w8a16": (0, 0, False),
    "w8a16 zeros": (32, 0, True),
    "fp8a16": (64, 0, False),
    "w8a8": (0, 0, False),
    "fp8": (0, 0, False),
    "fp8 blocks": (32, 32, False),
    "w4afp8": (32, 0, False),
    "w4a16 odd groups": (24, 0, True),
    "w8a8 odd groups": (24, 0, False),
}
# Tokens, and where they go.
CASES = [(1, "any"), (7, "few experts"), (13, "any"), (13, "one expert"), (5, "elsewhere"), (13, "elsewhere")]
PLAIN, GPT_OSS = (1.0, 0.0, 0.0), (1.702, 1.5, 1.0)
SIZES = [(5, 3, 96, 64), (3, 2, 36, 20)]  # E, K, H, I
if IS_GPU:
    CASES += [(64, "any"), (1000, "any"), (300, "one expert")]
    SIZES += [(128, 8, 2048, 768)]


class Problem:
    """The arguments of `experts` or of a packed form of it, and the same weights in float64."""

    def __init__(
        self, name: str, num_tokens: int, sizes: tuple[int, int, int, int], device: torch.device, routing: str = "any",
        activation: tuple[float, float, float] = GPT_OSS, dtype: torch.dtype = HALF,
    ) -> None:  # fmt: skip
        self.generator = torch.Generator().manual_seed(SEED)
        self.kind, (group, x_group, has_zeros) = name.split()[0], FORMATS[name]
        num_experts, top_k, hidden_size, width = sizes
        x_TH = torch.randn(num_tokens, hidden_size, generator=self.generator).to(device, dtype)
        shares_TK = torch.rand(num_tokens, top_k, generator=self.generator).to(device)
        drawn_TE = torch.rand(num_tokens, num_experts, generator=self.generator)
        if routing != "any":
            drawn_TE += torch.arange(num_experts)  # all tokens go to the first ones
        ids_TK = drawn_TE.argsort(1)[:, :top_k]
        if routing == "elsewhere":  # with another rank, for some
            ids_TK = ids_TK.where(ids_TK % 2 == 0, -1)
        if routing == "one expert":  # no router does, but nothing says that a token's experts differ
            ids_TK = torch.full_like(ids_TK, num_experts - 2)
        self.ids_TK = ids_TK.to(device)
        parts, self.weights = list[Tensor | None](), list[Tensor]()
        for num_out, num_in in ((width, hidden_size), (width, hidden_size), (hidden_size, width)):
            stored, weight_ENK = self.stack((num_experts, num_out, num_in), group, has_zeros, dtype)
            parts += [None if part is None else part.to(device) for part in stored]
            self.weights.append(weight_ENK.to(device))
        has_bias = activation == GPT_OSS
        biases = [
            torch.randn(num_experts, num_out, generator=self.generator).to(device, dtype) if has_bias else None
            for num_out in (width, width, hidden_size)
        ]
        self.arguments: tuple[Any, ...] = (x_TH, shares_TK, self.ids_TK, *parts, *biases, *activation)
        self.op = known_ops()["experts" if self.kind == "dense" else f"experts_{self.kind}"]
        self.rounding = known_ops().get(f"quantize_{QUANTIZES_ACTIVATIONS.get(self.kind)}")
        self.x_group, self.biases, self.activation = x_group, biases, activation
        if self.kind != "dense":
            self.arguments += (group, 0.0, x_group)

    def stack(
        self, shape: tuple[int, int, int], group: int, has_zeros: bool, dtype: torch.dtype
    ) -> tuple[list[Tensor | None], Tensor]:
        """The parts of a stack of weights, and the weights in float64."""
        num_experts, num_out, num_in = shape
        normal_ENK = torch.randn(shape, generator=self.generator) / num_in**0.5
        if self.kind == "dense":
            return [normal_ENK.to(dtype)], normal_ENK.to(dtype).double()
        low, high, packed_type = (-128, 128, torch.int8) if self.kind[:2] == "w8" else (0, 16, torch.uint8)
        groups = (num_experts, num_out, -(-num_in // group) if group else 1)
        scale_ENG = (torch.rand(groups, generator=self.generator) + 0.5) / num_in**0.5 / (high / 2)
        zero_ENG = torch.randint(low, high, groups, generator=self.generator).to(packed_type) if has_zeros else None
        if self.kind.startswith("fp8"):
            values_ENK = torch.randn(shape, generator=self.generator).to(torch.float8_e4m3fn)
        else:
            values_ENK = torch.randint(low, high, shape, generator=self.generator).to(packed_type)
        zeros_ENG = torch.full_like(scale_ENG, 8) if self.kind in INTEGERS_OF_4_BITS and zero_ENG is None else zero_ENG
        weight_ENK = [
            dequantize(values_ENK[e], scale_ENG[e], None if zeros_ENG is None else zeros_ENG[e], group)
            for e in range(num_experts)
        ]
        packed = torch.stack([pack(each) for each in values_ENK]) if self.kind in INTEGERS_OF_4_BITS else values_ENK
        return [packed, scale_ENG, zero_ENG], torch.stack(weight_ENK).double()

    def rounded(self, x_MK: Tensor) -> Tensor:
        if self.rounding is None:
            return x_MK
        values_MK, scale_MG = self.rounding.reference(x_MK.float(), 0.0, self.x_group)
        return dequantize(values_MK, scale_MG, None, self.x_group).double()

    def expected(self) -> Tensor:
        x_TH, shares_TK = self.arguments[0].double(), self.arguments[1].double()
        alpha, limit, up_offset = self.activation
        out_TH = torch.zeros_like(x_TH)
        gate, up, down = self.weights
        for e in range(len(gate)):
            token, k = (self.ids_TK == e).nonzero(as_tuple=True)
            x_RH = self.rounded(x_TH[token])
            g, u = x_RH @ gate[e].t(), x_RH @ up[e].t()
            if self.biases[0] is not None:
                g, u = g + self.biases[0][e].double(), u + self.biases[1][e].double()
            if limit:
                g, u = g.clamp(max=limit), u.clamp(-limit, limit)
            hidden = g * torch.sigmoid(alpha * g) * (u + up_offset)
            y_RH = self.rounded(hidden.to(self.arguments[0].dtype).double()) @ down[e].t()
            if self.biases[2] is not None:
                y_RH = y_RH + self.biases[2][e].double()
            out_TH.index_add_(0, token, y_RH * shares_TK[token, k, None])
        return out_TH

    def run(self) -> Tensor:
        out_TH = self.op.kernels["triton"].function(*self.arguments)
        assert isinstance(out_TH, Tensor) and out_TH.dtype == self.arguments[0].dtype
        return out_TH

    def error(self, out_TH: Tensor) -> float:
        expected_TH = self.expected()
        return float((out_TH.double() - expected_TH).norm() / expected_TH.norm())


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """torch.empty gives NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer pairs are many; and the interpreter's own conversion to E4M3 loses a carry into the exponent."""
    if not IS_GPU:
        monkeypatch.setattr(grouped, "_FEW_PAIRS", 24)
        quantize = known_ops()["quantize_fp8"]
        exact = replace(quantize.kernels["triton"], batch_invariant=quantize.reference)
        monkeypatch.setitem(quantize.kernels, "triton", exact)


def tolerance(name: str) -> float:
    """Of hidden numbers rounded to 8 bits a few are next to a tie, and become the neighbour."""
    return 2e-2 if name.split()[0] in QUANTIZES_ACTIVATIONS else 1e-2 if IS_GPU or "odd" in name else 2e-3


@pytest.mark.parametrize(
    ("name", "num_tokens", "routing"),
    [(name, *case) for name in FORMATS for case in CASES if IS_GPU or name in ("dense", "w4a16") or case[0] == 7],
)
def test_experts_are_those_of_float64(name: str, num_tokens: int, routing: str, device: torch.device) -> None:
    """The sum is the same every time."""
    for sizes in SIZES:
        problem = Problem(name, num_tokens, sizes, device, routing, PLAIN if num_tokens == 1 else GPT_OSS)
        out_TH = problem.run()
        assert problem.error(out_TH) < tolerance(name), f"{sizes}, seed {SEED}"
    assert torch.equal(out_TH, problem.run())


@pytest.mark.parametrize("num_tokens", [0, 1, 13])
def test_dense_experts_in_float32(num_tokens: int, device: torch.device) -> None:
    for sizes in SIZES:
        problem = Problem("dense", num_tokens, sizes, device, dtype=torch.float32)
        out_TH = problem.run()
        assert out_TH.shape == problem.arguments[0].shape
        assert not num_tokens or problem.error(out_TH) < 1e-5, f"{sizes}, seed {SEED}"


@pytest.mark.parametrize("num_tokens", [3, 13])
@pytest.mark.parametrize("name", ["dense", "w8a8"])
def test_rows_that_are_padding_disturb_no_other(name: str, num_tokens: int, device: torch.device) -> None:
    problem = Problem(name, num_tokens, SIZES[0], device)
    out_TH = problem.run()
    problem.arguments[0][1] = math.nan
    with_nan_TH = problem.run()
    others = [row for row in range(num_tokens) if row != 1]
    assert torch.equal(with_nan_TH[others], out_TH[others])


@pytest.mark.parametrize(("num_tokens", "pairs"), [(4, 16), (13, 32)])
@pytest.mark.parametrize("name", ["dense", "w4a16", "fp8 blocks"])
def test_any_way_to_cut_products_up(
    name: str, num_tokens: int, pairs: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Columns in parts, the last of which ends after them; weights on the left; tiles wider than the weight."""
    Tiles = grouped.Tiles
    for gate_and_up, down in (
        (Tiles(32, 64), Tiles(16, 64, splits=2)),
        (Tiles(64, 64, is_swapped=True), Tiles(64, 32, splits=4, is_swapped=True)),
    ):
        plan = grouped.Plan(pairs, gate_and_up, down)
        monkeypatch.setattr(grouped, "choose_plan", lambda *_, plan=plan: plan)
        problem = Problem(name, num_tokens, SIZES[0], device)
        assert problem.error(problem.run()) < tolerance(name), f"seed {SEED}"
