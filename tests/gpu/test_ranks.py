"""Ranks on as many GPUs say what one CPU says: through NCCL, in recorded steps. Only where there are two GPUs."""

import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from slipstream import LLM, SamplingParams
from slipstream.checkpoint.random import write_random_model
from slipstream.errors import SlipstreamError
from slipstream.kernels.collectives import Ranks
from slipstream.models import model_file
from tests.gpu.test_engine import LIMITS, prompts, tokens

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")

SIZES = [size for size in (2, 4) if size <= torch.cuda.device_count()]
WAYS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama, drafts": {"speculative": {"method": "ngram", "max_draft_len": 4}},
    "qwen3_moe": {},
    "gemma2": {},
}


def ranks_of(llm: LLM) -> Ranks:
    assert llm.loop._engine is not None
    return llm.loop._engine._worker._ranks


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("way", WAYS)
def test_greedy_tokens_are_those_of_the_cpu(way: str, size: int, tmp_path: Path) -> None:
    model = write_random_model(tmp_path / "model", model_file(way.partition(",")[0]).TINY, seed=2)
    asked = prompts(12, seed=3)
    sampling = [SamplingParams(temperature=0, max_tokens=5 + 4 * index, ignore_eos=True) for index in range(len(asked))]
    with LLM(model, device="cpu", **LIMITS) as llm:
        expected = tokens(llm, asked, sampling)
    with LLM(model, device="cuda", tp_size=size, **LIMITS, **WAYS[way]) as llm:
        assert ranks_of(llm).shown_rows(torch.empty(1, 64)) is not None, "GPUs see each other's memory"
        assert tokens(llm, asked, sampling) == expected
        assert tokens(llm, asked[:1], sampling[:1]) == expected[:1]


def test_a_lost_rank_ends_its_requests_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    model = write_random_model(tmp_path / "model", model_file("llama").TINY | {"max_position_embeddings": 200_000})
    limits = LIMITS | {"max_seq_len": 100_000}
    with LLM(model, device="cuda", tp_size=2, **limits) as llm:
        stream = llm.stream([1, 2, 3], SamplingParams(max_tokens=90_000, temperature=0, ignore_eos=True))
        next(stream)
        assert llm.loop._engine is not None and llm.loop._engine._group is not None
        llm.loop._engine._group._children[1].send_signal(signal.SIGKILL)
        with pytest.raises(SlipstreamError, match="the engine stopped: rank 1 has ended, by signal 9"):
            for _ in stream:
                pass
