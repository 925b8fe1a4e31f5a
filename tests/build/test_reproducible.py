"""The same checkpoint built twice, in two processes with other hash seeds, gives the same graph, byte for byte."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from slipstream.checkpoint.random import write_random_model
from slipstream.engine.folder import open_engine
from slipstream.models import known_models, model_file

BUILD_ALL = """
import sys
from pathlib import Path
from slipstream.build import plan_build, write_engine
from slipstream.checkpoint import open_checkpoint, resolve
from slipstream.schema.build import BuildConfig

for model in sorted(Path(sys.argv[1]).iterdir()):
    checkpoint = open_checkpoint(resolve(model), "float32")
    plan = plan_build(checkpoint, BuildConfig(max_batch_size=2, max_num_tokens=16))
    write_engine(plan, Path(sys.argv[2]) / model.name, measure_kernels=False)
"""


@pytest.fixture(scope="module")
def built_twice(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("reproducible")
    for name in known_models():
        write_random_model(folder / "models" / name, model_file(name).TINY)
    outputs = (folder / "first", folder / "second")
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", BUILD_ALL, str(folder / "models"), str(output)],
            env={**os.environ, "PYTHONHASHSEED": str(number + 1)},
        )
        for number, output in enumerate(outputs)
    ]
    assert [process.wait() for process in processes] == [0, 0]
    return outputs


@pytest.mark.parametrize("name", known_models())
def test_two_builds_are_equal_and_open(name: str, built_twice: tuple[Path, Path]) -> None:
    first, second = (folder / name for folder in built_twice)
    assert (first / "rank0.engine").read_bytes() == (second / "rank0.engine").read_bytes()
    configs = [json.loads((folder / "config.json").read_text(encoding="utf-8")) for folder in (first, second)]
    assert configs[0] == configs[1]
    engine = open_engine(first)
    assert engine.graph.digest() == configs[0]["graph_sha256"]
    engine.close()
