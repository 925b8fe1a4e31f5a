"""Experts by GPTQ, AWQ and SmoothQuant: each by the rows that reach it, against the equations in float64."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from slipstream.checkpoint import open_checkpoint, resolve
from slipstream.checkpoint.random import write_random_model
from slipstream.models import qwen3_moe
from slipstream.quantize import awq
from slipstream.quantize.apply import Settings, quantize_model
from slipstream.quantize.blocks import BlockQuantizer, Watch
from slipstream.quantize.names import DEFAULT_EXCLUDE, quantized_names
from slipstream.quantize.numbers import nearest
from slipstream.quantize.qformats import QFORMATS, QFormat
from slipstream.quantize.stream import Stream, captured_graph
from slipstream.quantize.texts import Texts
from slipstream.schema.format import WeightFormat
from tests.quantize.test_methods import gptq_by_definition

EXPERTS = "layers.0.mlp.experts.{}_proj.weight"
NORM, ROUTER = "layers.0.post_norm.weight", "layers.0.mlp.router.weight"
INT8 = QFormat(title="", format=WeightFormat(kind="w8a16"), compensates=True)
INT4_AWQ = QFORMATS["int4_awq"].with_group_size(32)


class Layer:
    """The first layer of a model, three columns of whose experts' inputs are thirty times as large as the others."""

    def __init__(self, folder: Path, num_texts: int = 12) -> None:
        write_random_model(folder, qwen3_moe.TINY)
        self.checkpoint = open_checkpoint(resolve(folder), "float32")
        text = torch.randint(3, 100, (num_texts, 64), generator=torch.Generator().manual_seed(0))
        self.stream = Stream(self.checkpoint, captured_graph(self.checkpoint), [text], torch.device("cpu"))
        first, self.block = self.stream.blocks[:2]
        self.stream.advance(first, self.stream.weights(first))
        self.names = quantized_names(self.stream.graph, DEFAULT_EXCLUDE)

    def weights(self) -> dict[str, Tensor]:
        weights = self.stream.weights(self.block)
        weights[NORM][[5, 21, 33]] *= 30
        weights[ROUTER][:, [5, 21, 33]] /= 30  # so that tokens still go to different experts
        return weights

    def quantizer(self, qformat: QFormat) -> BlockQuantizer:
        formats = {name: qformat.format for name in self.names if qformat.format is not None}
        return BlockQuantizer(qformat, self.stream, [0], formats, "float32")

    def watch(self, weights: dict[str, Tensor]) -> Watch:
        found = Watch(self.names, False)
        found.begin_chunk()
        self.stream.run(self.block, weights, 0, watch=found)
        return found


@pytest.fixture
def layer(tmp_path: Path) -> Iterator[Layer]:
    with torch.inference_mode():
        made = Layer(tmp_path / "model")
        yield made
        made.checkpoint.close()


def hidden_of(x_RH: Tensor, weights: dict[str, Tensor], expert: int) -> Tensor:
    gate_IH, up_IH = (weights[EXPERTS.format(name)][expert].double() for name in ("gate", "up"))
    return functional.silu(x_RH @ gate_IH.t()) * (x_RH @ up_IH.t())


def rows_of(watch: Watch) -> list[Tensor]:
    """Of each expert, in float64."""
    (routed,) = watch.routed.values()
    ((x_TH, ids_TK),) = routed.chunks
    return [x_TH[[expert in ids for ids in ids_TK.tolist()]].double() for expert in range(ids_TK.max() + 1)]


def test_gptq_is_what_its_definition_says_of_each_expert(layer: Layer) -> None:
    before = layer.weights()
    rows = rows_of(layer.watch(before))
    found = layer.weights()
    made = layer.quantizer(INT8).run(layer.block, found)
    for expert, x_RH in enumerate(rows):
        for product in ("gate", "up", "down"):
            name, read_RK = EXPERTS.format(product), x_RH
            if product == "down":
                read_RK = hidden_of(x_RH, before, expert)
            assert len(read_RK) > read_RK.shape[1]
            hessian_KK = 2 * read_RK.t() @ read_RK / len(read_RK)
            order_K = hessian_KK.diagonal().argsort(descending=True, stable=True)
            expected_NK = torch.empty_like(before[name][expert], dtype=torch.float64)
            expected_NK[:, order_K] = gptq_by_definition(
                before[name][expert][:, order_K], hessian_KK[order_K][:, order_K],
                made.parts[name]["scale"][expert].double(), 0.01,
            )  # fmt: skip
            same = (found[name][expert] - expected_NK).abs() < 1e-4
            assert same.float().mean() > 0.97  # a number at a tie goes the other way, and what follows with it
            nearest_NK = nearest(before[name][expert], made.formats[name]).double()
            exact_RN = read_RK @ before[name][expert].double().t()
            errors = [(read_RK @ each.double().t() - exact_RN).norm() for each in (found[name][expert], nearest_NK)]
            assert errors[0] < 0.8 * errors[1]


def test_an_expert_that_few_rows_reach_is_rounded_to_the_nearest(tmp_path: Path) -> None:
    with torch.inference_mode():
        layer = Layer(tmp_path / "model", num_texts=2)
        before, found = layer.weights(), layer.weights()
        few = [len(x_RH) < 64 for x_RH in rows_of(layer.watch(before))]
        made = layer.quantizer(INT8).run(layer.block, found)
        layer.checkpoint.close()
    name = EXPERTS.format("gate")
    for is_few, weight_NK, rounded_NK in zip(few, before[name], found[name], strict=True):
        assert torch.equal(rounded_NK, nearest(weight_NK, made.formats[name])) == is_few
    assert any(few) and not all(few)


