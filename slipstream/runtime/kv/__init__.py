"""KVCacheManager: who may use which KV block. No tensor is touched here; the workers own those.

    blocks.py   free blocks and reference counts
    prefix.py   blocks kept for reuse, found by their tokens
    here        the block table of one sequence: admit, extend, commit, release

`can_x` asks and changes nothing; `x` cannot fail after a yes.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from slipstream.runtime.kv.blocks import BlockPool
from slipstream.runtime.kv.prefix import Match, Node, PrefixTree
from slipstream.schema.step import BlockCopy

__all__ = ["BlockTable", "KVCacheManager", "Match"]


@dataclass(eq=False, slots=True)
class BlockTable:
    """The KV blocks of one sequence, in token order.

    block_ids   |  path: nodes of the prefix tree, full, perhaps shared  |  own blocks, only this sequence writes  |
    tokens      0                                    len(path) * tokens_per_block                 computed ... allocated
    """

    salt: str = ""
    path: list[Node] = field(default_factory=list)
    copy_source: Node | None = None  # held until the step that copies from it has run
    _block_ids: list[int] = field(default_factory=list)
    _as_tuple: tuple[int, ...] | None = ()  # None once out of date: most steps change no table

    def __len__(self) -> int:
        return len(self._block_ids)

    @property
    def block_ids(self) -> tuple[int, ...]:
        if self._as_tuple is None:
            self._as_tuple = tuple(self._block_ids)
        return self._as_tuple

    def _append(self, block_id: int) -> None:
        self._block_ids.append(block_id)
        self._as_tuple = None

    def _enter(self, node: Node) -> None:
        """The next block is in the tree now, perhaps as another block of equal contents."""
        index = len(self.path)
        self.path.append(node)
        if self._block_ids[index] != node.block_id:
            self._block_ids[index] = node.block_id
            self._as_tuple = None

    def _clear(self) -> None:
        self.path, self.copy_source, self._block_ids, self._as_tuple = [], None, [], ()


class KVCacheManager:
    def __init__(self, num_blocks: int, tokens_per_block: int, enable_block_reuse: bool = True) -> None:
        self.tokens_per_block = tokens_per_block
        self._pool = BlockPool(num_blocks)
        self._tree = PrefixTree(self._pool, tokens_per_block)  # stays empty without reuse
        self._enable_block_reuse = enable_block_reuse

    @property
    def num_total(self) -> int:
        """Blocks that sequences can use: all but the null block."""
        return self._pool.num_usable

    @property
    def num_available(self) -> int:
        """Blocks that can be had now: free ones, and idle ones of the prefix tree."""
        return self._pool.num_free + self._tree.num_idle

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.tokens_per_block)

    def match(self, salt: str, token_ids: Sequence[int]) -> Match:
        """The part of token_ids whose KV exists: at most all but the last token."""
        return self._tree.match(salt, token_ids)

    def can_admit(self, match: Match, num_tokens: int, num_reserved: int = 0) -> bool:
        """Whether a table for num_tokens can start from `match` and leave num_reserved blocks to others.

        It costs its new blocks, and those idle blocks that it holds from now on and nobody can evict.
        """
        num_new = self.num_blocks_for(num_tokens) - len(match.path)
        num_idle = sum(map(self._tree.is_idle, match.path))
        if match.source is not None:
            num_idle += self._tree.is_idle(match.source)
        return num_new + num_idle <= self.num_available - num_reserved

    def admit(self, table: BlockTable, match: Match) -> BlockCopy | None:
        """Start an empty table with what was matched. The copy, if any, must be done before the next step runs."""
        for node in match.path:
            self._tree.hold(node)
            table._append(node.block_id)
        table.path = list(match.path)
        if match.source is None:
            return None
        # Held first: the target may come from an eviction, and that must not take the source.
        self._tree.hold(match.source)
        table.copy_source = match.source
        target = self._allocate()
        table._append(target)
        return BlockCopy(match.source.block_id, target, match.num_copied)

    def can_extend(self, table: BlockTable, num_tokens: int) -> bool:
        return self.num_blocks_for(num_tokens) - len(table) <= self.num_available

    def extend(self, table: BlockTable, num_tokens: int) -> None:
        """Give the table the blocks it lacks to hold num_tokens."""
        while len(table) < self.num_blocks_for(num_tokens):
            table._append(self._allocate())

    def commit(self, table: BlockTable, token_ids: Sequence[int], num_computed: int) -> None:
        """A step has run: its copy is done, and blocks it filled can be found by others.

        Where another sequence has computed the same block meanwhile, the table takes that one: block ids of tokens
        computed long ago may change here.
        """
        self._release_copy_source(table)
        if not self._enable_block_reuse:
            return
        size = self.tokens_per_block
        for index in range(len(table.path), num_computed // size):
            tokens = tuple(token_ids[index * size : (index + 1) * size])
            parent = table.path[-1] if table.path else None
            table._enter(self._tree.insert(table.salt, parent, tokens, table._block_ids[index]))

    def release(self, table: BlockTable, token_ids: Sequence[int], num_computed: int) -> None:
        """Empty the table after its last commit; what was computed stays findable, down to the last, partial block."""
        tokens = tuple(token_ids[len(table.path) * self.tokens_per_block : num_computed])
        if tokens and self._enable_block_reuse:
            parent = table.path[-1] if table.path else None
            self._tree.insert_leaf(table.salt, parent, tokens, table._block_ids.pop(len(table.path)))
        self.discard(table)

    def discard(self, table: BlockTable) -> None:
        """Empty the table; blocks that are not in the tree are forgotten (a failed step may have half written them)."""
        self._release_copy_source(table)
        for block_id in table._block_ids[len(table.path) :]:
            self._pool.release(block_id)
            self._pool.free(block_id)
        for node in reversed(table.path):  # deepest first: eviction relies on it
            self._tree.release(node)
        table._clear()

    def _release_copy_source(self, table: BlockTable) -> None:
        if table.copy_source is not None:
            self._tree.release(table.copy_source)
            table.copy_source = None

    def _allocate(self) -> int:
        if not self._pool.num_free:
            self._tree.evict()
        return self._pool.allocate()

    def check(self, tables: Iterable[BlockTable]) -> None:
        """Prove that `tables`, the free list and the tree account for every block exactly once."""
        self._pool.check()
        self._tree.check()
        in_tree = {node.block_id for node in self._tree.nodes()}
        expected = [0] * self._pool.num_blocks
        for table in tables:
            assert table.block_ids == tuple(table._block_ids), "a table's tuple is out of date"
            path_ids = tuple(node.block_id for node in table.path)
            assert table.block_ids[: len(path_ids)] == path_ids, f"{table.block_ids} does not begin with {path_ids}"
            own = table.block_ids[len(path_ids) :]
            assert in_tree.isdisjoint(own), f"own blocks {own} are in the prefix tree"
            assert set(path_ids) <= in_tree, f"shared blocks {path_ids} are not in the prefix tree"
            for node, parent in zip(table.path, [None, *table.path], strict=False):
                assert parent is None or node.parent is parent, f"{path_ids} is not a path of the prefix tree"
            for block_id in table.block_ids + ((table.copy_source.block_id,) if table.copy_source else ()):
                expected[block_id] += 1
        actual = [self._pool.references(block_id) for block_id in range(self._pool.num_blocks)]
        assert actual == expected, f"reference counts are {actual}, but the tables hold {expected}"
        num_held = sum(count > 0 for count in actual)
        assert num_held + self.num_available == self.num_total, "a block is neither free, held nor idle"
