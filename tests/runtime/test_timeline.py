"""Static against in-flight batching, the drawing every introduction to serving has, computed.

Four slots, at most 8 output tokens. S3 ends at T5 and S2, the longest, at T8. A static batch is closed until all of it
has ended, so S5 waits until T9; with in-flight batching it starts in the step right after S3 ended, T6, in S3's slot.
"""

from slipstream.runtime.scheduler import Scheduler
from slipstream.schema.build import CapacityPolicy, RuntimeConfig

from .fake_worker import FakeWorker, make_request

EOS = 2
OUTPUT_LENGTHS = {"S1": 6, "S2": 8, "S3": 5, "S4": 7, "S5": 4, "S6": 3, "S7": 3}


def timeline(policy: CapacityPolicy) -> list[list[str]]:
    """Rows are slots, columns are steps T1, T2, ...; a cell names the sequence computed there."""
    config = RuntimeConfig(num_blocks=64, max_batch_size=4, capacity_policy=policy)
    scheduler = Scheduler(config)
    script = {name: (1,) * (length - 1) + (EOS,) for name, length in OUTPUT_LENGTHS.items()}
    worker = FakeWorker(config, script=script)
    for number, name in enumerate(OUTPUT_LENGTHS, start=10):
        scheduler.add(make_request(name, (number,), max_tokens=8, eos_token_ids=frozenset({EOS})))
    rows: list[list[str]] = [[] for _ in range(config.max_batch_size)]
    while (plan := scheduler.plan()) is not None:
        events = scheduler.commit(plan, worker.execute(plan))
        names = {step.slot: event.request_id for step, event in zip(plan.sequences, events, strict=True)}
        for slot, row in enumerate(rows):
            row.append(names.get(slot, "  "))
    return rows


def draw(title: str, rows: list[list[str]]) -> str:
    header = "        " + " ".join(f"T{step:<2}" for step in range(1, len(rows[0]) + 1))
    lines = [f"slot {slot}  " + " ".join(f"{cell:<3}" for cell in row) for slot, row in enumerate(rows)]
    return "\n".join([title, header, *(line.rstrip() for line in lines)])


def span(rows: list[list[str]], name: str) -> tuple[int, int]:
    """The first and the last step of a sequence, as in the drawing: T1 is 1."""
    steps = [step for row in rows for step, cell in enumerate(row, start=1) if cell == name]
    return min(steps), max(steps)


STATIC = """\
static batching
        T1  T2  T3  T4  T5  T6  T7  T8  T9  T10 T11 T12
slot 0  S1  S1  S1  S1  S1  S1          S5  S5  S5  S5
slot 1  S2  S2  S2  S2  S2  S2  S2  S2  S6  S6  S6
slot 2  S3  S3  S3  S3  S3              S7  S7  S7
slot 3  S4  S4  S4  S4  S4  S4  S4"""

IN_FLIGHT = """\
in-flight batching
        T1  T2  T3  T4  T5  T6  T7  T8  T9  T10
slot 0  S1  S1  S1  S1  S1  S1  S6  S6  S6
slot 1  S2  S2  S2  S2  S2  S2  S2  S2
slot 2  S3  S3  S3  S3  S3  S5  S5  S5  S5
slot 3  S4  S4  S4  S4  S4  S4  S4  S7  S7  S7"""


def test_a_static_batch_is_closed_until_its_longest_sequence_has_ended():
    rows = timeline(CapacityPolicy.STATIC_BATCH)
    drawing = draw("static batching", rows)
    print(drawing)
    assert span(rows, "S3") == (1, 5) and span(rows, "S2") == (1, 8)
    assert span(rows, "S5")[0] == 9
    assert drawing == STATIC


def test_in_flight_a_sequence_starts_right_after_another_ended():
    rows = timeline(CapacityPolicy.GUARANTEED_NO_EVICT)
    drawing = draw("in-flight batching", rows)
    print(drawing)
    assert span(rows, "S3") == (1, 5) and span(rows, "S2") == (1, 8)
    assert span(rows, "S5")[0] == 6
    assert drawing == IN_FLIGHT
