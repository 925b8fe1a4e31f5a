"""slipstream bench kernels on a GPU: calls are recorded, and the floors are of its own memory and tensor cores."""

from pathlib import Path

import pytest
import torch

from slipstream.bench.kernels import bench_kernels
from slipstream.build import build
from slipstream.checkpoint import open_checkpoint, resolve
from slipstream.checkpoint.random import write_random_model
from slipstream.engine.choices import Choices
from slipstream.engine.folder import open_engine
from slipstream.models import model_file
from slipstream.schema.build import BuildConfig

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="times kernels of a GPU")


@pytest.mark.parametrize("model_type", ["llama", "mixtral", "deepseek_v3"])
def test_every_node_of_a_graph_is_timed(model_type: str, tmp_path: Path, device: torch.device) -> None:
    model = write_random_model(tmp_path / "model", model_file(model_type).TINY)
    config = BuildConfig(dtype="bfloat16", max_batch_size=4, max_num_tokens=32)
    build(open_checkpoint(resolve(model), "bfloat16"), tmp_path / "engine", config, device="cuda")
    engine = open_engine(tmp_path / "engine")
    report = bench_kernels(engine.graph, engine.manifest, Choices("", {}), device, rows=[1, 10], contexts=[8])
    for rows in (1, 10):
        assert sum(line.times for line in report.lines if line.rows == rows) == len(engine.graph.nodes)
    for line in report.lines:
        assert all(0 < seconds < 1 for seconds in line.seconds.values()), line
    assert report.machine.read > 1e11
    assert report.machine.products["bfloat16"] > 1e13
