"""KVCacheManager: who may use which KV block. No tensor is touched here; the workers own those.

    blocks.py   free blocks and reference counts
    prefix.py   blocks kept for reuse, found by their tokens
    here        the block tables of one sequence: admit, extend, commit, release

A sequence has a table for each KV group (schema/kv.py); all of them grow together. In the table of a group with a
window, what no coming token sees is given up after each step, and the null block takes its place.

`can_x` asks and changes nothing; `x` cannot fail after a yes.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from slipstream.runtime.kv.blocks import NULL_BLOCK, BlockPool
from slipstream.runtime.kv.prefix import Match, Node, PrefixTree
from slipstream.schema.kv import KVGroup
from slipstream.schema.step import BlockCopy

__all__ = ["BlockTable", "KVCacheManager", "Match"]


@dataclass(eq=False, slots=True)
class BlockTable:
    """The KV blocks of one sequence, in token order: a row for each block of tokens, with one block id a group.

    rows     |  path: nodes of the prefix tree, full, perhaps shared  |  own blocks, only this sequence writes  |
    tokens   0                                    len(path) * tokens_per_block                 computed ... allocated
    """

    salt: str = ""
    is_reusable: bool = True  # others may find what was computed; False keeps it out of the tree
    path: list[Node] = field(default_factory=list)
    copy_source: Node | None = None  # held until the step that copies from it has run
    position: int = 0  # of the next token to compute: what it and all after it do not see has been given up
    rows: list[list[int]] = field(default_factory=list)
    _changed: set[int] = field(default_factory=set)  # places of rows, since the last take_changes

    def __len__(self) -> int:
        return len(self.rows)

    def take_changes(self) -> tuple[tuple[int, tuple[int, ...]], ...]:
        """The rows that were added or replaced since the last call, with their places: none in most steps."""
        if not self._changed:
            return ()
        changes = tuple((place, tuple(self.rows[place])) for place in sorted(self._changed))
        self._changed.clear()
        return changes

    def _append(self, row: list[int]) -> None:
        self._changed.add(len(self.rows))
        self.rows.append(row)

    def _enter(self, node: Node) -> None:
        """The next row is in the tree now, perhaps as other blocks of equal contents."""
        index = len(self.path)
        self.path.append(node)
        row = [own and theirs for own, theirs in zip(self.rows[index], node.block_ids, strict=True)]
        if self.rows[index] != row:
            self.rows[index] = row
            self._changed.add(index)

    def _clear(self) -> None:
        self.path, self.copy_source, self.position, self.rows = [], None, 0, []
        self._changed.clear()


class KVCacheManager:
    def __init__(
        self,
        num_blocks: int,
        tokens_per_block: int,
        enable_block_reuse: bool = True,
        groups: Sequence[KVGroup] = (KVGroup(),),
    ) -> None:
        self.tokens_per_block = tokens_per_block
        self._groups = groups
        self._windowed = [index for index, group in enumerate(groups) if group.window]
        self._pool = BlockPool(num_blocks, len(groups))
        self._tree = PrefixTree(self._pool, tokens_per_block, groups)  # stays empty without reuse
        self._enable_block_reuse = enable_block_reuse

    @property
    def num_total(self) -> int:
        """Blocks that sequences can use: all but the null block."""
        return self._pool.num_usable

    @property
    def num_available(self) -> int:
        """Blocks that can be had now: free ones, and idle ones of the prefix tree."""
        return self._pool.num_free + self._tree.num_idle

    @property
    def has_windows(self) -> bool:
        return bool(self._windowed)

    @property
    def num_in_windows(self) -> int:
        """Blocks that sequences hold now in groups with a window; `promised` counts these among its own."""
        return sum(self._pool.num_held[group] for group in self._windowed)

    def max_blocks(self, num_tokens: int, chunk: int) -> int:
        """Most blocks that one sequence holds at once on its way to num_tokens, `chunk` tokens a step at most."""
        return sum(group.max_blocks(num_tokens, chunk, self.tokens_per_block) for group in self._groups)

    def match(self, salt: str, token_ids: Sequence[int]) -> Match:
        """The part of token_ids whose KV exists, as far as the next token sees it: at most all but the last token."""
        return self._tree.match(salt, token_ids)

    def can_admit(self, match: Match, num_tokens: int) -> bool:
        """Whether a table can start from `match` and be extended to num_tokens."""
        num_new = (self._num_rows(num_tokens) - len(match.path)) * len(self._groups)
        return num_new + self._num_pinned(match, range(len(self._groups))) <= self.num_available

    def can_promise(self, match: Match, num_tokens: int, chunk: int, num_reserved: int) -> bool:
        """Whether a table can start from `match` and come to num_tokens for certain, num_reserved blocks being others'.

        In a group without a window that costs its new blocks, and those idle blocks that it holds from now on and
        nobody can evict. In a group with one, the most it ever holds: what it shares today it will leave behind, and
        others may not.
        """
        full = [index for index in range(len(self._groups)) if index not in self._windowed]
        num_new = (self._num_rows(num_tokens) - len(match.path)) * len(full)
        num_needed = num_new + self._num_pinned(match, full)
        num_needed += self._max_in_windows(num_tokens, chunk, has_source=match.source is not None)
        return num_needed <= self.num_available - num_reserved

    def promised(self, table: BlockTable, num_tokens: int, chunk: int) -> int:
        """Blocks that a table admitted by can_promise may still take, and those it holds in groups with a window."""
        num_new = (self._num_rows(num_tokens) - len(table.rows)) * (len(self._groups) - len(self._windowed))
        if not self._windowed:
            return num_new
        return num_new + self._max_in_windows(num_tokens, chunk, has_source=table.copy_source is not None)

    def _max_in_windows(self, num_tokens: int, chunk: int, *, has_source: bool) -> int:
        size = self.tokens_per_block
        return sum(self._groups[index].max_blocks(num_tokens, chunk, size) + has_source for index in self._windowed)

    def _num_rows(self, num_tokens: int) -> int:
        return -(-num_tokens // self.tokens_per_block)

    def _num_pinned(self, match: Match, groups: Iterable[int]) -> int:
        """Idle blocks of these groups that a table of this match would hold."""
        rows = self._rows_in_sight(match)
        if match.source is not None:
            rows.append(match.source.block_ids)
        return sum(self._tree.is_idle(row[group]) for group in groups for row in rows)

    def _rows_in_sight(self, match: Match) -> list[list[int]]:
        """The block ids of a match's path, but for those that its next token does not see."""
        hidden = [group.hidden(match.num_tokens, self.tokens_per_block) for group in self._groups]
        return [
            [NULL_BLOCK if index in out else block_id for block_id, out in zip(node.block_ids, hidden, strict=True)]
            for index, node in enumerate(match.path)
        ]

    def admit(self, table: BlockTable, match: Match) -> tuple[BlockCopy, ...]:
        """Start an empty table with what was matched. The copies must be done before the next step runs."""
        for node, row in zip(match.path, self._rows_in_sight(match), strict=True):
            self._tree.hold(node, row)
            table._append(row)
        table.path = list(match.path)
        table.position = match.num_tokens
        if match.source is None:
            return ()
        # Held first: a target may come from an eviction, and that must not take a source.
        self._tree.hold(match.source, match.source.block_ids)
        table.copy_source = match.source
        targets = self._allocate()
        table._append(targets)
        pairs = zip(match.source.block_ids, targets, strict=True)
        return tuple(BlockCopy(source, target, match.num_copied) for source, target in pairs)

    def can_extend(self, table: BlockTable, num_tokens: int, num_spared: int = 0) -> bool:
        """num_spared: rows that must then be left for other tables."""
        num_new = self._num_rows(num_tokens) - len(table.rows)
        return (num_new + num_spared) * len(self._groups) <= self.num_available

    def extend(self, table: BlockTable, num_tokens: int) -> None:
        """Give the table the blocks it lacks to hold num_tokens."""
        for _ in range(len(table.rows), self._num_rows(num_tokens)):
            table._append(self._allocate())

    def receive(self, table: BlockTable, num_tokens: int) -> tuple[tuple[int, ...], ...]:
        """Give the table the blocks it lacks to hold num_tokens that another engine has computed, as if that had been
        done here: without what the next token does not see. Returns the new rows."""
        self._give_up_hidden(table, num_tokens)
        table.position, first = num_tokens, len(table.rows)
        hidden = [group.hidden(num_tokens, self.tokens_per_block) for group in self._groups]
        for place in range(first, self._num_rows(num_tokens)):
            table._append(self._allocate([place in out for out in hidden]))
        return tuple(map(tuple, table.rows[first:]))

    def commit(self, table: BlockTable, token_ids: Sequence[int], num_computed: int) -> None:
        """A step has run: its copy is done, blocks it filled can be found by others, windows have moved.

        Where another sequence has computed the same block meanwhile, the table takes that one: block ids of tokens
        computed long ago may change here.
        """
        if table.copy_source is not None:
            self._release_copy_source(table)
        size = self.tokens_per_block
        if self._keeps(table) and num_computed >= (len(table.path) + 1) * size:
            for index in range(len(table.path), num_computed // size):
                tokens = tuple(token_ids[index * size : (index + 1) * size])
                parent = table.path[-1] if table.path else None
                table._enter(self._tree.insert(table.salt, parent, tokens, table.rows[index]))
        if self._windowed:
            self._give_up_hidden(table, num_computed)
        table.position = num_computed

    def _give_up_hidden(self, table: BlockTable, position: int) -> None:
        """Let go of the blocks that the token at `position` and those after it do not see."""
        for index in self._windowed:
            group = self._groups[index]
            before = group.hidden(table.position, self.tokens_per_block)
            after = group.hidden(position, self.tokens_per_block)
            for place in range(before.stop, min(after.stop, len(table.rows))):
                block_id, table.rows[place][index] = table.rows[place][index], NULL_BLOCK
                table._changed.add(place)
                if place < len(table.path):
                    self._tree.release_block(table.path[place], block_id)
                else:
                    self._forget(block_id)

    def release(self, table: BlockTable, token_ids: Sequence[int], num_computed: int) -> None:
        """Empty the table after its last commit; what was computed stays findable, down to the last, partial block."""
        tokens = tuple(token_ids[len(table.path) * self.tokens_per_block : num_computed])
        if tokens and self._keeps(table):
            parent = table.path[-1] if table.path else None
            self._tree.insert_leaf(table.salt, parent, tokens, table.rows.pop(len(table.path)))
        self.discard(table)

    def discard(self, table: BlockTable) -> None:
        """Empty the table; blocks that are not in the tree are forgotten (a failed step may have half written them)."""
        self._release_copy_source(table)
        for row in table.rows[len(table.path) :]:
            for block_id in row:
                if block_id != NULL_BLOCK:
                    self._forget(block_id)
        rows = table.rows[: len(table.path)]
        for node, row in zip(reversed(table.path), reversed(rows), strict=True):  # deepest first: eviction relies on it
            self._tree.release(node, row)
        table._clear()

    def _keeps(self, table: BlockTable) -> bool:
        return self._enable_block_reuse and table.is_reusable

    def _release_copy_source(self, table: BlockTable) -> None:
        if table.copy_source is not None:
            self._tree.release(table.copy_source, table.copy_source.block_ids)
            table.copy_source = None

    def _allocate(self, hidden: Sequence[bool] = ()) -> list[int]:
        """A row: a block for each group, but for those where nobody will see it."""
        row = []
        for group in range(len(self._groups)):
            if hidden and hidden[group]:
                row.append(NULL_BLOCK)
                continue
            if not self._pool.num_free:
                self._tree.evict()
            row.append(self._pool.allocate(group))
        return row

    def _forget(self, block_id: int) -> None:
        """A sequence's own block, which no other has seen."""
        self._pool.release(block_id)
        self._pool.free(block_id)

    def check(self, tables: Iterable[BlockTable]) -> None:
        """Prove that `tables`, the free list and the tree account for every block exactly once."""
        self._pool.check()
        self._tree.check()
        in_tree = {block_id for node in self._tree.nodes() for block_id in node.block_ids}
        num_holders = dict.fromkeys(self._tree.nodes(), 0)
        expected = [0] * self._pool.num_blocks
        for table in tables:
            self._check_table(table, in_tree)
            sources = [] if table.copy_source is None else [table.copy_source]
            for node in [*table.path, *sources]:
                num_holders[node] += 1
            for row in [*table.rows, *(source.block_ids for source in sources)]:
                for block_id in row:
                    expected[block_id] += block_id != NULL_BLOCK
        actual = [self._pool.references(block_id) for block_id in range(self._pool.num_blocks)]
        assert actual == expected, f"reference counts are {actual}, but the tables hold {expected}"
        assert all(node.num_holders == count for node, count in num_holders.items()), "a node's holders are miscounted"
        num_held = sum(count > 0 for count in actual)
        assert num_held + self.num_available == self.num_total, "a block is neither free, held nor idle"

    def _check_table(self, table: BlockTable, in_tree: set[int]) -> None:
        hidden = [group.hidden(table.position, self.tokens_per_block) for group in self._groups]
        for index, row in enumerate(table.rows):
            for block_id, out in zip(row, hidden, strict=True):
                assert (block_id == NULL_BLOCK) == (index in out), f"row {index} is {row}, but {hidden} are hidden"
            if index < len(table.path):
                shared = table.path[index].block_ids
                assert all(mine in (NULL_BLOCK, its) for mine, its in zip(row, shared, strict=True)), (
                    f"row {index} is {row}, but its node has {shared}"
                )
            else:
                own = {block_id for block_id in row if block_id != NULL_BLOCK}
                assert in_tree.isdisjoint(own), f"own blocks {own} are in the prefix tree"
        for node, parent in zip(table.path, [None, *table.path], strict=False):
            assert parent is None or node.parent is parent, "a table's path is not a path of the prefix tree"
