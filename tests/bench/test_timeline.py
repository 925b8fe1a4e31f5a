"""What follows from when tokens came, on numbers that can be added up by hand; and the shapes that have names."""

import re

import numpy as np
import pytest
import torch

from slipstream.bench.shapes import SHAPES
from slipstream.bench.timeline import Run, Timeline, percentile, spread
from slipstream.models import read_config


def test_one_request() -> None:
    timeline = Timeline(10.0, num_input=7, num_output=4, arrivals=[10.5, 11.0, 11.0, 12.5], ended=12.75)
    assert (timeline.ttft, timeline.latency) == (0.5, 2.75)
    assert timeline.tpot == pytest.approx(2.0 / 3)
    assert timeline.gaps == [0.5, 1.5]  # two came at once


def test_all_requests_of_a_load() -> None:
    run = Run("2 at a time", [
        Timeline(0.0, num_input=3, num_cached=2, num_output=2, arrivals=[1.0, 2.0], ended=2.0),
        Timeline(1.0, num_input=5, num_output=4, arrivals=[1.5, 2.0, 2.5, 5.0], ended=5.0),
        Timeline(1.0, num_input=5, error="no room", ended=1.0),
    ])  # fmt: skip
    values = run.to_dict()
    counted = ("requests", "failed", "input_tokens", "cached_tokens", "output_tokens", "seconds")
    assert [values[name] for name in counted] == [3, 1, 8, 2, 6, 5.0]
    rates = ("requests_per_second", "output_tokens_per_second", "total_tokens_per_second")
    assert [values[name] for name in rates] == [2 / 5, 6 / 5, 14 / 5]
    assert run.ttft.mean == 0.75
    assert run.tpot.percentiles[50] == pytest.approx((1.0 + 3.5 / 3) / 2)
    assert run.latency.to_dict(1e3) == pytest.approx(
        {"mean": 3000, "min": 2000, "max": 4000, "p50": 3000, "p90": 3800, "p95": 3900, "p99": 3980}
    )


def test_a_load_of_which_nothing_came() -> None:
    run = Run("1 at a time", [Timeline(0.0, error="refused", ended=0.0)])
    assert (run.output_rate, run.ttft.most, run.num_failed) == (0.0, 0.0, 1)


def test_percentiles_are_numpys() -> None:
    values = sorted(np.random.default_rng(0).normal(size=37).tolist())
    for part in (0, 1, 50, 95, 99, 100):
        assert percentile(values, part) == pytest.approx(np.percentile(values, part))
    assert spread([]).mean == 0.0


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_has_as_many_parameters_as_its_name_says(name: str) -> None:
    model, config = read_config(dict(SHAPES[name]), name)
    with torch.device("meta"):
        count = sum({id(each): each.numel() for each in model.Model(config).parameters()}.values())
    found = re.search(r"_(?:8x)?([\d.]+)([bm])", name)
    assert found
    said = float(found[1]) * {"b": 1e9, "m": 1e6}[found[2]] * (6.6 if "8x" in name else 1)
    assert 0.85 * said < count < 1.2 * said
