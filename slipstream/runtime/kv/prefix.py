"""PrefixTree: KV blocks that are worth keeping, found by the tokens they were computed from.

    salt "" ─ root ─┬─ (1, 2, 3, 4) ─┬─ (5, 6, 7, 8)
                    │                └─ (5, 6)            a partial leaf: its blocks hold two computed tokens
                    └─ (9, 9)
    salt "b" ─ root ─── (1, 2, 3, 4)                      never shared with the one above

A node is the tokens of a block and, for each KV group (schema/kv.py), the block that holds what they became there; the
path from the root spells everything its KV depends on. Keys are the tokens themselves, not hashes, so two prefixes
cannot be mistaken for one another.

A sequence is on every node of its path, and holds those of their blocks that it still sees: of a group without a window
all of them, of another the newest. What it no longer sees stays findable until the space is wanted: a prefix is usable
where each group has what the next token sees. So a node may lack a group's block, and be a mere signpost to the nodes
below it; it goes with the last of its blocks, children and holders.

Sequences let go of their nodes deepest first. Hence, in the order in which blocks without a window became idle,
children come before their parents, and eviction, which takes the longest idle block, takes leaves first.
(Related: SGLang's RadixAttention, arXiv:2312.07104; a block tree as in TensorRT-LLM's KV cache reuse.)
"""

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from slipstream.runtime.kv.blocks import NULL_BLOCK, BlockPool
from slipstream.schema.kv import KVGroup

Tokens = tuple[int, ...]


@dataclass(eq=False, slots=True)
class Node:
    block_ids: list[int]  # one a KV group; NULL_BLOCK where the group's block was given up
    tokens: Tokens  # a full block, or fewer: then the node is a partial leaf
    parent: "Node | None" = field(default=None, repr=False)
    salt: str = ""  # on the root only
    num_holders: int = 0  # sequences that have it on their path, or copy from it
    children: dict[Tokens, "Node"] = field(default_factory=dict, repr=False)
    # The keys of `children`, sorted: the child that shares most tokens with some query is a neighbour of the place
    # where the query would be inserted, so the search for it is a bisection whatever the number of children.
    keys: list[Tokens] = field(default_factory=list, repr=False)


@dataclass(frozen=True, slots=True)
class Match:
    """What the tree knows of a prompt.

    tokens   |  path[0]  |  path[1]  |  num_copied  |  to compute ...
    blocks   |  shared   |  shared   |  own block, its head copied from `source`
             0                                      num_tokens
    """

    path: tuple[Node, ...] = ()
    num_tokens: int = 0
    source: Node | None = None
    num_copied: int = 0

    def without_copy(self) -> "Match":
        return replace(self, num_tokens=self.num_tokens - self.num_copied, source=None, num_copied=0)


