"""The engine that is measured: one that is there, a model's, or that of a shape with random weights."""

import contextlib
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slipstream.errors import UsageError

if TYPE_CHECKING:
    from slipstream.api import LLM


@dataclass(frozen=True)
class Measured:
    llm: "LLM"
    name: str
    where: str  # the engine, for people
    build_seconds: float  # where it was built for this measurement alone


@contextlib.contextmanager
def open_measured(
    model: str | None, engine_dir: Path | None, device: str, build: Mapping[str, Any], more: Mapping[str, Any]
) -> Iterator[Measured]:
    """model: as LLM takes it, or the name of a shape; beside an engine_dir it is what the report calls it.

    build: options of LLM(...) that a build has, too. more: the others.
    """
    from slipstream.api import LLM
    from slipstream.bench.shapes import SHAPES
    from slipstream.cli._engine import engine_folder

    if engine_dir is not None:
        with LLM(engine_folder(engine_dir), device=device, **build, **more) as llm:
            yield Measured(llm, model or llm.manifest.name, str(engine_dir), 0.0)
    elif model is None:
        raise UsageError(f"Give --model (a model, or a shape: {', '.join(SHAPES)}) or --engine_dir; neither was given.")
    elif model in SHAPES and not Path(model).exists():
        with tempfile.TemporaryDirectory(prefix="slipstream-shape-") as folder:
            started = time.perf_counter()
            engine = _build_shape(SHAPES[model], Path(folder), device, build)
            seconds = time.perf_counter() - started
            with LLM(engine, device=device, **_limits(build), **more) as llm:
                yield Measured(llm, model, "built with random weights", seconds)
    else:
        with LLM(model, device=device, **build, **more) as llm:
            yield Measured(llm, model, "built on first use", 0.0)


def _build_shape(shape: Mapping[str, Any], folder: Path, device: str, options: Mapping[str, Any]) -> Path:
    from slipstream.build import build
    from slipstream.build.cache import device_for
    from slipstream.checkpoint import open_checkpoint, resolve
    from slipstream.checkpoint.random import write_random_model
    from slipstream.schema.build import BuildConfig

    where = device_for(device)
    dtype = options["dtype"]
    if dtype == "auto":
        dtype = "float32" if where.type == "cpu" else "float16"
    model = write_random_model(folder / "model", dict(shape), dtype=dtype)
    given = {name: value for name, value in options.items() if value is not None and name != "dtype"}
    with contextlib.closing(open_checkpoint(resolve(model), dtype)) as checkpoint:
        build(checkpoint, folder / "engine", BuildConfig(dtype=dtype, **given), device=str(where))
    (model / "model.safetensors").unlink()  # as large as the engine, which has its own copy
    return folder / "engine"


def _limits(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name.startswith("max_")}
