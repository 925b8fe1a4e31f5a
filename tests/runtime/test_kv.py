"""The KV cache from one sequence's point of view. Blocks hold 4 tokens here; tokens are written as digits."""

import pytest

from slipstream.errors import CapacityError
from slipstream.runtime.kv import BlockTable, KVCacheManager
from slipstream.runtime.kv.blocks import NULL_BLOCK, BlockPool
from slipstream.schema.kv import KVGroup
from slipstream.schema.step import BlockCopy


def tokens(text: str) -> list[int]:
    return [int(digit) for digit in text]


def admit(kv: KVCacheManager, text: str) -> tuple[BlockTable, int, BlockCopy | None]:
    """A table that covers all of `text`, how much of it was found, and the copy to make."""
    table, match = BlockTable(), kv.match("", tokens(text))
    assert kv.can_admit(match, len(text))
    copies = kv.admit(table, match)
    kv.extend(table, len(text))
    return table, match.num_tokens, copies[0] if copies else None


def block_tables(table: BlockTable) -> tuple[tuple[int, ...], ...]:
    """One a KV group."""
    return tuple(zip(*table.rows, strict=True))


def run_alone(kv: KVCacheManager, text: str) -> tuple[int, ...]:
    """Compute `text` in one step and leave. Returns the blocks it was in."""
    table, _, _ = admit(kv, text)
    kv.commit(table, tokens(text), len(text))
    block_ids = block_tables(table)[0]
    kv.release(table, tokens(text), len(text))
    kv.check([])
    return block_ids


def test_the_null_block_is_never_given_out():
    pool = BlockPool(4)
    assert sorted(pool.allocate() for _ in range(pool.num_usable)) == [1, 2, 3]
    assert pool.num_free == 0 and NULL_BLOCK == 0


def test_a_pool_of_the_null_block_alone_is_refused():
    with pytest.raises(CapacityError, match=r"num_blocks is 1; .* at least 2"):
        BlockPool(1)


def test_a_table_grows_by_the_block():
    kv = KVCacheManager(num_blocks=8, tokens_per_block=4)
    table = BlockTable()
    kv.extend(table, 4)
    assert block_tables(table)[0] == (1,)
    kv.extend(table, 5)
    assert block_tables(table)[0] == (1, 2)
    assert (kv.num_total, kv.num_available) == (7, 5)
    assert kv.can_extend(table, 28) and not kv.can_extend(table, 29)


def test_a_table_says_what_has_changed_since_it_was_asked():
    kv = KVCacheManager(num_blocks=8, tokens_per_block=4, groups=[ALL, LAST_FOUR])
    table = BlockTable()
    kv.extend(table, 5)
    assert table.take_changes() == ((0, (1, 2)), (1, (3, 4)))
    kv.extend(table, 8)
    assert table.take_changes() == ()
    kv.commit(table, tokens("12345678"), 8)
    assert table.take_changes() == ((0, (1, NULL_BLOCK)),)
    kv.discard(table)
    kv.extend(table, 1)
    assert [place for place, _ in table.take_changes()] == [0]


def test_a_table_takes_the_blocks_of_an_equal_prefix_and_says_so():
    kv = KVCacheManager(num_blocks=8, tokens_per_block=4)
    first, second = BlockTable(), BlockTable()
    for table in (first, second):
        kv.extend(table, 4)
        table.take_changes()
    for table in (first, second):
        kv.commit(table, tokens("1234"), 4)
    assert first.take_changes() == () and second.take_changes() == ((0, (1,)),)
    kv.check([first, second])


def test_full_blocks_are_shared_while_their_owner_runs():
    kv = KVCacheManager(num_blocks=8, tokens_per_block=4)
    first, _, _ = admit(kv, "123456781")
    assert kv.match("", tokens("12345678")).num_tokens == 0  # not computed yet
    kv.commit(first, tokens("123456781"), 9)
    second, num_cached, copy = admit(kv, "123456789")
    assert (num_cached, copy) == (8, None)
    assert (
        block_tables(second)[0][:2] == block_tables(first)[0][:2]
        and block_tables(second)[0][2] != block_tables(first)[0][2]
    )
    kv.check([first, second])


def test_the_next_turn_of_a_chat_recomputes_nothing_known():
    kv = KVCacheManager(num_blocks=8, tokens_per_block=4)
    block_ids = run_alone(kv, "123456")
    table, num_cached, copy = admit(kv, "123456999")
    assert num_cached == 6
    # The half-filled block is copied, not taken: two conversations may go on from it.
    assert copy == BlockCopy(source=block_ids[1], target=block_tables(table)[0][1], num_tokens=2)


