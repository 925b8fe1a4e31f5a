"""PrefixTree: KV blocks that are worth keeping, found by the tokens they were computed from.

    salt "" ─ root ─┬─ (1, 2, 3, 4) ─┬─ (5, 6, 7, 8)
                    │                └─ (5, 6)            a partial leaf: its block holds two computed tokens
                    └─ (9, 9)
    salt "b" ─ root ─── (1, 2, 3, 4)                      never shared with the one above

A node is a block and the tokens in it; the path from the root spells everything its KV depends on. Keys are the tokens
themselves, not hashes, so two prefixes cannot be mistaken for one another.

Who holds what: a sequence holds every node on its path, so a held node's parent is held too. It lets go of them deepest
first. Hence, in the order in which nodes became idle, children come before their parents, and the oldest idle node
is always a leaf: eviction takes it without a search. (Related: SGLang's RadixAttention, arXiv:2312.07104; a block
tree as in TensorRT-LLM's KV cache reuse.)
"""

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from slipstream.runtime.kv.blocks import NULL_BLOCK, BlockPool

Tokens = tuple[int, ...]


@dataclass(eq=False, slots=True)
class Node:
    block_id: int
    tokens: Tokens  # a full block, or fewer: then the node is a partial leaf
    parent: "Node | None" = field(default=None, repr=False)
    salt: str = ""  # on the root only
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
    def __init__(self, pool: BlockPool, tokens_per_block: int) -> None:
        self._pool = pool
        self._tokens_per_block = tokens_per_block
        self._roots: dict[str, Node] = {}  # only salts that have a node
        self._idle: OrderedDict[Node, None] = OrderedDict()  # unreferenced nodes, the longest idle first

    @property
    def num_idle(self) -> int:
        return len(self._idle)

    def is_idle(self, node: Node) -> bool:
        return node in self._idle

    def match(self, salt: str, token_ids: Sequence[int]) -> Match:
        """The longest known prefix of token_ids, short of the last token, which must be computed to have logits."""
        limit = len(token_ids) - 1
        node = self._roots.get(salt)
        path: list[Node] = []
        while node is not None:
            start = len(path) * self._tokens_per_block
            tokens = tuple(token_ids[start : min(start + self._tokens_per_block, limit)])
            child = node.children.get(tokens) if len(tokens) == self._tokens_per_block else None
            if child is None:
                source, num_copied = _closest_child(node, tokens)
                return Match(tuple(path), start + num_copied, source, num_copied)
            path.append(child)
            node = child
        return Match()

    def hold(self, node: Node) -> None:
        self._idle.pop(node, None)
        self._pool.retain(node.block_id)

    def release(self, node: Node) -> None:
        if self._pool.release(node.block_id):
            self._idle[node] = None

    def insert(self, salt: str, parent: Node | None, tokens: Tokens, block_id: int) -> Node:
        """Put a held, full block below `parent` (None is the root), or find its equal there.

        Where the tree had the tokens already, the caller's reference moves to the known node's block and its own
        block is freed: the caller must use the returned node's block_id from here on.
        """
        parent = parent or self._root(salt)
        known = parent.children.get(tokens)
        if known is None:
            return self._attach(parent, tokens, block_id)
        self.hold(known)
        self._pool.release(block_id)
        self._pool.free(block_id)
        return known

    def insert_leaf(self, salt: str, parent: Node | None, tokens: Tokens, block_id: int) -> None:
        """Give a held, partly filled block to the tree, which keeps it idle unless a sibling begins with its tokens."""
        parent = parent or self._root(salt)
        self._pool.release(block_id)
        index = bisect_left(parent.keys, tokens)
        if index < len(parent.keys) and parent.keys[index][: len(tokens)] == tokens:
            self._pool.free(block_id)
            sibling = parent.children[parent.keys[index]]
            if sibling in self._idle:
                self._idle.move_to_end(sibling)  # as good as just used
        else:
            self._idle[self._attach(parent, tokens, block_id)] = None

    def evict(self) -> None:
        """Free the block that has been idle longest. There must be one."""
        self._drop(next(iter(self._idle)))

    def _root(self, salt: str) -> Node:
        return self._roots.setdefault(salt, Node(NULL_BLOCK, (), salt=salt))

    def _attach(self, parent: Node, tokens: Tokens, block_id: int) -> Node:
        """A new node. A partial leaf that it makes superfluous goes."""
        index = bisect_left(parent.keys, tokens)
        if index > 0 and tokens[: len(parent.keys[index - 1])] == parent.keys[index - 1]:
            shorter = parent.children[parent.keys[index - 1]]
            if shorter in self._idle:
                self._drop(shorter)
        node = Node(block_id, tokens, parent)
        parent.children[tokens] = node
        insort(parent.keys, tokens)
        if parent.parent is None:
            self._roots[parent.salt] = parent  # dropping the shorter leaf may have removed an empty root
        return node

    def _drop(self, node: Node) -> None:
        """Forget an idle leaf and free its block."""
        parent = node.parent
        assert parent is not None and not node.children, f"block {node.block_id} is not a leaf of the prefix tree"
        del self._idle[node]
        del parent.children[node.tokens]
        del parent.keys[bisect_left(parent.keys, node.tokens)]
        if parent.parent is None and not parent.children:
            del self._roots[parent.salt]
        self._pool.free(node.block_id)

    def nodes(self) -> Iterator[Node]:
        """All nodes, parents before children, without the roots."""
        stack = [child for root in self._roots.values() for child in root.children.values()]
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children.values())

    def check(self) -> None:
        place = {node: index for index, node in enumerate(self._idle)}
        found = list(self.nodes())
        block_ids = {node.block_id for node in found}
        assert len(block_ids) == len(found), "a block is in two nodes of the prefix tree"
        assert NULL_BLOCK not in block_ids, "the null block is in the prefix tree"
        assert place.keys() <= set(found), "an idle node is not in the prefix tree"
        assert all(root.children for root in self._roots.values()), "an empty root was kept"
        for node in found:
            parent = node.parent
            assert parent is not None and parent.children.get(node.tokens) is node, f"{node.tokens} has lost its parent"
            assert node.keys == sorted(node.children), f"the keys below {node.tokens} are out of order"
            assert 0 < len(node.tokens) <= self._tokens_per_block, f"{node.tokens} is not the contents of a block"
            full = len(node.tokens) == self._tokens_per_block
            assert full or not node.children, f"partial leaf {node.tokens} has children"
            assert (self._pool.references(node.block_id) == 0) == (node in place), f"{node.tokens} idle or not?"
            if parent in place:
                assert node in place, f"{node.tokens} is held and its parent is idle"
                assert place[node] < place[parent], f"{node.tokens} would be evicted after its parent"


def _closest_child(node: Node, tokens: Tokens) -> tuple[Node | None, int]:
    """The child that has most leading tokens in common with `tokens`, and how many; None where no token is."""
    index = bisect_left(node.keys, tokens)
    best, num_common = None, 0
    for key in node.keys[max(index - 1, 0) : index + 1]:
        num = _num_common(key, tokens)
        if num > num_common:
            best, num_common = node.children[key], num
    return best, num_common


def _num_common(a: Tokens, b: Tokens) -> int:
    num = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        num += 1
    return num