def best_of(errors: dict[float, float]) -> float:
    return min(errors, key=lambda ratio: errors[ratio])


def test_awq_scales_what_all_experts_read(layer: Layer) -> None:
    """The norm gives what their columns take, and the router's with them: the ratio is the best of all in float64."""
    before, found = layer.weights(), layer.weights()
    seen: list[Tensor] = []
    layer.stream.run(
        layer.block, before, 0, watch=lambda node, inputs: seen.extend(inputs[:3] if node.op == "experts" else ())
    )
    (x_TH, shares_TK, ids_TK), format = seen, INT4_AWQ.format
    assert format is not None

    def results(scale_H: Tensor | None) -> Tensor:
        out_TH = torch.zeros(x_TH.shape, dtype=torch.float64)
        weights = dict(before)
        for name in (EXPERTS.format("gate"), EXPERTS.format("up")) if scale_H is not None else ():
            weights[name] = torch.stack([nearest(each, format, scale=scale_H) for each in before[name]])
        for expert, down_HI in enumerate(before[EXPERTS.format("down")].double()):
            share_T = shares_TK.double().mul(ids_TK == expert).sum(1)
            out_TH += share_T[:, None] * (hidden_of(x_TH.double(), weights, expert) @ down_HI.t())
        return out_TH

    exact_TH, mean_H = results(None), x_TH.abs().mean(0)
    scales = {ratio: awq.awq_scales(mean_H, ratio) for ratio in awq.RATIOS}
    errors = {ratio: float((results(scale_H) - exact_TH).norm()) for ratio, scale_H in scales.items()}
    best = scales[best_of(errors)]
    made = layer.quantizer(INT4_AWQ).run(layer.block, found)
    torch.testing.assert_close(before[NORM] / made.changed[NORM], best, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(made.changed[ROUTER] / before[ROUTER], best.expand(8, -1), rtol=1e-4, atol=1e-5)
    assert best_of(errors) > 0 and min(errors.values()) < 0.6 * errors[0]


@pytest.mark.parametrize("qformat", ["int4_awq", "int8_sq"])
def test_columns_of_down_are_scaled_for_each_expert(layer: Layer, qformat: str) -> None:
    """By the best of the candidates, in float64; what each expert computes stays the same."""
    method = QFORMATS[qformat].with_group_size(32)
    before, found = layer.weights(), layer.weights()
    for weights in (before, found):
        weights[EXPERTS.format("up")][:, [3, 30]] *= 20  # rows: what down reads there is large
    quantizer, watch = layer.quantizer(method), layer.watch(before)
    (routed,) = watch.routed.values()
    quantizer._scale_hidden(routed, found)
    up, down = EXPERTS.format("up"), EXPERTS.format("down")
    for expert, x_RH in enumerate(rows_of(watch)):
        hidden_RI = hidden_of(x_RH, before, expert)
        exact_RH = hidden_RI @ before[down][expert].double().t()
        same_RH = hidden_of(x_RH, found, expert) @ found[down][expert].double().t()
        torch.testing.assert_close(same_RH, exact_RH, rtol=1e-4, atol=1e-3)
        scale_I = before[up][expert, :, 0] / found[up][expert, :, 0]
        torch.testing.assert_close(found[down][expert], before[down][expert] * scale_I)
        inputs = quantizer._inputs_of(hidden_RI.float())
        assert inputs is not None
        candidates = [torch.ones(48), *quantizer._candidates(inputs, before[down][expert].abs().amax(0))]
        errors = [loss_of(quantizer, before[down][expert], inputs.sample_MK, each) for each in candidates]
        chosen = loss_of(quantizer, before[down][expert], inputs.sample_MK, scale_I)
        assert chosen == pytest.approx(min(errors), rel=1e-3)
        assert min(errors) < 0.5 * errors[0]


def loss_of(quantizer: BlockQuantizer, weight_NK: Tensor, x_MK: Tensor, scale_K: Tensor) -> float:
    format = quantizer._formats[EXPERTS.format("down")]
    x_MK = x_MK.double()
    rounded_NK = nearest(weight_NK * scale_K, format).double()
    smooth_MK = x_MK / scale_K
    if format.kind == "w8a8":
        step_M1 = smooth_MK.abs().amax(1, keepdim=True) / 127
        smooth_MK = (smooth_MK / step_M1).round() * step_M1
    return float((smooth_MK @ rounded_NK.t() - x_MK @ weight_NK.double().t()).square().sum())


@pytest.mark.parametrize("qformat", ["int4_gptq", "int4_awq"])
def test_experts_lose_less_than_rounded_to_the_nearest(qformat: str, tmp_path: Path) -> None:
    write_random_model(tmp_path / "model", qwen3_moe.TINY)
    ids = torch.randint(3, 100, (36, 32), generator=torch.Generator().manual_seed(0))
    settings = {name: Settings(qformat=name, group_size=32, exclude=("attention", *DEFAULT_EXCLUDE))
                for name in ("int4_wo", qformat)}  # fmt: skip
    kl = {
        name: quantize_model(
            tmp_path / "model", tmp_path / name, lambda _: Texts(ids[4:], ids[:4], ""), each, dtype="float32"
        ).quality.summary()["kl_nats"]
        for name, each in settings.items()
    }
    assert kl[qformat] < 0.9 * kl["int4_wo"]
