"""The engine folder that LLM(...) opens: the one it was given, or one that is found or built for a model."""

from dataclasses import dataclass
from pathlib import Path

import torch

from slipstream.build.cache import cached_engine
from slipstream.checkpoint import Source
from slipstream.engine.manifest import Manifest
from slipstream.errors import EngineError
from slipstream.progress import progress_bar
from slipstream.schema.build import BuildConfig


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """Those options of LLM(...) that an engine is built by; "auto" and None leave it to the model or the engine."""

    dtype: str = "auto"
    kv_cache_dtype: str = "auto"
    quantization: str | None = None
    disabled_passes: tuple[str, ...] = ()
    extra_passes: tuple[str, ...] = ()
    max_batch_size: int | None = None
    max_num_tokens: int | None = None
    tp_size: int | None = None
    pp_size: int | None = None
    moe_ep_size: int | None = None

    @property
    def config(self) -> BuildConfig:
        """Only limits above the default ones make another engine; a run may always stay below what was built."""
        default, max_batch_size = BuildConfig(), self.max_batch_size or 0
        return BuildConfig(
            dtype=self.dtype,
            kv_cache_dtype=self.kv_cache_dtype,
            quantization=self.quantization,
            disabled_passes=self.disabled_passes,
            extra_passes=self.extra_passes,
            tp_size=self.tp_size or 1,
            pp_size=self.pp_size or 1,
            moe_ep_size=self.moe_ep_size or 1,
            max_batch_size=max(default.max_batch_size, max_batch_size),
            max_num_tokens=max(default.max_num_tokens, self.max_num_tokens or 0, max_batch_size),
        )

    def of_draft_model(self) -> "BuildOptions":
        """It drafts for steps of this size, in this dtype, and is otherwise built as it is."""
        return BuildOptions(dtype=self.dtype, max_batch_size=self.max_batch_size, max_num_tokens=self.max_num_tokens)

    def check_given(self, path: Path) -> None:
        """Raises EngineError for what only a build could do."""
        if self.quantization is not None:
            raise EngineError(
                f"{path} is built already, so its weights cannot be rounded to {self.quantization}; leave quantization "
                "out, or give the model."
            )
        if self.disabled_passes or self.extra_passes:
            raise EngineError(
                f"{path} is built already, so its passes cannot be changed; leave them out or build again."
            )

    def check_opened(self, path: Path, manifest: Manifest) -> None:
        """Raises EngineError where an engine that was given is not as asked for; one built here always is."""
        if self.dtype not in ("auto", manifest.dtype):
            raise EngineError(
                f"dtype is {self.dtype!r}, but {path} was built in {manifest.dtype}; leave it out or build again."
            )
        if self.kv_cache_dtype not in ("auto", manifest.kv_cache_dtype):
            raise EngineError(
                f"kv_cache_dtype is {self.kv_cache_dtype!r}, but the KV cache of {path} was built in "
                f"{manifest.kv_cache_dtype}; leave it out or build again."
            )
        for name in ("tp_size", "pp_size", "moe_ep_size"):
            size, built = getattr(self, name), getattr(manifest, name)
            if size not in (None, built):
                raise EngineError(f"{name} is {size}, but {path} was built for {built}; leave it out or build again.")


def engine_path(
    source: Source, options: BuildOptions, device: torch.device, *, at_most: int | None = None, show_progress: bool
) -> Path:
    """The engine of a model, built now unless it was built before, or the one that `source` is.

    at_most: the max_seq_len of this run, refused before a build where the model has fewer positions.
    """
    if source.kind == "engine":
        options.check_given(source.path)
        return source.path
    with progress_bar(show_progress) as progress:
        return cached_engine(source, options.config, device, progress, at_most=at_most)
