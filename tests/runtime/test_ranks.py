"""Ranks in processes of their own: the tokens of one, and an end in a sentence when one of them is lost."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from slipstream import LLM, SamplingParams
from slipstream.checkpoint.random import write_random_model
from slipstream.errors import CapacityError, EngineError, SlipstreamError, UsageError
from slipstream.models import llama
from slipstream.runtime import rank_group
from slipstream.runtime.meeting import check_ranks
from slipstream.runtime.one_shot import CountedStore
from slipstream.runtime.rank_group import RankGroup, plan_from_json, plan_to_json
from slipstream.schema.mapping import Mapping
from slipstream.schema.step import PENDING, BlockCopy, SequenceStep, StepPlan

PROMPTS = [[1, 2, 3, 4, 5], [9, 8, 7], list(range(100)), [5, 6] * 20]
GREEDY = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)
DRAWN = SamplingParams(max_tokens=24, temperature=1, top_p=0.9, seed=3, ignore_eos=True, logprobs=2)
TWO, STAGES = {"tp_size": 2}, {"pp_size": 2}
DRAFTS = {"speculative": {"method": "ngram", "max_draft_len": 4}}
FOREVER = SamplingParams(max_tokens=100_000, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = llama.TINY | {"max_position_embeddings": 200_000}
    return write_random_model(tmp_path_factory.mktemp("ranks") / "model", options)


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread's traceback is expected."""
    monkeypatch.setattr(threading, "excepthook", lambda args: None)


def children(llm: LLM) -> "list[subprocess.Popen[bytes]]":
    engine = llm.loop._engine
    assert engine is not None and engine._group is not None
    return list(engine._group._children.values())


def test_ranks_give_the_tokens_of_one(model: Path) -> None:
    """With drafts, too: of every method that is tests/speculative/test_methods.py's to say."""
    texts, num_threads = [], torch.get_num_threads()
    for options in ({}, TWO, STAGES, TWO | STAGES | DRAFTS):
        with LLM(model, max_num_tokens=64, show_progress=False, **options) as llm:
            outputs = [*llm.generate(PROMPTS, GREEDY), *llm.generate(PROMPTS, DRAWN)]
            texts.append([output.outputs[0].token_ids for output in outputs])
    assert all(each == texts[0] for each in texts)
    assert torch.get_num_threads() == num_threads


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize(("options", "sent"), [(TWO, signal.SIGKILL), (TWO, signal.SIGSTOP), (STAGES, signal.SIGKILL)])
def test_a_rank_that_is_lost_ends_every_request_in_a_sentence(
    model: Path, options: dict[str, int], sent: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rank_group, "SILENCE_SECONDS", 3.0)
    with LLM(model, max_num_tokens=64, show_progress=False, **options) as llm:
        (other,) = children(llm)
        streams = [llm.stream(prompt, FOREVER) for prompt in PROMPTS[:2]]
        for stream in streams:
            next(stream)
        os.kill(other.pid, sent)
        for stream in streams:
            with pytest.raises(
                SlipstreamError, match=r"the engine stopped: rank 1 has (ended, by signal 9|not answered for 3)"
            ):
                for _ in stream:
                    pass
        with pytest.raises(SlipstreamError, match="closed"):
            llm.generate([1], GREEDY)


@pytest.mark.usefixtures("quiet")
def test_an_idle_engine_notices_too(model: Path) -> None:
    with LLM(model, show_progress=False, **TWO) as llm:
        (other,) = children(llm)
        other.kill()
        llm.loop._thread.join()
        assert not llm.loop.is_alive


def test_ranks_end_with_the_engine(model: Path) -> None:
    with LLM(model, tp_size=2, show_progress=False) as llm:
        (other,) = children(llm)
    assert other.returncode == 0


def test_ranks_end_with_their_parent(model: Path) -> None:
    script = (
        "import sys, time\nfrom slipstream import LLM\n"
        f"llm = LLM({str(model)!r}, tp_size=2, show_progress=False)\n"
        "print(llm.loop._engine._group._children[1].pid, flush=True)\ntime.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        other = int(parent.stdout.readline())
        parent.kill()
    while Path(f"/proc/{other}").exists() and "State:\tZ" not in Path(f"/proc/{other}/status").read_text():
        time.sleep(0.05)


def test_a_rank_that_cannot_start_says_why(model: Path, tmp_path: Path) -> None:
    with LLM(model, tp_size=2, show_progress=False) as llm:
        engine = llm._folder.path
    broken = tmp_path / "engine"
    broken.mkdir()
    for file in engine.iterdir():
        if file.name != "rank1.engine":
            (broken / file.name).symlink_to(file)
    with pytest.raises(SlipstreamError, match=r"rank 1: .*rank1\.engine"):
        LLM(broken)
    with pytest.raises(EngineError, match=r"tp_size is 4, but .* was built for 2; leave it out or build again"):
        LLM(engine, tp_size=4)


def test_wrong_sizes_end_in_a_sentence(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="tp_size is 0; it must be a whole number of at least 1"):
        LLM(model, tp_size=0)
    with pytest.raises(SlipstreamError, match=r"tp_size is 3, but 4 heads.* must be 1, 2, 4\."):
        LLM(model, tp_size=3, show_progress=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(CapacityError, match=r"for 4 GPUs, and this machine has 2; build it with --tp_size 2 alone"):
        check_ranks(4, torch.device("cuda"))
    with pytest.raises(CapacityError, match=r"from cuda:1 on there are 1"):
        check_ranks(2, torch.device("cuda:1"))


def test_a_plan_is_the_same_after_its_way_to_another_rank() -> None:
    steps = (
        SequenceStep(3, 0, (1, 2, 3), True, ((0, (7, 8)), (1, (9, 0)))),
        SequenceStep(0, 5, (PENDING,), True, num_drafts=2),
    )
    plan = StepPlan(4, steps, (BlockCopy(1, 2, 16),))
    sent = json.dumps(plan_to_json(plan, [1, 3]))
    found, counts = plan_from_json(json.loads(sent))
    assert json.dumps(plan_to_json(found, counts)) == sent
    assert found.num_tokens == plan.num_tokens


def test_a_group_whose_ranks_never_come_is_no_wait() -> None:
    setup = {"engine": "/nowhere", "plugins": ["no_such_module"]}
    group = RankGroup(Mapping(2), setup, torch.device("cpu"), at_start=lambda: None, at_end=lambda: None)
    with pytest.raises(SlipstreamError, match="rank 1: ModuleNotFoundError"):
        group.join()
    group.close()


def test_a_process_that_has_exchanged_before_meets_one_that_has_not() -> None:
    """As torch's C++ calls it: through a store of its own around ours."""
    shared = dist.HashStore()
    counted = [CountedStore(shared), CountedStore(shared)]
    old, new = (dist.PrefixStore("memory", each) for each in counted)
    for exchange in range(3):
        old.set(f"CUDA/{7 + exchange}/0", f"of 0, {exchange}")
        new.set(f"CUDA/{exchange}/1", f"of 1, {exchange}")
        old.wait([f"CUDA/{7 + exchange}/1"], timedelta(seconds=1))
        new.wait([f"CUDA/{exchange}/0"])
        assert old.get(f"CUDA/{7 + exchange}/1") == f"of 1, {exchange}".encode()
        assert new.get(f"CUDA/{exchange}/0") == f"of 0, {exchange}".encode()
