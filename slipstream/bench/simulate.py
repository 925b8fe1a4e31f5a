"""The scheduler and the KV manager run for real, on a clock that goes on by what each step would take.

Nothing is computed: a step's tokens are made up, and each sequence gets as many as its request asks for. So an hour of
a thousand engines takes as long as planning their steps does.
"""

import heapq
import random
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import count

from slipstream.bench.costs import StepCosts, Work, work_of
from slipstream.bench.load import Load
from slipstream.bench.timeline import Run, Timeline
from slipstream.errors import SlipstreamError, UsageError
from slipstream.progress import Progress
from slipstream.runtime.scheduler import Scheduler
from slipstream.schema.build import RuntimeConfig
from slipstream.schema.request import GenerateRequest, TokenEvent
from slipstream.schema.sampling import SamplingParams
from slipstream.schema.step import SequenceResult, StepPlan, StepResult
from slipstream.serve.router import Room, Router

Prompt = tuple[tuple[int, ...], int]  # token ids, and how many the answer has
_MADE_UP = (0,)


class Replica:
    """One engine: Engine.step() in two halves, with the time between them."""

    def __init__(self, config: RuntimeConfig, runs_ahead: bool) -> None:
        """runs_ahead: the next step is planned while one runs, as on a GPU."""
        # Steps of a pipeline are measured, and here taken, one after the other.
        self._scheduler, self._runs_ahead = Scheduler(replace(config, num_stages=1, is_adaptive=False)), runs_ahead
        self._launched: deque[StepPlan] = deque()
        self.num_unfinished = 0
        self.is_busy = False

    @property
    def num_preemptions(self) -> int:
        return self._scheduler.stats().num_preemptions

    def add(self, request: GenerateRequest) -> None:
        self._scheduler.add(request)
        self.num_unfinished += 1

    def begin(self) -> Work | None:
        """What the next step computes; None where there is nothing to do."""
        if not self._launched:
            self._launch(self._scheduler.plan())
        if self._launched and self._runs_ahead and len(self._launched) == 1:
            self._launch(self._scheduler.plan_ahead())
        self.is_busy = bool(self._launched)
        return work_of(self._launched[0]) if self._launched else None

    def finish(self) -> list[TokenEvent]:
        """What the step that began brought."""
        plan = self._launched.popleft()
        outcomes = [SequenceResult(_MADE_UP if step.sample else ()) for step in plan.sequences]
        events = self._scheduler.commit(plan, StepResult(tuple(outcomes)))
        self.num_unfinished -= sum(event.finish_reason is not None for event in events)
        self.is_busy = False
        return events

    def _launch(self, plan: StepPlan | None) -> None:
        if plan is not None:
            self._launched.append(plan)


@dataclass
class Outcome:
    """Of all replicas together."""

    run: Run
    steps: list[Work] = field(default_factory=list)  # as they began
    busy_seconds: float = 0.0
    num_preemptions: int = 0


class Simulation:
    """Replicas, requests on their way, and what has come of them."""

    def __init__(
        self,
        config: RuntimeConfig,
        costs: StepCosts,
        prompts: Sequence[Prompt],
        load: Load,
        *,
        num_replicas: int = 1,
        runs_ahead: bool = False,
        seed: int = 0,
    ) -> None:
        """seed: of the times at which requests come. Raises UsageError where steps may be larger than was measured."""
        if config.max_num_tokens > costs.max_num_tokens:
            raise UsageError(
                f"max_num_tokens is {config.max_num_tokens}, and steps were measured up to {costs.max_num_tokens} "
                "tokens; lower it, or measure an engine of that size."
            )
        self._costs, self._load, self._num_requests = costs, load, len(prompts)
        self._replicas = [Replica(config, runs_ahead) for _ in range(num_replicas)]
        self._router = Router()
        for index in range(num_replicas):
            self._router.join(index, Room.of(config, sys.maxsize))
        self._coming = enumerate(prompts)
        self._timelines: dict[str, Timeline] = {}
        self._order = count()
        # When a step ends or, without a replica, a request comes.
        self._due: list[tuple[float, int, Replica | None]] = []
        arrivals = load.arrivals(len(prompts), random.Random(seed))
        self._num_left = len(prompts) - len(arrivals)  # that wait for another to end
        for time in arrivals:
            self._put(time, None)
        self.outcome = Outcome(Run(str(load), []))

    def run(self, progress: Progress = lambda stage, done, total: None) -> Outcome:
        """Raises UsageError for a request that no replica could ever run."""
        num_ended = 0
        while self._due:
            now = self._due[0][0]
            idle: dict[Replica, None] = {}  # in their order
            while self._due and self._due[0][0] == now:  # what comes at one time is in one step
                replica = heapq.heappop(self._due)[2]
                if replica is None:
                    replica = self._arrive(now)
                else:
                    num_ended += self._finish(replica, now)
                if not replica.is_busy:
                    idle[replica] = None
            for replica in idle:
                self._begin(replica, now)
            progress("simulate", num_ended, self._num_requests)
        self.outcome.run = Run(str(self._load), list(self._timelines.values()))
        self.outcome.num_preemptions = sum(replica.num_preemptions for replica in self._replicas)
        return self.outcome

    def _put(self, time: float, replica: Replica | None) -> None:
        heapq.heappush(self._due, (time, next(self._order), replica))

    def _arrive(self, now: float) -> Replica:
        """The next request goes where a server's router would have it."""
        index, (token_ids, num_output) = next(self._coming)
        request = GenerateRequest(str(index), token_ids, SamplingParams(temperature=0), seed=0, max_tokens=num_output)
        loads = {index: replica.num_unfinished for index, replica in enumerate(self._replicas)}
        replica = self._replicas[self._router.choose(token_ids, loads).replica]
        try:
            replica.add(request)
        except SlipstreamError as error:
            raise UsageError(f"Request {index} cannot be run ({error}); leave it out of the data set.") from None
        self._timelines[request.request_id] = Timeline(now, num_input=len(token_ids))
        return replica

    def _begin(self, replica: Replica, now: float) -> None:
        work = replica.begin()
        if work is not None:
            seconds = self._costs.seconds(work)
            self.outcome.steps.append(work)
            self.outcome.busy_seconds += seconds
            self._put(now + seconds, replica)

    def _finish(self, replica: Replica, now: float) -> int:
        """How many requests ended."""
        num_ended = 0
        for event in replica.finish():
            timeline = self._timelines[event.request_id]
            timeline.arrivals += [now] * len(event.token_ids)
            timeline.num_output += len(event.token_ids)
            timeline.num_cached = max(timeline.num_cached, event.num_cached_tokens)
            if event.finish_reason is not None:
                timeline.ended = now
                num_ended += 1
        for _ in range(min(num_ended, self._num_left)):
            self._num_left -= 1
            self._put(now, None)
        return num_ended
