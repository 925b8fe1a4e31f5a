"""How requests come."""

import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Load:
    """All at once; closed, by `concurrency` clients, each asking again when it has its answer; or open, `rate` requests
    a second, whatever comes of them."""

    concurrency: int | None = None
    rate: float | None = None

    def __str__(self) -> str:
        if self.rate is not None:
            return f"{self.rate:.3g} requests/s"
        return "all at once" if self.concurrency is None else f"{self.concurrency} at a time"

    def arrivals(self, num_requests: int, draw: random.Random) -> list[float]:
        """Seconds at which those come that do not wait for another to end. By a rate: a Poisson process's."""
        if self.rate is None:
            return [0.0] * min(self.concurrency or num_requests, num_requests)
        times, now = list[float](), 0.0
        for _ in range(num_requests):
            now += draw.expovariate(self.rate)
            times.append(now)
        return times

    def usual_requests(self) -> int:
        """Four of each client, or half a minute's; 32 at least."""
        return max(32, round(30 * self.rate) if self.rate is not None else 4 * (self.concurrency or 1))
