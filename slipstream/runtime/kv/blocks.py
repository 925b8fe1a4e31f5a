"""BlockPool: which KV blocks are free, and how many holders each of the others has.

A block id is an index into the workers' KV tensors. Block 0 is the null block: workers pad their tables with it, and
it stands where a table has no block any more, so it is never given out. `num_blocks` is the size of the tensor and
includes it; ids 1 .. num_blocks - 1 are usable. Any block may serve any KV group (schema/kv.py), one at a time.

    free   reference 0, in the free list; the contents mean nothing
    held   reference > 0: one for each sequence's block table it is in, and for each copy that still has to read it
    idle   reference 0, not free: the prefix tree keeps the contents until somebody wants them, or the space
"""

from slipstream.errors import CapacityError

NULL_BLOCK = 0


class BlockPool:
    def __init__(self, num_blocks: int, num_groups: int = 1) -> None:
        if num_blocks < 2:
            raise CapacityError(f"num_blocks is {num_blocks}; block 0 is padding, so a KV pool needs at least 2.")
        self.num_blocks = num_blocks
        self.num_held = [0] * num_groups  # blocks with a reference, by the group they serve
        self._references = [0] * num_blocks
        self._group = [0] * num_blocks
        self._free = list(range(num_blocks - 1, NULL_BLOCK, -1))  # a stack: the lowest id is on top at first

    @property
    def num_usable(self) -> int:
        return self.num_blocks - 1

    @property
    def num_free(self) -> int:
        return len(self._free)

    def references(self, block_id: int) -> int:
        return self._references[block_id]

    def allocate(self, group: int = 0) -> int:
        """A free block, with one reference."""
        block_id = self._free.pop()
        self._group[block_id] = group
        self.retain(block_id)
        return block_id

    def retain(self, block_id: int) -> None:
        self._references[block_id] += 1
        if self._references[block_id] == 1:
            self.num_held[self._group[block_id]] += 1

    def release(self, block_id: int) -> bool:
        """Give one reference back. True if it was the last: the caller frees the block, or keeps it idle."""
        self._references[block_id] -= 1
        if self._references[block_id]:
            return False
        self.num_held[self._group[block_id]] -= 1
        return True

    def free(self, block_id: int) -> None:
        """Forget the contents of a block nobody refers to."""
        self._free.append(block_id)

    def check(self) -> None:
        free = set(self._free)
        assert len(free) == len(self._free), f"a block is twice in the free list {self._free}"
        assert NULL_BLOCK not in free, "the null block is in the free list"
        assert self._references[NULL_BLOCK] == 0, "the null block is held"
        assert min(self._references) >= 0, f"a reference count is negative: {self._references}"
        held = [block_id for block_id, count in enumerate(self._references) if count]
        assert free.isdisjoint(held), f"blocks {free.intersection(held)} are free and held"
        groups = [self._group[block_id] for block_id in held]
        expected = [groups.count(group) for group in range(len(self.num_held))]
        assert self.num_held == expected, f"{self.num_held} blocks are counted as held, {expected} are"
