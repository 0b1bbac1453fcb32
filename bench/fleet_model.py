"""A fleet as a queueing network, event by event: edges draft, Redis queues, workers handle, engines step in batches.

Closed: each edge has one round under way. First come, first served everywhere; an engine takes all that waits, up to
its limit, into one step. Pure: costs and a seed in, an outcome out. Knows nothing of prefill, routing or failures, so
what it says is what steady rounds can reach. (Lazowska et al. 1984, Quantitative System Performance.)
"""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import Final

from pilotfish.bench.stats import percentile

JITTER: Final = 0.2  # of a draft's time, either way: edges do not march in step
ROUNDS_MIN: Final = 4_000
ROUNDS_PER_EDGE: Final = 3
WARM_SHARE: Final = 1 / 3
BUSY_SHARE: Final = 0.7  # a part that is sized for more answers late whenever chance brings two at a time
PARTS: Final = ("redis", "worker", "engine")


@dataclass(frozen=True, slots=True)
class Costs:
    """What one round costs each part, in ms of one core; `hop_ms` is what it waits on nobody's core."""

    redis_ms: float
    worker_ms: float
    step_ms: float  # an engine's step, beside its rows
    row_ms: float
    draft_ms: float  # a whole draft of k tokens
    hop_ms: float = 0.0
    host_ms: float = 0.0  # where one process plays all edges: its time for a round; 0 for devices of their own
    redis_edge_ms: float = 0.0  # per second: what an edge costs Redis while it asks for nothing
    redis_worker_ms: float = 0.0  # per second
    k: int = 4
    alpha: float = 0.75  # chance of each draft to be accepted
    batch: int = 64  # jobs an engine takes into one step, at most

    @property
    def rows(self) -> int:
        """Of one round."""
        return self.k + 1

    @property
    def tokens(self) -> float:
        """Committed by a round, on average (Leviathan et al. 2023)."""
        if self.alpha == 1:
            return self.k + 1
        return float((1 - self.alpha ** (self.k + 1)) / (1 - self.alpha))

    def engine_ms(self, batch: float) -> float:
        """An engine's time for one of `batch` rounds of a step."""
        return self.step_ms / batch + self.row_ms * self.rows

    @property
    def alone_ms(self) -> float:
        """A round trip where nobody else asks, without the draft."""
        return self.hop_ms + self.redis_ms + self.worker_ms + self.host_ms + self.engine_ms(1)


@dataclass(frozen=True, slots=True)
class Fleet:
    """How many of each; workers are spread over shards, a shard is a Redis with workers of its own."""

    edges: int
    workers: int = 1
    shards: int = 1
    rtt_ms: float = 0.0

    def __post_init__(self) -> None:
        if not 1 <= self.shards <= self.workers or self.edges < 1:
            raise ValueError(
                f"{self.edges} edges, {self.workers} workers, {self.shards} shards: each shard needs a worker"
            )


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of the time after warming up."""

    rounds_per_s: float
    tokens_per_s: float
    cycle_ms: float  # from one draft's begin to the next, mean
    p50_ms: float  # a round trip, from the end of its draft to its verdict
    p99_ms: float
    in_trip: float  # rounds under way beside those being drafted, mean over time
    trip_ms: float
    busy: dict[str, float] = field(default_factory=dict)  # part -> share used of what its busiest one can do

    @property
    def limit(self) -> str:
        """The part that is busiest."""
        return max(self.busy, key=self.busy.__getitem__)


class Line:
    """A first come, first served server."""

    def __init__(self) -> None:
        self.free = self.busy = 0.0

    def serve(self, now: float, ms: float) -> float:
        """When a job that comes now is through."""
        self.free = max(now, self.free) + ms
        self.busy += ms
        return self.free


class Engine:
    """Takes what waits into one step when it is idle.

    It steps all the time as soon as a few ask, so its `busy` counts what its rounds would take in full steps: what is
    left of its time is room.
    """

    def __init__(self) -> None:
        self.waiting: deque[int] = deque()
        self.running: list[int] = []
        self.busy = 0.0

    def begin(self, costs: Costs) -> float:
        """Begin a step over what waits; how long it takes."""
        self.running = [self.waiting.popleft() for _ in range(min(costs.batch, len(self.waiting)))]
        self.busy += len(self.running) * costs.engine_ms(costs.batch)
        return costs.step_ms + costs.row_ms * costs.rows * len(self.running)


def background(costs: Costs, fleet: Fleet) -> float:
    """Share of a shard's core that goes before any job: beats, empty reads, sweeps."""
    edges, workers = ceil(fleet.edges / fleet.shards), ceil(fleet.workers / fleet.shards)
    return (edges * costs.redis_edge_ms + workers * costs.redis_worker_ms) / 1000


