"""KVGroup: which layers keep which tokens. Layers that keep the same ones share a block table a sequence.

All groups draw their blocks from one pool, and a block is as large in every group: so groups have equally many layers,
and a layer's cache is the tensor of its place in its group, which one layer of each other group uses too. No memory is
set apart for windows or for full attention beforehand; it goes where the sequences at hand need it. (vLLM's hybrid KV
cache manager does the same; TensorRT-LLM has a pool for each window.)
"""

from collections.abc import Sequence
from dataclasses import dataclass

MAX_GROUPS = 8  # of one window split over groups: each group costs a block table in every step


@dataclass(frozen=True)
class KVGroup:
    """
    tokens   |  sinks  |   nobody sees these any more   |  the window's newest  |
             0    sink_tokens                    position + 1 - (window - sink_tokens)   position
    """

    layers: tuple[int, ...] = ()
    window: int = 0  # how many tokens a token sees, itself and the sinks included; 0 for all
    sink_tokens: int = 0  # the first tokens of the sequence, which a window never leaves (arXiv:2309.17453)

    def hidden(self, position: int, tokens_per_block: int) -> range:
        """Blocks (their places in the table) of which no token from `position` on sees anything."""
        first = _ceil(self.sink_tokens, tokens_per_block)
        num_newest = self.window - self.sink_tokens
        end = max(0, position + 1 - num_newest) // tokens_per_block if self.window else 0
        return range(first, max(first, end))

    def max_blocks(self, num_tokens: int, chunk: int, tokens_per_block: int) -> int:
        """Most blocks that a sequence holds at once on its way to num_tokens, `chunk` tokens a step at most."""
        all_blocks = _ceil(num_tokens, tokens_per_block)
        if not self.window:
            return all_blocks
        num_in_sight = self.window - self.sink_tokens + chunk - 1  # of the first query of a step, to the last one
        num_sinks = _ceil(self.sink_tokens, tokens_per_block)
        return min(all_blocks, num_sinks + _ceil(num_in_sight - 1, tokens_per_block) + 1)


def narrow(windows: Sequence[int], asked: Sequence[int], max_seq_len: int) -> tuple[int, ...]:
    """Each layer's window: its own or the asked one, whichever sees less; 0 where a sequence never outgrows it.

    asked: repeated over the layers where it is shorter, as TensorRT-LLM's max_attention_window_size; () for none.
    """
    limits = asked or (max_seq_len,)
    narrowed = [min(window or max_seq_len, limits[layer % len(limits)]) for layer, window in enumerate(windows)]
    return tuple(0 if window >= max_seq_len else window for window in narrowed)


def group_layers(windows: Sequence[int], sink_tokens: int = 0) -> tuple[KVGroup, ...]:
    """The groups of a model, from each layer's window (0: sees everything), layers without one first.

    Groups are of one size; where the layers do not come out even, the last group of a window wastes the rest.
    """
    layers_of: dict[int, list[int]] = {}
    for layer, window in enumerate(windows):
        layers_of.setdefault(window, []).append(layer)
    size = _group_size([len(layers) for layers in layers_of.values()])
    return tuple(
        KVGroup(tuple(layers_of[window][start : start + size]), window, sink_tokens if window else 0)
        for window in sorted(layers_of)
        for start in range(0, len(layers_of[window]), size)
    )


def _group_size(counts: list[int]) -> int:
    """Layers a group: what wastes least, then what makes fewest groups."""

    def num_groups(size: int) -> int:
        return sum(_ceil(count, size) for count in counts)

    most = max(MAX_GROUPS, len(counts))
    sizes = [size for size in range(1, max(counts) + 1) if num_groups(size) <= most]
    return min(sizes, key=lambda size: (num_groups(size) * size, num_groups(size)))


def _ceil(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)
