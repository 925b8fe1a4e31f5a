"""The tree of KV blocks: what is found, what is kept, what goes first. Blocks hold 2 tokens, written as digits."""

import pytest

from slipstream.runtime.kv.blocks import BlockPool
from slipstream.runtime.kv.prefix import Node, PrefixTree


class Cache:
    """A tree and a pool, filled with strings of digits by sequences that come and go."""

    def __init__(self, num_blocks: int = 32) -> None:
        self.pool = BlockPool(num_blocks)
        self.tree = PrefixTree(self.pool, tokens_per_block=2)

    def add(self, text: str, salt: str = "") -> list[Node]:
        """What a sequence does that computes `text`: its path is held, a partial block goes to the tree."""
        path: list[Node] = []
        chunks = [tuple(map(int, text[i : i + 2])) for i in range(0, len(text), 2)]
        for chunk in chunks:
            insert = self.tree.insert if len(chunk) == 2 else self.tree.insert_leaf
            node = insert(salt, path[-1] if path else None, chunk, [self.pool.allocate()])
            if node is not None:
                path.append(node)
        self.tree.check()
        return path

    def leave(self, path: list[Node]) -> None:
        for node in reversed(path):
            self.tree.release(node, node.block_ids)
        self.tree.check()

    def keep(self, *texts: str, salt: str = "") -> None:
        for text in texts:
            self.leave(self.add(text, salt))

    def found(self, text: str, salt: str = "") -> int:
        """How many leading tokens of `text` are known (one more token follows, to have something to compute)."""
        return self.tree.match(salt, [*map(int, text), 0]).num_tokens

    def texts(self) -> set[str]:
        """The tokens from the root to each node."""
        spelled: dict[Node | None, str] = {}
        for node in self.tree.nodes():
            spelled[node] = spelled.get(node.parent, "") + "".join(map(str, node.tokens))
        return set(spelled.values())


def test_the_longest_path_is_found():
    cache = Cache()
    cache.keep("123456", "129999")
    assert cache.found("123456") == 6
    assert cache.found("1299") == 4
    assert cache.found("5634") == 0  # a block is known only after what came before it


def test_below_the_path_the_closest_child_is_copied_from():
    cache = Cache()
    cache.keep("1234", "1256", "127")
    match = cache.tree.match("", [1, 2, 5, 9, 9])
    assert match.num_tokens == 3 and match.num_copied == 1
    assert match.source is not None and match.source.tokens == (5, 6)
    assert cache.tree.match("", [1, 2, 7, 7, 7]).num_copied == 1  # from a partial leaf
    assert cache.tree.match("", [1, 2, 8, 8, 8]).source is None


@pytest.mark.parametrize("query", [(1, 5), (1, 1), (1, 9), (3, 0), (2, 9), (0, 0), (9, 9)])
def test_the_closest_child_is_a_neighbour_in_sorted_order(query: tuple[int, int]):
    cache = Cache()
    children = [(1, 2), (1, 4), (1, 7), (2, 2), (3, 9), (5, 5)]
    cache.keep(*(f"{a}{b}" for a, b in children))
    best = max((2 if child == query else int(child[0] == query[0])) for child in children)
    assert cache.found(f"{query[0]}{query[1]}") == best


def test_salts_share_nothing():
    cache = Cache()
    cache.keep("1234", salt="alice")
    assert cache.found("1234", salt="alice") == 4
    assert cache.found("1234", salt="bob") == cache.found("1234") == 0


def test_an_equal_block_is_given_back():
    cache = Cache()
    first = cache.add("1234")
    num_free = cache.pool.num_free
    second = cache.add("1234")
    assert second == first and cache.pool.num_free == num_free
    assert cache.pool.references(first[0].block_ids[0]) == 2


def test_eviction_takes_the_longest_idle_leaf():
    cache = Cache()
    cache.keep("1234", "5678")
    for expected in [{"12", "56", "5678"}, {"56", "5678"}, {"56"}, set()]:
        cache.tree.evict()
        cache.tree.check()
        assert cache.texts() == expected


def test_use_puts_off_eviction():
    cache = Cache()
    cache.keep("1234", "5678")
    path = cache.tree.match("", [1, 2, 3, 4, 0]).path
    for node in path:
        cache.tree.hold(node, node.block_ids)
    cache.leave(list(path))
    cache.tree.evict()
    assert cache.texts() == {"12", "1234", "56"}


def test_a_held_path_is_not_evicted():
    cache = Cache()
    cache.add("1234")
    cache.keep("123456")
    assert cache.tree.num_idle == 1
    cache.tree.evict()
    assert cache.texts() == {"12", "1234"} and cache.tree.num_idle == 0


def test_a_partial_leaf_grows_into_its_successor():
    cache = Cache()
    cache.keep("123")
    assert cache.texts() == {"12", "123"}
    cache.keep("1234")
    assert cache.texts() == {"12", "1234"}  # 123 says nothing more
    assert cache.found("123") == 3


def test_a_partial_leaf_that_says_nothing_new_is_not_kept():
    cache = Cache()
    cache.keep("1234", "123")
    assert cache.texts() == {"12", "1234"}


def test_a_partial_leaf_that_says_nothing_new_counts_as_a_use_of_its_sibling():
    cache = Cache()
    cache.keep("1234", "56", "123")
    cache.tree.evict()
    assert cache.texts() == {"12", "1234"}


def test_a_partial_leaf_that_is_being_copied_stays():
    cache = Cache()
    cache.keep("123")
    source = cache.tree.match("", [1, 2, 3, 9]).source
    assert source is not None
    cache.tree.hold(source, source.block_ids)
    path = cache.add("1234")
    assert cache.texts() == {"12", "123", "1234"}
    cache.tree.release(source, source.block_ids)
    cache.leave(path)
    assert cache.tree.num_idle == 3


def test_the_root_of_a_salt_goes_with_its_last_block():
    cache = Cache()
    for i in range(100):
        cache.keep("12", salt=str(i))
        cache.tree.evict()
    assert not cache.tree._roots
