"""Scaling: how many engines answer. Numbers in, a number out; it knows no processes.

    one more    what is in flight fills a batch of each
    one fewer   half a batch of each of the others would hold it

Only where it has been so for a while, which is longer for fewer than for more: an engine that opens a model computes
nothing, and the next one has nothing cached.
"""

from dataclasses import dataclass

FULL, HALF = 1.0, 0.5  # of a batch


@dataclass
class Scaling:
    fewest: int
    most: int
    up_seconds: float  # for which it has to have been so
    down_seconds: float
    _wish: int = 0
    _since: float = 0.0

    def change(self, now: float, num_sequences: int, num_engines: int, max_batch_size: int) -> int:
        """1, 0 or -1 engines, where so many take requests. num_sequences: in flight, whether they run or wait."""
        wish = self._wished(num_sequences / max_batch_size, num_engines)
        if wish != self._wish:
            self._wish, self._since = wish, now
        if not wish or now - self._since < (self.up_seconds if wish > 0 else self.down_seconds):
            return 0
        self._since = now
        return wish

    def _wished(self, batches: float, num_engines: int) -> int:
        if num_engines < self.most and batches >= FULL * num_engines:
            return 1
        return -1 if num_engines > self.fewest and batches <= HALF * (num_engines - 1) else 0
