from pathlib import Path

import pytest

from slipstream.build import build, timing
from slipstream.checkpoint import open_checkpoint, resolve
from slipstream.checkpoint.random import write_random_model
from slipstream.models import llama
from slipstream.schema.build import BuildConfig


@pytest.fixture(scope="session")
def tiny_engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine folder of a llama of one layer; tests change copies of it."""
    folder = tmp_path_factory.mktemp("tiny-engine")
    model = write_random_model(folder / "model", llama.TINY | {"num_hidden_layers": 1, "eos_token_id": 2})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "_ROUND_SECONDS", 1e-4)  # which kernel wins is not what these tests are about
        patch.setattr(timing, "_COLD_BYTES", 1)
        build(open_checkpoint(resolve(model)), folder / "engine", BuildConfig(max_batch_size=4, max_num_tokens=16))
    return folder / "engine"
