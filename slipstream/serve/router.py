"""Router: which replica runs a prompt. Numbers in, a number out; it knows no processes.

    cost of a replica = tokens of the prompt that it would have to compute
                      + SEQUENCE_TOKENS for each sequence that it has more than the emptiest

What a replica has cached is not asked for but remembered: the blocks of the prompts that went there, as many as its KV
cache holds, the longest unused forgotten first, as its own cache does (runtime/kv/prefix.py). To be wrong costs time,
no token, so hashes do here. Routers of several fronts tell each other of those (messages.py).
"""

import zlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import NamedTuple, Self

from slipstream.schema.build import RuntimeConfig

SEQUENCE_TOKENS = 64  # a sequence that runs beside others slows them about as much as computing so many tokens does
PART_AHEAD = 4  # nobody gets a prompt who has more than a quarter of a batch more than the emptiest


@dataclass(frozen=True)
class Room:
    """What one replica can have."""

    tokens_per_block: int
    num_blocks: int  # that it may keep for later prompts; 0 without prefix caching
    max_batch_size: int  # sequences that run at a time
    max_sequences: int  # that run and wait

    @classmethod
    def of(cls, runtime: RuntimeConfig, max_sequences: int) -> Self:
        num_blocks = runtime.num_blocks // len(runtime.kv_groups) if runtime.enable_block_reuse else 0
        return cls(runtime.tokens_per_block, num_blocks, runtime.max_batch_size, max_sequences)

    @property
    def most_ahead(self) -> int:
        return max(1, self.max_batch_size // PART_AHEAD)


class Choice(NamedTuple):
    replica: int
    block_keys: list[int]  # of the prompt
    num_known: int = 0  # tokens at the beginning of the prompt that this one has already


@dataclass
class _Replica:
    room: Room
    known: OrderedDict[int, None] = field(default_factory=OrderedDict)  # keys of blocks, the longest unused first
    last_turn: int = -1

    def num_known(self, keys: Sequence[int]) -> int:
        """Tokens at the beginning of a prompt."""
        num_blocks = next((index for index, key in enumerate(keys) if key not in self.known), len(keys))
        return num_blocks * self.room.tokens_per_block

    def note(self, keys: Sequence[int]) -> None:
        for key in reversed(keys):  # a prefix is used at least as late as what follows it
            self.known[key] = None
            self.known.move_to_end(key)
        while len(self.known) > self.room.num_blocks:
            self.known.popitem(last=False)


class Router:
    """Replicas join when they are ready, with nothing cached, and leave when they die."""

    def __init__(self) -> None:
        self._replicas: dict[int, _Replica] = {}
        self._turns = count()

    def join(self, replica: int, room: Room) -> None:
        self._replicas[replica] = _Replica(room)

    def leave(self, replica: int) -> None:
        """Whether or not it had joined."""
        self._replicas.pop(replica, None)

    def choose(
        self, token_ids: Sequence[int], loads: Mapping[int, int], *, cache_salt: str = "", num_sequences: int = 1
    ) -> Choice:
        """Where a prompt goes; the router takes it that it does.

        loads: sequences in flight of each replica that may be chosen, at least one that has joined. The least cost
        wins, of those that can begin at once; if there are none, of those that can take it; of equals the one that was
        not chosen longest. Nobody who has more than Room.most_ahead sequences more than the emptiest is chosen.
        """
        replicas = {index: self._replicas[index] for index in loads}
        sizes = {replica.room.tokens_per_block for replica in replicas.values()}
        keys = {size: list(block_keys(token_ids, cache_salt, size)) for size in sizes}
        emptiest = min(loads.values())

        def cost(index: int) -> tuple[int, int, int]:
            replica, load = replicas[index], loads[index]
            num_tokens = len(token_ids) - replica.num_known(keys[replica.room.tokens_per_block])
            return num_tokens + SEQUENCE_TOKENS * (load - emptiest), load, replica.last_turn

        near = [index for index, load in loads.items() if load - emptiest <= replicas[index].room.most_ahead]
        chosen = min(self._open(near, loads, num_sequences), key=cost)
        replica = replicas[chosen]
        replica.last_turn = next(self._turns)
        own_keys = keys[replica.room.tokens_per_block]
        choice = Choice(chosen, own_keys, replica.num_known(own_keys))
        self.note(chosen, own_keys)
        return choice

    def note(self, replica: int, keys: Sequence[int]) -> None:
        """A prompt with these blocks went there, whoever sent it."""
        if replica in self._replicas:
            self._replicas[replica].note(keys)

    def _open(self, indices: Sequence[int], loads: Mapping[int, int], num_sequences: int) -> Sequence[int]:
        rooms = {index: self._replicas[index].room for index in indices}
        at_once = [index for index in indices if loads[index] + num_sequences <= rooms[index].max_batch_size]
        later = [index for index in indices if loads[index] + num_sequences <= rooms[index].max_sequences]
        return at_once or later or indices


def block_keys(token_ids: Sequence[int], cache_salt: str, tokens_per_block: int) -> Iterator[int]:
    """One for each full block: of it and all before it. Equal where the KV of both would be, in all processes."""
    key = zlib.crc32(cache_salt.encode())  # unlike a text's, the hash of numbers is no secret of a process
    for start in range(0, len(token_ids) - tokens_per_block + 1, tokens_per_block):
        key = hash((key, *token_ids[start : start + tokens_per_block]))
        yield key
