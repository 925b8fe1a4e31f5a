"""A closed LLM leaves nothing behind: no mapped engine, no thread, no KV cache."""

import gc
import threading
from pathlib import Path

import pytest

from slipstream import LLM, SamplingParams
from slipstream.api import frozen
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


def test_closing_one_of_two_leaves_the_garbage_collector_away_from_the_other(
    tiny_llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frozen, "_num_holders", 0)  # the other tests' LLMs, which stay open
    with LLM(tiny_llm.engine_path, kv_cache_max_tokens=64):
        for _ in range(2):  # closing twice does nothing
            other = LLM(tiny_llm.engine_path, kv_cache_max_tokens=64)
            other.close()
            other.close()
            assert gc.get_freeze_count()
    assert not gc.get_freeze_count()
    gc.freeze()  # as it was for the other tests