class PrefixTree:
    def __init__(self, pool: BlockPool, tokens_per_block: int, groups: Sequence[KVGroup] = (KVGroup(),)) -> None:
        self._pool = pool
        self._tokens_per_block = tokens_per_block
        self._groups = groups
        self._roots: dict[str, Node] = {}  # only salts that have a node
        self._idle: OrderedDict[int, Node] = OrderedDict()  # blocks without a reference, the longest idle first

    @property
    def num_idle(self) -> int:
        """Blocks that can be evicted."""
        return len(self._idle)

    def is_idle(self, block_id: int) -> bool:
        return block_id in self._idle

    def match(self, salt: str, token_ids: Sequence[int]) -> Match:
        """The longest usable prefix of token_ids, short of the last token, which must be computed to have logits."""
        limit = len(token_ids) - 1
        node = self._roots.get(salt)
        path: list[Node] = []
        while node is not None:
            start = len(path) * self._tokens_per_block
            tokens = tuple(token_ids[start : min(start + self._tokens_per_block, limit)])
            child = node.children.get(tokens) if len(tokens) == self._tokens_per_block else None
            if child is None:
                num_usable = self._num_usable(path)
                if num_usable < len(path):
                    return Match(tuple(path[:num_usable]), num_usable * self._tokens_per_block)
                source, num_copied = _closest_child(node, tokens)
                return Match(tuple(path), start + num_copied, source, num_copied)
            path.append(child)
            node = child
        return Match()

    def _num_usable(self, path: list[Node]) -> int:
        """The longest part of a path whose missing blocks are all out of sight for the token after it."""
        if not any(NULL_BLOCK in node.block_ids for node in path):
            return len(path)
        longest = 0
        missing: list[list[int]] = [[] for _ in self._groups]  # places without a block, of each group
        for index, node in enumerate(path):
            for group, block_id in enumerate(node.block_ids):
                if block_id == NULL_BLOCK:
                    missing[group].append(index)
            end = (index + 1) * self._tokens_per_block
            hidden = [group.hidden(end, self._tokens_per_block) for group in self._groups]
            if all(not gone or (gone[0] in out and gone[-1] in out) for gone, out in zip(missing, hidden, strict=True)):
                longest = index + 1
        return longest

    def hold(self, node: Node, block_ids: Sequence[int]) -> None:
        """Be on a node and hold these of its blocks; NULL_BLOCK for one that is not needed."""
        node.num_holders += 1
        for block_id in block_ids:
            if block_id != NULL_BLOCK:
                self._hold_block(block_id)

    def release(self, node: Node, block_ids: Sequence[int]) -> None:
        """Leave a node and let go of those of its blocks that were held until now."""
        node.num_holders -= 1
        for block_id in block_ids:
            if block_id != NULL_BLOCK:
                self.release_block(node, block_id)
        self._prune(node)

    def release_block(self, node: Node, block_id: int) -> None:
        """Stay on a node and let go of one of its blocks."""
        if self._pool.release(block_id):
            self._idle[block_id] = node

    def _hold_block(self, block_id: int) -> None:
        self._idle.pop(block_id, None)
        self._pool.retain(block_id)

    def insert(self, salt: str, parent: Node | None, tokens: Tokens, block_ids: Sequence[int]) -> Node:
        """Put held, full blocks below `parent` (None is the root), or find their equals there; NULL_BLOCK for none.

        Where the tree had a block already, the caller's reference moves to that one and the caller's own is freed: the
        caller must use the returned node's block_ids from here on.
        """
        parent = parent or self._root(salt)
        known = parent.children.get(tokens)
        if known is None:
            node = self._attach(parent, tokens, block_ids)
            node.num_holders = 1
            return node
        known.num_holders += 1
        for group, block_id in enumerate(block_ids):
            if known.block_ids[group] == NULL_BLOCK:
                known.block_ids[group] = block_id
            elif block_id != NULL_BLOCK:
                self._hold_block(known.block_ids[group])
                self._pool.release(block_id)
                self._pool.free(block_id)
        return known

    def insert_leaf(self, salt: str, parent: Node | None, tokens: Tokens, block_ids: Sequence[int]) -> None:
        """Give held, partly filled blocks to the tree; it keeps them idle unless a sibling begins with their tokens."""
        parent = parent or self._root(salt)
        for block_id in block_ids:
            self._pool.release(block_id)
        index = bisect_left(parent.keys, tokens)
        if index < len(parent.keys) and parent.keys[index][: len(tokens)] == tokens:
            for block_id in block_ids:
                self._pool.free(block_id)
            for block_id in parent.children[parent.keys[index]].block_ids:
                if block_id in self._idle:
                    self._idle.move_to_end(block_id)  # as good as just used
        else:
            node = self._attach(parent, tokens, block_ids)
            self._idle |= dict.fromkeys(block_ids, node)

    def evict(self) -> None:
        """Free the block that has been idle longest. There must be one."""
        self._forget(next(iter(self._idle)))

    def _forget(self, block_id: int) -> None:
        node = self._idle.pop(block_id)
        node.block_ids[node.block_ids.index(block_id)] = NULL_BLOCK
        self._pool.free(block_id)
        self._prune(node)

    def _root(self, salt: str) -> Node:
        return self._roots.setdefault(salt, Node([], (), salt=salt))

    def _attach(self, parent: Node, tokens: Tokens, block_ids: Sequence[int]) -> Node:
        """A new node. A partial leaf that it makes superfluous goes."""
        index = bisect_left(parent.keys, tokens)
        if index > 0 and tokens[: len(parent.keys[index - 1])] == parent.keys[index - 1]:
            shorter = parent.children[parent.keys[index - 1]]
            if not shorter.num_holders:
                for block_id in [block_id for block_id in shorter.block_ids if block_id != NULL_BLOCK]:
                    self._forget(block_id)
        node = Node(list(block_ids), tokens, parent)
        parent.children[tokens] = node
        insort(parent.keys, tokens)
        if parent.parent is None:
            self._roots[parent.salt] = parent  # forgetting the shorter leaf may have removed an empty root
        return node

    def _prune(self, node: Node) -> None:
        """Remove a node nothing is left of, and the signposts that only led to it."""
        while node.parent is not None and not (node.num_holders or node.children or any(node.block_ids)):
            parent = node.parent
            del parent.children[node.tokens]
            del parent.keys[bisect_left(parent.keys, node.tokens)]
            node = parent
        if node.parent is None and not node.children:
            self._roots.pop(node.salt, None)

    def nodes(self) -> Iterator[Node]:
        """All nodes, parents before children, without the roots."""
        stack = [child for root in self._roots.values() for child in root.children.values()]
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children.values())

    def check(self) -> None:
        place = {block_id: index for index, block_id in enumerate(self._idle)}
        found = list(self.nodes())
        block_ids = [block_id for node in found for block_id in node.block_ids if block_id != NULL_BLOCK]
        assert len(set(block_ids)) == len(block_ids), "a block is twice in the prefix tree"
        assert all(block_id in node.block_ids for block_id, node in self._idle.items()), "an idle block left its node"
        assert set(self._idle.values()) <= set(found), "an idle block is not in the prefix tree"
        assert all(root.children for root in self._roots.values()), "an empty root was kept"
        for node in found:
            self._check_node(node, place)

    def _check_node(self, node: Node, place: dict[int, int]) -> None:
        parent = node.parent
        assert parent is not None and parent.children.get(node.tokens) is node, f"{node.tokens} has lost its parent"
        assert node.keys == sorted(node.children), f"the keys below {node.tokens} are out of order"
        assert 0 < len(node.tokens) <= self._tokens_per_block, f"{node.tokens} is not the contents of a block"
        full = len(node.tokens) == self._tokens_per_block
        assert full or not node.children, f"partial leaf {node.tokens} has children"
        assert node.num_holders or node.children or any(node.block_ids), f"{node.tokens} is empty and was kept"
        assert len(node.block_ids) == len(self._groups), f"{node.tokens} has blocks {node.block_ids}"
        for index, block_id in enumerate(node.block_ids):
            if block_id == NULL_BLOCK:
                continue
            is_idle = block_id in place
            assert (self._pool.references(block_id) == 0) == is_idle, f"{node.tokens} idle or not?"
            if self._groups[index].window or parent.parent is None:
                continue
            above = parent.block_ids[index]
            assert above != NULL_BLOCK, f"{node.tokens} was kept longer than its parent"
            if above in place:
                assert is_idle, f"{node.tokens} is held and its parent is idle"
                assert place[block_id] < place[above], f"{node.tokens} would be evicted after its parent"


def _closest_child(node: Node, tokens: Tokens) -> tuple[Node | None, int]:
    """The child that has most leading tokens in common with `tokens`, and how many; None where no token is.

    Or where one of its blocks is gone: a copy needs them all.
    """
    index = bisect_left(node.keys, tokens)
    best, num_common = None, 0
    for key in node.keys[max(index - 1, 0) : index + 1]:
        num = _num_common(key, tokens)
        if num > num_common:
            best, num_common = node.children[key], num
    return (None, 0) if best is None or NULL_BLOCK in best.block_ids else (best, num_common)


def _num_common(a: Tokens, b: Tokens) -> int:
    num = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        num += 1
    return num