def simulate(costs: Costs, fleet: Fleet, seed: int = 0) -> Outcome:
    """Play enough rounds. Raises ValueError where a shard has no time left for jobs."""
    return _Play(costs, fleet, seed).run()


class _Play:
    """One run. A round goes draft -> leave -> redis -> worker -> engine -> worker -> redis -> arrive."""

    def __init__(self, costs: Costs, fleet: Fleet, seed: int) -> None:
        self.costs, self.fleet, self.random = costs, fleet, random.Random(seed)
        if (idle := background(costs, fleet)) >= 1:
            raise ValueError(f"{fleet.edges} edges on {fleet.shards} Redis cost more than its core by being there")
        self.redis_ms = costs.redis_ms / (1 - idle) / 2
        self.idle = idle
        self.host = Line()
        self.redis = [Line() for _ in range(fleet.shards)]
        self.workers = [Line() for _ in range(fleet.workers)]
        self.engines = [Engine() for _ in range(fleet.workers)]
        self.now, self.events, self.number = 0.0, list[tuple[float, int, Callable[[int], None], int]](), 0
        self.sent = [0.0] * fleet.edges
        self.trips: list[float] = []
        self.tokens, self.area, self.flying = 0, 0.0, 0

    def run(self) -> Outcome:
        wanted = max(ROUNDS_MIN, ROUNDS_PER_EDGE * self.fleet.edges)
        for edge in range(self.fleet.edges):
            self._at(self.random.random() * self.costs.draft_ms, self._leave, edge)
        self._until(int(wanted * WARM_SHARE))
        began, before = self.now, self._busy()
        self.trips, self.tokens, self.area = [], 0, 0.0
        self._until(wanted)
        return self._outcome(self.now - began, before)

    def _until(self, rounds: int) -> None:
        while len(self.trips) < rounds:
            now, _, what, who = heapq.heappop(self.events)
            self.area += self.flying * (now - self.now)
            self.now = now
            what(who)

    def _at(self, time: float, what: Callable[[int], None], who: int) -> None:
        self.number += 1
        heapq.heappush(self.events, (time, self.number, what, who))

    # --- a round's way -----------------------------------------------------------------------------------------

    def _draft(self, edge: int) -> None:
        ms = self.costs.draft_ms * (1 + JITTER * (2 * self.random.random() - 1))
        self._at(self.now + ms, self._leave, edge)

    def _leave(self, edge: int) -> None:
        self.sent[edge], self.flying = self.now, self.flying + 1
        through = self.host.serve(self.now, self.costs.host_ms)
        self._at(through + (self.costs.hop_ms + self.fleet.rtt_ms) / 2, self._to_redis, edge)

    def _to_redis(self, edge: int) -> None:
        self._at(self.redis[edge % self.fleet.shards].serve(self.now, self.redis_ms), self._to_worker, edge)

    def _worker_of(self, edge: int) -> int:
        """Sessions stick; worker w serves shard w % shards."""
        shard, mine = edge % self.fleet.shards, edge // self.fleet.shards
        of_shard = (self.fleet.workers - shard - 1) // self.fleet.shards + 1
        return shard + self.fleet.shards * (mine % of_shard)

    def _to_worker(self, edge: int) -> None:
        self._at(self.workers[self._worker_of(edge)].serve(self.now, self.costs.worker_ms / 2), self._to_engine, edge)

    def _to_engine(self, edge: int) -> None:
        worker = self._worker_of(edge)
        self.engines[worker].waiting.append(edge)
        if not self.engines[worker].running:
            self._at(self.now + self.engines[worker].begin(self.costs), self._stepped, worker)

    def _stepped(self, worker: int) -> None:
        engine = self.engines[worker]
        for edge in engine.running:
            self._at(self.workers[worker].serve(self.now, self.costs.worker_ms / 2), self._back_to_redis, edge)
        engine.running = []
        if engine.waiting:
            self._at(self.now + engine.begin(self.costs), self._stepped, worker)

    def _back_to_redis(self, edge: int) -> None:
        through = self.redis[edge % self.fleet.shards].serve(self.now, self.redis_ms)
        self._at(through + (self.costs.hop_ms + self.fleet.rtt_ms) / 2, self._arrive, edge)

    def _arrive(self, edge: int) -> None:
        self.trips.append(self.now - self.sent[edge])
        self.flying -= 1
        self.tokens += 1
        for _ in range(self.costs.k):
            if self.random.random() >= self.costs.alpha:
                break
            self.tokens += 1
        self._draft(edge)

    # --- what it came to -----------------------------------------------------------------------------------------

    def _busy(self) -> dict[str, list[float]]:
        lines: dict[str, Sequence[Line | Engine]] = {
            "redis": self.redis, "worker": self.workers, "engine": self.engines, "host": [self.host],
        }  # fmt: skip
        return {part: [one.busy for one in them] for part, them in lines.items()}

    def _outcome(self, ms: float, before: dict[str, list[float]]) -> Outcome:
        """Work is booked when it comes, so a part that has more than it can do is busy all of the time."""
        busy = {
            part: min(1.0, max((after - was) / ms for after, was in zip(them, before[part], strict=True)))
            for part, them in self._busy().items() if part != "host" or self.costs.host_ms
        }  # fmt: skip
        return Outcome(
            1000 * len(self.trips) / ms, 1000 * self.tokens / ms, self.fleet.edges * ms / len(self.trips),
            percentile(self.trips, 0.5), percentile(self.trips, 0.99), self.area / ms,
            sum(self.trips) / len(self.trips), busy,
        )  # fmt: skip