def test_the_last_token_is_always_recomputed_for_its_logits():
    kv = KVCacheManager(num_blocks=8, tokens_per_block=4)
    run_alone(kv, "12345678")
    _, num_cached, copy = admit(kv, "12345678")
    assert num_cached == 7 and copy is not None and copy.num_tokens == 3


def test_a_copy_starts_from_a_block_that_differs_later():
    kv = KVCacheManager(num_blocks=8, tokens_per_block=4)
    run_alone(kv, "12345678")
    _, num_cached, copy = admit(kv, "1239999")
    assert num_cached == 3 and copy is not None and copy.source == 1


def test_the_source_of_a_copy_outlives_the_step():
    kv = KVCacheManager(num_blocks=4, tokens_per_block=4)
    (source,) = run_alone(kv, "12")
    table, _, copy = admit(kv, "1299" + "9999")  # takes the other two blocks
    assert copy is not None and copy.source == source
    assert not kv.can_extend(table, 9)  # the source is not to be had
    kv.check([table])
    kv.commit(table, tokens("12999999"), 8)
    assert kv.can_extend(table, 9)
    kv.extend(table, 9)
    assert source in block_tables(table)[0]
    kv.check([table])


def test_the_target_of_a_copy_may_be_an_evicted_block_but_not_the_source():
    kv = KVCacheManager(num_blocks=3, tokens_per_block=4)
    (source,) = run_alone(kv, "12")  # the first to be evicted
    (other,) = run_alone(kv, "9")
    table, _, copy = admit(kv, "123")
    assert copy == BlockCopy(source, other, 2)
    kv.check([table])


def test_equal_blocks_computed_side_by_side_become_one():
    kv = KVCacheManager(num_blocks=8, tokens_per_block=4)
    first, _, _ = admit(kv, "12345")
    second, _, _ = admit(kv, "12346")
    assert set(block_tables(first)[0]).isdisjoint(block_tables(second)[0])
    kv.commit(first, tokens("12345"), 5)
    kv.commit(second, tokens("12346"), 5)
    assert block_tables(first)[0][0] == block_tables(second)[0][0]
    assert kv.num_available == 4  # three are in use
    kv.check([first, second])


def test_admission_counts_the_idle_blocks_it_pins():
    kv = KVCacheManager(num_blocks=4, tokens_per_block=4)
    run_alone(kv, "12345678")
    match = kv.match("", tokens("123456789"))
    assert match.num_tokens == 8 and kv.num_available == 3
    assert kv.can_admit(match, 12) and not kv.can_admit(match, 13)
    assert kv.can_promise(match, 12, chunk=4, num_reserved=0) and not kv.can_promise(match, 13, chunk=4, num_reserved=0)
    assert not kv.can_promise(match, 12, chunk=4, num_reserved=1)


def test_a_copy_that_does_not_fit_can_be_left_out():
    kv = KVCacheManager(num_blocks=3, tokens_per_block=4)
    run_alone(kv, "12345")
    match = kv.match("", tokens("12345678"))
    assert match.num_tokens == 5
    assert not kv.can_admit(match, 8)  # the path, the source and the target are three blocks
    assert match.without_copy().num_tokens == 4 and kv.can_admit(match.without_copy(), 8)


def test_discard_forgets_what_was_not_committed():
    kv = KVCacheManager(num_blocks=8, tokens_per_block=4)
    table, _, _ = admit(kv, "12345678")
    kv.commit(table, tokens("12345678"), 4)
    kv.discard(table)
    assert kv.match("", tokens("123456789")).num_tokens == 4
    assert kv.num_available == kv.num_total
    kv.check([])


def test_without_reuse_nothing_is_kept():
    kv = KVCacheManager(num_blocks=8, tokens_per_block=4, enable_block_reuse=False)
    run_alone(kv, "12345678")
    assert kv.match("", tokens("12345678")).num_tokens == 0


def test_check_finds_a_leaked_block():
    kv = KVCacheManager(num_blocks=8, tokens_per_block=4)
    admit(kv, "123")
    with pytest.raises(AssertionError, match="reference counts"):
        kv.check([])


# ---------------------------------------------------------------------- windows

ALL, LAST_FOUR = KVGroup(), KVGroup(window=4)


