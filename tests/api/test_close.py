"""A closed LLM leaves nothing behind: no mapped engine, no thread, no KV cache."""

import gc
import threading
from pathlib import Path

from slipstream import LLM, SamplingParams
from slipstream.checkpoint.random import write_random_model
from slipstream.models.llama import TINY


def is_mapped(path: Path) -> bool:
    return str(path.resolve()) in Path("/proc/self/maps").read_text()


def test_close_frees_weights_and_thread(tmp_path: Path) -> None:
    model = write_random_model(tmp_path / "own", TINY, seed=7)  # whose engine no other test has open
    with LLM(model, kv_cache_max_tokens=64) as llm:
        llm.generate([1, 2, 3], SamplingParams(max_tokens=4))
        weights = llm._folder.path / "rank0.engine"
        assert is_mapped(weights)
    gc.collect()
    assert not is_mapped(weights)
    assert not any(
        thread.name == "slipstream-engine" and thread is llm.loop._thread for thread in threading.enumerate()
    )
