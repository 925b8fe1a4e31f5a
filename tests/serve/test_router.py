"""Router, against what it promises said naively: who gets a prompt, whatever came, ended, died and came back before."""

import json
import subprocess
import sys
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slipstream.serve.router import SEQUENCE_TOKENS, Room, Router

SIZE = 4  # tokens of a block
ROOM = Room(SIZE, num_blocks=10_000, max_batch_size=8, max_sequences=12)


@dataclass(frozen=True)
class Arrival:
    token_ids: tuple[int, ...]
    salt: str = ""
    num_sequences: int = 1


@dataclass(frozen=True)
class End:
    place: int  # among the calls in flight


@dataclass(frozen=True)
class Death:
    replica: int


@dataclass(frozen=True)
class Return:
    replica: int


# Few different tokens, in runs of a block: most prompts have something in common.
prompts = st.lists(st.integers(0, 2), max_size=12).map(lambda runs: tuple(run for run in runs for _ in range(SIZE)))
arrivals = st.builds(
    Arrival,
    st.builds(lambda prompt, rest: prompt + rest, prompts, st.lists(st.integers(0, 2), max_size=3).map(tuple)),
    st.sampled_from(["", "", "mine"]),
    st.sampled_from([1, 1, 1, 3]),
)
events = st.lists(
    st.one_of(arrivals, arrivals, arrivals, st.builds(End, st.integers(0, 100)), st.builds(Death, st.integers(0, 3)),
              st.builds(Return, st.integers(0, 3))), max_size=60,
)  # fmt: skip


class World:
    """Replicas as a server has them: what is in flight, and all prompts that each has had since it came."""

    def __init__(self, num_replicas: int) -> None:
        self.router = Router()
        self.had: dict[int, list[Arrival]] = {}
        self.in_flight: list[tuple[int, int]] = []  # replica, sequences
        self.chosen: list[int] = []
        for replica in range(num_replicas):
            self.come_back(replica)

    def come_back(self, replica: int) -> None:
        if replica not in self.had:
            self.router.join(replica, ROOM)
            self.had[replica] = []

    def die(self, replica: int) -> None:
        self.router.leave(replica)
        self.had.pop(replica, None)
        self.in_flight = [each for each in self.in_flight if each[0] != replica]

    def loads(self) -> dict[int, int]:
        return {each: sum(num for replica, num in self.in_flight if replica == each) for each in self.had}

    def arrive(self, arrival: Arrival) -> int:
        replica = self.router.choose(
            arrival.token_ids, self.loads(), cache_salt=arrival.salt, num_sequences=arrival.num_sequences
        ).replica
        self.had[replica].append(arrival)
        self.in_flight.append((replica, arrival.num_sequences))
        self.chosen.append(replica)
        return replica

    def num_known(self, replica: int, arrival: Arrival) -> int:
        """Tokens, of whole blocks, that some prompt with this salt had before."""
        return max((common(arrival, each) for each in self.had[replica]), default=0)


def common(one: Arrival, other: Arrival) -> int:
    if one.salt != other.salt:
        return 0
    pairs = zip(one.token_ids, other.token_ids, strict=False)
    num = next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(one.token_ids), len(other.token_ids)))
    return num // SIZE * SIZE


def play(num_replicas: int, happened: list[object], look: bool = True) -> World:
    world = World(num_replicas)
    for event in happened:
        match event:
            case Arrival() if world.had:
                before, known = world.loads(), {each: world.num_known(each, event) for each in world.had}
                chosen = world.arrive(event)
                if look:
                    check_choice(event, chosen, before, known)
            case End(place) if world.in_flight:
                world.in_flight.pop(place % len(world.in_flight))
            case Death(replica):
                world.die(replica)
            case Return(replica) if replica < num_replicas:
                world.come_back(replica)
    return world


def check_choice(arrival: Arrival, chosen: int, loads: dict[int, int], known: dict[int, int]) -> None:
    emptiest = min(loads.values())
    assert chosen in loads, "it went to one that is dead"
    assert loads[chosen] - emptiest <= ROOM.most_ahead == 2

    def cost(replica: int) -> int:
        return len(arrival.token_ids) - known[replica] + SEQUENCE_TOKENS * (loads[replica] - emptiest)

    near = [replica for replica in loads if loads[replica] - emptiest <= 2]
    at_once = [replica for replica in near if loads[replica] + arrival.num_sequences <= 8]
    later = [replica for replica in near if loads[replica] + arrival.num_sequences <= 12]
    allowed = at_once or later or near
    assert chosen in allowed
    assert cost(chosen) == min(map(cost, allowed))


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 4), events)
def test_a_prompt_goes_where_it_costs_least_of_those_that_are_not_far_ahead(
    num_replicas: int, happened: list[object]
) -> None:
    play(num_replicas, happened)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 4), events)
