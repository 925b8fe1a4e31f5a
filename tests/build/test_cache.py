"""cached_engine: two builds of one model at once do not meet, and leave one engine."""

import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from slipstream.build import cache
from slipstream.build.kept import keep_compiled_kernels
from slipstream.checkpoint import Source, resolve
from slipstream.errors import BuildError
from slipstream.kernels.cpu.compiler import levels_here
from slipstream.schema.build import BuildConfig

CPU = torch.device("cpu")


def cached(model: Path) -> Path:
    return cache.cached_engine(resolve(model), BuildConfig(), CPU, lambda stage, done, total: None)


def test_two_threads_build_apart_and_leave_one_engine(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = threading.Barrier(2, timeout=30)
    written: list[Path] = []
    found: list[Path] = []

    def build(checkpoint: Any, folder: Path, *args: Any, **kwargs: Any) -> None:
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        written.append(folder)
        both.wait()

    monkeypatch.setattr(cache, "build", build)
    monkeypatch.setenv("SLIPSTREAM_CACHE", str(tmp_path))
    threads = [threading.Thread(target=lambda: found.append(cached(tiny_model))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(written)) == 2 and len(found) == 2
    assert list((tmp_path / "engines").iterdir()) == [found[0]] == [found[1]]
    assert (found[0] / "config.json").is_file() and cached(tiny_model) == found[0]


def test_a_cache_that_cannot_be_written_names_the_variable(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SLIPSTREAM_CACHE", str(tmp_path / "file"))
    with pytest.raises(BuildError, match="set SLIPSTREAM_CACHE"):
        cached(tiny_model)


def test_compiled_kernels_are_kept_beside_the_engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIPSTREAM_CACHE", str(tmp_path))
    monkeypatch.setenv("TRITON_CACHE_DIR", "mine")
    keep_compiled_kernels()
    assert os.environ["TRITON_CACHE_DIR"] == "mine"
    monkeypatch.delenv("TRITON_CACHE_DIR")
    keep_compiled_kernels()
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path / "triton") and (tmp_path / "triton").is_dir()
    monkeypatch.delenv("TRITON_CACHE_DIR")
    (tmp_path / "file").touch()
    monkeypatch.setenv("SLIPSTREAM_CACHE", str(tmp_path / "file"))
    keep_compiled_kernels()  # cannot write there: Triton takes its own place
    assert "TRITON_CACHE_DIR" not in os.environ


@pytest.mark.skipif(not levels_here(), reason="no kernels for this CPU")
def test_a_gguf_file_runs_in_its_own_bits_on_a_cpu_unless_something_else_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file, cpu = Source("gguf", Path("model.gguf"), "SmolLM2"), torch.device("cpu")
    assert cache.quantization_for(file, BuildConfig(), cpu) == "gguf"
    assert cache.quantization_for(file, BuildConfig(quantization="int4_wo"), cpu) == "int4_wo"
    assert cache.quantization_for(file, BuildConfig(dtype="float32"), cpu) is None
    assert cache.quantization_for(file, BuildConfig(), torch.device("cuda")) is None
    assert cache.quantization_for(Source("folder", Path("model"), "SmolLM2"), BuildConfig(), cpu) is None
    monkeypatch.setenv("SLIPSTREAM_CPU_LEVEL", "torch")
    assert cache.quantization_for(file, BuildConfig(), cpu) is None
