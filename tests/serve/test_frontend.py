"""In which order a front passes on what a step of the engine brought."""

import asyncio

from slipstream.schema.request import TokenEvent
from slipstream.serve.connection import EVENTS_AT_ONCE
from slipstream.serve.frontend import Frontend


def test_first_tokens_go_first_and_new_requests_are_looked_at_in_between() -> None:
    names = [f"r{number}" for number in range(3 * EVENTS_AT_ONCE)]
    going_on = [TokenEvent(name, token_ids=(1,)) for name in names]
    news = [TokenEvent("new", token_ids=(7,), seconds_queued=0.1), TokenEvent("new", token_ids=(8,))]  # of two steps
    heard: list[tuple[str, int] | str] = []

    async def deliver() -> None:
        front = Frontend("front", on_ready=lambda replica, ready: None)
        [engine] = front.engines
        engine._sinks = dict.fromkeys([*names, "new"], lambda event: heard.append((event.request_id, *event.token_ids)))
        loop = asyncio.get_running_loop()
        loop.call_soon(heard.append, "a request")
        await engine._deliver_all([*going_on, *news])

    asyncio.run(deliver())
    assert heard[0] == ("new", 7)
    assert heard.index("a request") == EVENTS_AT_ONCE
    heard.remove("a request")
    assert heard == [("new", 7), *((name, 1) for name in names), ("new", 8)]