def test_it_is_a_function_of_what_happened(num_replicas: int, happened: list[object]) -> None:
    one, other = (play(num_replicas, happened, look=False) for _ in range(2))
    assert one.chosen == other.chosen


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 4), st.lists(arrivals, max_size=60))
def test_while_none_ends_all_have_about_as_many(num_replicas: int, asked: list[Arrival]) -> None:
    world = World(num_replicas)
    most = 1
    for arrival in asked:
        world.arrive(arrival)
        most = max(most, arrival.num_sequences)
        loads = world.loads().values()
        assert max(loads) - min(loads) <= ROOM.most_ahead + most


def test_prompts_that_have_nothing_in_common_go_round() -> None:
    world = World(3)
    for number in range(9):
        replica = world.arrive(Arrival((number,) * 20))
        assert replica == number % 3
        world.in_flight.clear()


def test_a_conversation_stays_where_it_is_until_that_one_dies() -> None:
    world = World(3)
    world.arrive(Arrival((7,) * 40))
    home = world.arrive(Arrival((1,) * 80))
    for turn in range(2, 6):
        world.in_flight = [(home, 1)]  # another one is no reason to leave
        assert world.arrive(Arrival((1,) * 80 * turn)) == home
    world.die(home)
    world.in_flight.clear()
    elsewhere = world.arrive(Arrival((1,) * 480))
    assert elsewhere != home
    world.come_back(home)
    assert world.arrive(Arrival((1,) * 560)) == elsewhere  # who died has forgotten it


def test_a_prefix_that_all_want_is_soon_everywhere() -> None:
    world = World(4)
    shared = (5,) * 2000
    homes = [world.arrive(Arrival(shared + (number,) * 8)) for number in range(32)]
    assert homes[:3] == [0, 0, 0] and world.loads() == dict.fromkeys(range(4), 8)


def test_as_much_is_remembered_as_a_cache_holds_and_the_longest_unused_goes_first() -> None:
    router = Router()
    for replica in (0, 1):
        router.join(replica, Room(SIZE, num_blocks=6, max_batch_size=8, max_sequences=8))
    idle = {0: 0, 1: 0}
    one, other, third = ((number,) * 3 * SIZE for number in (1, 2, 3))
    assert [router.choose(each, idle).replica for each in (one, other, third)] == [0, 1, 0]
    assert router.choose(one, idle).replica == 0 and router.choose((4,) * 3 * SIZE, idle).replica == 1
    assert router.choose((6,) * 3 * SIZE, {0: 0}).replica == 0  # the third is forgotten, not the first
    assert router.choose(one, {0: 0, 1: 0}).replica == 0
    assert router.choose(third, {0: 0, 1: 0}).replica == 1


def test_without_a_prefix_cache_load_alone_counts() -> None:
    router = Router()
    for replica in (0, 1):
        router.join(replica, Room(SIZE, num_blocks=0, max_batch_size=8, max_sequences=8))
    assert [router.choose((1,) * 100, {0: 0, 1: 0}).replica for _ in range(4)] == [0, 1, 0, 1]


@pytest.mark.parametrize("num_sequences", [1, 3])
def test_who_has_room_is_preferred_to_who_knows_the_prefix(num_sequences: int) -> None:
    router = Router()
    for replica in (0, 1):
        router.join(replica, Room(SIZE, num_blocks=1000, max_batch_size=4, max_sequences=4))
    prompt = (1,) * 400
    assert router.choose(prompt, {0: 0, 1: 0}).replica == 0
    full = 5 - num_sequences
    assert router.choose(prompt, {0: full, 1: full - 1}, num_sequences=num_sequences).replica == 1


def test_what_another_front_sent_counts_as_sent() -> None:
    """Keys are numbers that mean the same in every process."""
    one, other = Router(), Router()
    for router in (one, other):
        for replica in (0, 1):
            router.join(replica, ROOM)
    prompt = (1,) * 400
    assert one.choose((2,) * 400, {0: 0, 1: 0}).replica == 0
    choice = one.choose(prompt, {0: 0, 1: 0}, cache_salt="mine")
    assert choice.replica == 1
    other.note(choice.replica, choice.block_keys)
    assert other.choose(prompt, {0: 0, 1: 0}).replica == 0
    assert other.choose(prompt, {0: 0, 1: 0}, cache_salt="mine").replica == 1
    other.leave(1)
    other.note(choice.replica, choice.block_keys)  # late news of one that is gone
    command = "from slipstream.serve.router import block_keys; print(list(block_keys((1,) * 400, 'mine', 4)))"
    said = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True).stdout
    assert json.loads(said) == choice.block_keys
