"""Engines built for `LLM("folder")`, kept on disk and found again by everything that can change them."""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

import torch

import slipstream
from slipstream.build import build, resolve_limits
from slipstream.build.extensions import digest_of_sources
from slipstream.build.kept import keep_compiled_kernels
from slipstream.build.tune import describe_device, tune
from slipstream.checkpoint import Source, open_checkpoint
from slipstream.checkpoint.convert import OWN_BITS
from slipstream.engine.choices import Choices, load_choices
from slipstream.engine.folder import CACHE_FILE, Engine
from slipstream.errors import BuildError, UsageError
from slipstream.kernels.cpu.library import library
from slipstream.progress import Progress
from slipstream.schema.build import BuildConfig
from slipstream.schema.folders import cache_folder

KEPT_PER_MODEL = 3
# Folders of the package whose code shapes an engine.
_BUILD_FOLDERS = ("kernels", "layers", "models", "checkpoint", "build", "engine", "quantize", "schema", "text")


def cached_engine(
    source: Source, config: BuildConfig, device: torch.device, progress: Progress, at_most: int | None = None
) -> Path:
    """The engine folder of a model, built now unless it was built before.

    at_most: the max_seq_len of this run, refused before a build where the model has fewer positions.
    """
    config = replace(config, quantization=quantization_for(source, config, device))
    name = "".join(c if c.isalnum() or c in "-._" else "-" for c in source.name)[:80]
    parent = cache_folder() / "engines"
    folder = parent / f"{name}-{_key(source, config, device)}"
    if (folder / "config.json").is_file():
        with contextlib.suppress(OSError):
            os.utime(folder)  # for _forget_old
        return folder
    with (
        contextlib.closing(open_checkpoint(source, dtype_for(config.dtype, device))) as checkpoint,
        _scratch_folder(parent) as scratch,
    ):
        resolve_limits(replace(config, max_seq_len=at_most), checkpoint)
        build(checkpoint, scratch / "engine", config, device=str(device), progress=progress)
        with contextlib.suppress(OSError):  # another process or thread was faster: its engine is as good
            (scratch / "engine").replace(folder)
    _forget_old(parent, name, keep=folder)
    return folder


def device_for(requested: str) -> torch.device:
    """ "auto" is the GPU where there is one. Raises UsageError for a device that is not here."""
    has_gpu = torch.cuda.is_available()
    if has_gpu and requested != "cpu":
        keep_compiled_kernels()
    if requested == "auto":
        return torch.device("cuda" if has_gpu else "cpu")
    here = ["auto", "cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count() if has_gpu else 0))]
    if requested not in (*here, "cuda" if has_gpu else "cpu"):
        raise UsageError(f"device is {requested!r}; this machine has {', '.join(here)}.")
    return torch.device(requested)


def dtype_for(requested: str, device: torch.device) -> str:
    """ "auto" is float32 on a CPU (bfloat16 is emulated on most) and the model's own dtype on a GPU."""
    return "float32" if requested == "auto" and device.type == "cpu" else requested


def quantization_for(source: Source, config: BuildConfig, device: torch.device) -> str | None:
    """What is asked for; for a GGUF file on a CPU with kernels, where neither that nor a dtype is, its own bits."""
    is_open = source.kind == "gguf" and config.quantization is None and config.dtype == "auto"
    return OWN_BITS if is_open and device.type == "cpu" and library() is not None else config.quantization


def tuned_choices(engine: Engine, device: torch.device) -> Choices:
    """The engine's kernel choices if they were measured on this device; otherwise measured now and stored."""
    path = engine.path / CACHE_FILE
    choices = load_choices(path, describe_device(device))
    if choices is None:
        limits = engine.manifest
        choices = tune(
            engine.graph, device, max_num_tokens=limits.max_num_tokens, max_batch_size=limits.max_batch_size,
            disabled_plugins=limits.disabled_plugins,
        )  # fmt: skip
        with contextlib.suppress(OSError):  # a read-only folder is measured again next time
            choices.save(path)
    return choices


@contextlib.contextmanager
def _scratch_folder(parent: Path) -> Iterator[Path]:
    """Nobody else's, and gone afterwards."""
    try:
        parent.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.mkdtemp(prefix=".", dir=parent)
    except OSError as error:
        raise BuildError(f"{parent} cannot be written ({error.strerror}); set SLIPSTREAM_CACHE to a folder.") from None
    try:
        yield Path(scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _key(source: Source, config: BuildConfig, device: torch.device) -> str:
    facts = {
        "source": source.fingerprint(),
        "config": asdict(config),
        "dtype": dtype_for(config.dtype, device),
        "device": device.type,
        "code": _code_digest(),
        "own model": source.own_model and source.own_model.digest(),
        "extra passes": digest_of_sources(config.extra_passes),
        "torch": torch.__version__,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


@cache
def _code_digest() -> str:
    package = Path(slipstream.__file__).parent
    digest = hashlib.sha256(slipstream.__version__.encode())
    for folder in _BUILD_FOLDERS:
        for file in sorted((package / folder).rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()


def _forget_old(parent: Path, name: str, keep: Path) -> None:
    """Engines take as much disk as their weights: only the newest few of a model stay."""
    mine = [folder for folder in parent.glob(f"{name}-????????????????") if folder != keep]
    for folder in sorted(mine, key=lambda f: f.stat().st_mtime, reverse=True)[KEPT_PER_MODEL - 1 :]:
        shutil.rmtree(folder, ignore_errors=True)