def step(kv: KVCacheManager, table: BlockTable, text: str, end: int) -> None:
    kv.extend(table, end)
    kv.commit(table, tokens(text), end)
    kv.check([table])


def test_a_window_gives_up_what_no_token_sees_any_more():
    kv = KVCacheManager(num_blocks=4, tokens_per_block=4, groups=[LAST_FOUR], enable_block_reuse=False)
    table, text = BlockTable(), "1234567890" * 4
    for end in range(1, 41):  # ten blocks of tokens through a pool of three
        step(kv, table, text, end)
        assert kv.num_total - kv.num_available <= 2
    assert block_tables(table)[0][:9] == (NULL_BLOCK,) * 9


def test_a_group_without_a_window_keeps_all_and_its_neighbour_does_not():
    kv = KVCacheManager(num_blocks=16, tokens_per_block=4, groups=[ALL, LAST_FOUR])
    table = BlockTable()
    for end in (4, 8, 12):
        step(kv, table, "123456781234", end)
    full, windowed = block_tables(table)
    assert NULL_BLOCK not in full and windowed[:2] == (NULL_BLOCK, NULL_BLOCK)
    assert set(full).isdisjoint(windowed[2:])


def test_sinks_stay():
    kv = KVCacheManager(num_blocks=16, tokens_per_block=4, groups=[KVGroup(window=8, sink_tokens=2)])
    table = BlockTable()
    for end in range(1, 41):
        step(kv, table, "1234567890" * 4, end)
    held = [place for place, block_id in enumerate(block_tables(table)[0]) if block_id != NULL_BLOCK]
    assert held == [0, 8, 9]


def test_a_prefix_is_known_by_what_its_next_token_sees():
    kv = KVCacheManager(num_blocks=4, tokens_per_block=4, groups=[LAST_FOUR])
    table, text = BlockTable(), "123456781234567"
    for end in (4, 8, 12, 15):  # the pool has room for three blocks: the first is evicted
        step(kv, table, text, end)
    kv.release(table, tokens(text), 15)
    kv.check([])
    assert kv.match("", tokens("1234")).num_tokens == 0
    assert kv.match("", tokens("12345678999")).num_tokens == 8
    table, num_cached, _ = admit(kv, "12345678123999")
    assert num_cached == 11 and block_tables(table)[0][0] == NULL_BLOCK
    kv.check([table])


def test_all_groups_must_know_a_prefix():
    kv = KVCacheManager(num_blocks=7, tokens_per_block=4, groups=[ALL, LAST_FOUR])
    table, text = BlockTable(), "123456781234"
    for end in (4, 8, 12):
        step(kv, table, text, end)
    kv.release(table, tokens(text), 12)
    assert kv.match("", tokens("12345678999")).num_tokens == 8
    other = BlockTable(salt="other")
    kv.extend(other, 4)  # evicts the two blocks that were idle longest: those the window left behind
    kv.check([other])
    assert kv.match("", tokens("12345678999")).num_tokens == 0
    assert kv.match("", tokens("1234567812349")).num_tokens == 12


def test_what_one_sequence_gave_up_another_may_still_share():
    kv = KVCacheManager(num_blocks=16, tokens_per_block=4, groups=[LAST_FOUR])
    first, second = BlockTable(), BlockTable()
    step(kv, first, "1234567890", 8)
    kv.admit(second, kv.match("", tokens("1234567899")))
    shared = block_tables(first)[0][1]
    assert block_tables(second)[0] == (NULL_BLOCK, shared)
    kv.extend(first, 12)
    kv.commit(first, tokens("123456789012"), 12)
    assert block_tables(first)[0][1] == NULL_BLOCK and block_tables(second)[0][1] == shared
    kv.check([first, second])


def test_a_promise_counts_a_window_in_full_whatever_is_shared_now():
    kv = KVCacheManager(num_blocks=6, tokens_per_block=4, groups=[LAST_FOUR])
    first = BlockTable()
    step(kv, first, "12345678", 8)
    match = kv.match("", tokens("123456789"))
    most = LAST_FOUR.max_blocks(40, 1, 4)
    num_reserved = kv.promised(first, 40, chunk=1) - kv.num_in_windows
    assert most == 2 and num_reserved == 1
    assert kv.can_promise(match, 40, chunk=1, num_reserved=num_reserved)
    assert not kv.can_promise(match, 40, chunk=9, num_reserved=num_reserved)
