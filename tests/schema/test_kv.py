"""Which layers share block tables, and how many blocks a window needs, against a count by hand."""

import itertools

from slipstream.schema.kv import MAX_GROUPS, KVGroup, group_layers


def test_layers_that_see_everything_are_one_group():
    assert group_layers([0] * 30) == (KVGroup(tuple(range(30))),)


def test_alternating_windows_are_two_groups():
    full, windowed = group_layers([128, 0] * 3)
    assert (full.layers, full.window) == ((1, 3, 5), 0)
    assert (windowed.layers, windowed.window) == ((0, 2, 4), 128)


def test_groups_are_of_one_size_so_that_they_share_tensors():
    groups = group_layers(([512] * 5 + [0]) * 5)  # gemma3's pattern, 25 layers with a window to 5 without
    assert [len(group.layers) for group in groups] == [5] * 6
    groups = group_layers(([512] * 5 + [0]) * 4 + [512, 512])  # 22 to 4
    assert [len(group.layers) for group in groups] == [4, 4, 4, 4, 4, 4, 2]


def test_every_layer_is_in_one_group_and_the_groups_are_few():
    for num_full, num_windowed in itertools.product(range(1, 40, 3), range(1, 60, 7)):
        windows = [0] * num_full + [64] * num_windowed
        groups = group_layers(windows)
        assert len(groups) <= MAX_GROUPS
        assert sorted(layer for group in groups for layer in group.layers) == list(range(len(windows)))
        assert all(windows[layer] == group.window for group in groups for layer in group.layers)


def test_sinks_are_for_windows():
    assert [group.sink_tokens for group in group_layers([0, 64], sink_tokens=4)] == [0, 4]


def sees(group: KVGroup, position: int) -> set[int]:
    newest = group.window - group.sink_tokens
    return {p for p in range(position + 1) if not group.window or p < group.sink_tokens or p > position - newest}


def test_hidden_blocks_are_those_that_no_coming_token_sees():
    for window, sinks, size in itertools.product(range(1, 8), range(3), range(1, 5)):
        if sinks >= window:
            continue
        group = KVGroup(window=window, sink_tokens=sinks)
        for position in range(20):
            visible = {p // size for query in range(position, 40) for p in sees(group, query)}
            assert set(group.hidden(position, size)) == set(range(position // size + 1)) - visible


def test_max_blocks_is_reached_and_never_exceeded():
    for window, sinks, size, chunk in itertools.product(range(1, 7), range(2), range(1, 4), range(1, 6)):
        if sinks >= window:
            continue
        group, num_tokens = KVGroup(window=window, sink_tokens=sinks), 60
        held = [
            -(-(start + length) // size) - len(group.hidden(start, size))
            for start in range(num_tokens)
            for length in range(1, chunk + 1)
            if start + length <= num_tokens
        ]
        assert max(held) <= group.max_blocks(num_tokens, chunk, size) <= max(held) + 1
