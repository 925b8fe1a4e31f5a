"""BlockPool: which KV blocks are free, and how many holders each of the others has.

A block id is an index into the workers' KV tensors. Block 0 is the null block: workers pad their tables with it, so it
is never given out. `num_blocks` is the size of the tensor and includes it; ids 1 .. num_blocks - 1 are usable.

    free   reference 0, in the free list; the contents mean nothing
    held   reference > 0: one for each sequence's block table it is in, and for each copy that still has to read it
    idle   reference 0, not free: the prefix tree keeps the contents until somebody wants them, or the space
"""

from slipstream.errors import CapacityError

NULL_BLOCK = 0


class BlockPool:
    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 2:
            raise CapacityError(f"num_blocks is {num_blocks}; block 0 is padding, so a KV pool needs at least 2.")
        self.num_blocks = num_blocks
        self._references = [0] * num_blocks
        self._free = list(range(num_blocks - 1, NULL_BLOCK, -1))  # a stack: the lowest id is on top at first

    @property
    def num_usable(self) -> int:
        return self.num_blocks - 1

    @property
    def num_free(self) -> int:
        return len(self._free)

    def references(self, block_id: int) -> int:
        return self._references[block_id]

    def allocate(self) -> int:
        """A free block, with one reference."""
        block_id = self._free.pop()
        self._references[block_id] = 1
        return block_id

    def retain(self, block_id: int) -> None:
        self._references[block_id] += 1

    def release(self, block_id: int) -> bool:
        """Give one reference back. True if it was the last: the caller frees the block, or keeps it idle."""
        self._references[block_id] -= 1
        return self._references[block_id] == 0

    def free(self, block_id: int) -> None:
        """Forget the contents of a block nobody refers to."""
        self._free.append(block_id)

    def check(self) -> None:
        free = set(self._free)
        assert len(free) == len(self._free), f"a block is twice in the free list {self._free}"
        assert NULL_BLOCK not in free, "the null block is in the free list"
        assert self._references[NULL_BLOCK] == 0, "the null block is held"
        assert min(self._references) >= 0, f"a reference count is negative: {self._references}"
        held = [block_id for block_id in free if self._references[block_id]]
        assert not held, f"blocks {held} are free and held"
