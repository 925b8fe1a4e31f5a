"""More engines while the load asks for them: the rule by itself, and a server whose second one comes and goes."""

import time
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from slipstream.serve.messages import LOAD_SECONDS
from slipstream.serve.scaling import Scaling
from tests.cli.conftest import Call, call  # noqa: F401
from tests.serve.conftest import eventually, serving
from tests.serve.test_replicas import ENDLESS, Reader, counted, running, statuses

BATCH = 8
PATIENCE = 240  # seconds: engines start and end in some, but a machine may do other things too


def test_one_more_once_batches_have_been_full_for_a_while() -> None:
    scaling = Scaling(1, 3, up_seconds=10, down_seconds=60)
    assert [scaling.change(now, 8, 1, BATCH) for now in range(12)] == [0] * 10 + [1, 0]
    assert scaling.change(15, 7, 1, BATCH) == 0  # there is room again, so that it begins anew
    assert [scaling.change(now, 8, 1, BATCH) for now in (16, 25, 26)] == [0, 0, 1]
    assert scaling.change(99, 99, 3, BATCH) == scaling.change(200, 99, 3, BATCH) == 0  # there are no more


def test_one_fewer_once_the_others_have_had_room_for_a_while() -> None:
    scaling = Scaling(1, 3, up_seconds=10, down_seconds=60)
    assert [scaling.change(now, 8, 3, BATCH) for now in (0, 59, 60)] == [0, 0, -1]
    assert [scaling.change(now, 5, 2, BATCH) for now in (61, 200)] == [0, 0]  # half a batch of one is four
    assert [scaling.change(now, 4, 2, BATCH) for now in (201, 261)] == [0, -1]
    assert [scaling.change(now, 0, 1, BATCH) for now in (262, 999)] == [0, 0]


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 60)), max_size=60))
def test_steady_loads_settle_within_the_bounds(loads: list[tuple[int, int]]) -> None:
    """Whatever comes; and once the load stays as it is, engines do not come and go in turns."""
    scaling, num_engines, now = Scaling(1, 4, up_seconds=3, down_seconds=5), 1, 0.0
    for seconds, num_sequences in loads:
        now += seconds
        num_engines += scaling.change(now, num_sequences, num_engines, BATCH)
        assert 1 <= num_engines <= 4
    num_sequences = loads[-1][1] if loads else 0
    changes = []
    for _ in range(60):
        now += 1
        changes.append(scaling.change(now, num_sequences, num_engines, BATCH))
        num_engines += changes[-1]
    assert not any(changes[-10:]) and not {1, -1} <= {*changes}


def notes(said: Path) -> list[str]:
    return [line for line in said.read_text().splitlines() if line.startswith("note: ")]


def test_an_engine_comes_with_the_load_and_goes_after_it(patient_engine: Path, tmp_path: Path) -> None:
    """With two fronts. Who is answered by the one that leaves is answered to the end."""
    options = ("--max_replicas", 2, "--max_batch_size", 2, "--num_fronts", 2, *ENDLESS)
    delays = ("--upscale_delay", 1, "--downscale_delay", 2)
    said = tmp_path / "stderr"
    with said.open("w") as stderr, serving(patient_engine, *options, *delays, stderr=stderr) as server:
        assert statuses(server) == ["ok"] and counted(server, "num_requests_running") == [0]
        readers = [Reader(server, number) for number in range(3)]
        eventually(lambda: statuses(server) == ["ok", "ok"], seconds=PATIENCE)
        readers += [Reader(server, 10 + number) for number in range(2)]
        eventually(lambda: len(running(server)) == 2 and running(server)[1] >= 1, seconds=PATIENCE)

        for reader in readers[:3]:
            reader.leaves = True
        # Until they have left and both fronts know, the second engine is the emptier one, where this one would wait for
        # those that never end.
        eventually(lambda: running(server)[0] == 0, seconds=PATIENCE)
        time.sleep(3 * LOAD_SECONDS)
        last = Reader(server, 20, max_tokens=300)
        eventually(lambda: not last.is_alive(), seconds=PATIENCE)
        assert last.ending[1] == "data: [DONE]" and '"finish_reason":"length"' in last.ending[0]
        for reader in readers[3:]:
            assert reader.is_alive()
            reader.leaves = True
        eventually(lambda: statuses(server) == ["ok"], seconds=PATIENCE)
        assert server.post("/v1/completions", {"prompt": [1, 2, 3], "max_tokens": 2}).status_code == 200
        readers = [Reader(server, 30 + number) for number in range(3)]  # and it comes again
        eventually(lambda: statuses(server) == ["ok", "ok"], seconds=PATIENCE)
        for reader in readers:
            reader.leaves = True
    assert [" one more " in line for line in notes(said)] == [True, False, True], notes(said)
    assert notes(said)[0].endswith(" sequences are in flight, and 2 run at a time.")


def test_fewer_at_most_than_at_least_are_refused(call: Call) -> None:  # noqa: F811
    ended = call("serve", "smollm2", "--replicas", 3, "--max_replicas", 2)
    assert ended.code == 2 and "--max_replicas is 2 and --replicas 3; give 3 or more." in ended.err
