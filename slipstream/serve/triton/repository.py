"""A model repository: the folders that a Triton Inference Server reads."""

from collections.abc import Mapping
from pathlib import Path

from slipstream.errors import UsageError
from slipstream.serve.triton.template import fill, open_keys

TEMPLATES = Path(__file__).parent / "templates"

MODULES = {  # of each model that runs Python
    "preprocessing": "preprocessing",
    "tensorrt_llm": "engine",
    "postprocessing": "postprocessing",
    "tensorrt_llm_bls": "bls",
}
MODELS = (*MODULES, "ensemble")

MODEL_PY = '''"""Written by `slipstream triton init`; what it does is in slipstream/serve/triton/."""

import triton_python_backend_utils  # noqa: F401 - before all else: `triton launch` has it say where modules are

from slipstream.serve.triton.{module} import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''

DEFAULTS = {  # where --engine_dir is given; those of NVIDIA's guide where it would run on any engine
    "tokenizer_type": "auto",
    "triton_max_batch_size": "64",
    "preprocessing_instance_count": "1",
    "postprocessing_instance_count": "1",
    "bls_instance_count": "4",
    "decoupled_mode": "True",
    "accumulate_tokens": "False",
    "max_beam_width": "1",
    "max_tokens_in_paged_kv_cache": "",
    "max_attention_window_size": "",
    "kv_cache_free_gpu_mem_fraction": "0.9",
    "exclude_input_in_output": "True",
    "enable_kv_cache_reuse": "True",
    "batching_strategy": "inflight_fused_batching",
    "max_queue_delay_microseconds": "0",
}


def write_repository(folder: Path, values: Mapping[str, str] | None = None, *, replace: bool = False) -> list[str]:
    """Write the five models; returns the keys left to fill.  values: of keys; None leaves them all.

    Raises UsageError where models are there already and may not be replaced.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--model_repo is {folder}, which is a file; name a folder.")
    for name in MODELS:
        if (folder / name).exists() and not replace:
            raise UsageError(f"{folder / name} is there already; name another --model_repo, or add --force.")
    left: list[str] = []
    for name in MODELS:
        version = folder / name / "1"
        version.mkdir(parents=True, exist_ok=True)
        text = (TEMPLATES / name / "config.pbtxt").read_text(encoding="utf-8")
        keys = open_keys(text)
        if values is not None:
            text = fill(text, {key: value for key, value in values.items() if key in keys}, f"{name}/config.pbtxt")
        (folder / name / "config.pbtxt").write_text(text, encoding="utf-8")
        left += open_keys(text)
        if name in MODULES:
            (version / "model.py").write_text(MODEL_PY.format(module=MODULES[name]), encoding="utf-8")
        else:
            (version / ".gitkeep").touch()  # Triton wants a version folder, and git keeps none that is empty
    return list(dict.fromkeys(left))


def values_for_engine(engine: Path, tokenizer: Path | None) -> dict[str, str]:
    """All keys' values for an engine folder; its own tokenizer unless another is given. Raises UsageError."""
    if not (engine / "config.json").is_file() or not (engine / "rank0.engine").is_file():
        raise UsageError(f"--engine_dir is {engine}, which holds no rank0.engine; build one with slipstream build.")
    tokenizer = tokenizer or engine / "tokenizer"
    if not tokenizer.is_dir():
        raise UsageError(f"{tokenizer} is no folder with a tokenizer; name one with --tokenizer_dir.")
    paths = {"engine_dir": str(engine.resolve()), "tokenizer_dir": str(tokenizer.resolve())}
    return {**DEFAULTS, **paths}