# --- on the back of an envelope ------------------------------------------------------------------------------------


def cycle_ms(costs: Costs, rtt_ms: float) -> float:
    """From one draft's begin to the next, where nobody waits for anybody."""
    return costs.draft_ms + rtt_ms + costs.alone_ms


def saturation(costs: Costs, rtt_ms: float = 0.0) -> dict[str, int]:
    """Edges at which one of each part has no time left: cycle over demand, the utilisation law at 1."""
    cycle = cycle_ms(costs, rtt_ms)
    redis = costs.redis_ms / cycle + costs.redis_edge_ms / 1000
    return {
        "redis": int((1 - costs.redis_worker_ms / 1000) / redis),
        "worker": int(cycle / costs.worker_ms),
        "engine": int(cycle / costs.engine_ms(costs.batch)),
    }


def sized(costs: Costs, edges: int, rtt_ms: float = 0.0, share: float = BUSY_SHARE) -> Fleet:
    """The fewest workers and shards with no part busy for more than `share` of its time, engines stepping full."""
    at_most = saturation(costs, rtt_ms)
    workers = ceil(edges / (share * min(at_most["worker"], at_most["engine"])))
    shards = 1
    while shards < workers and _redis_busy(costs, Fleet(edges, workers, shards, rtt_ms)) > share:
        shards += 1
    while shards < edges and _redis_busy(costs, Fleet(edges, workers, shards, rtt_ms)) > share:  # a worker for each
        workers, shards = workers + 1, shards + 1
    return Fleet(edges, workers, shards, rtt_ms)


def _redis_busy(costs: Costs, fleet: Fleet) -> float:
    jobs = ceil(fleet.edges / fleet.shards) * costs.redis_ms / cycle_ms(costs, fleet.rtt_ms)
    return jobs + background(costs, fleet)
