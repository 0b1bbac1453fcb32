"""What a round costs each part, measured on a small real fleet: Redis, a worker process, agents, the fake engine.

Processor time, not latency, so that it can be added up: Redis' own account (INFO), the worker's from /proc, that of
this process, which plays all the edges. What is left of one edge's cycle is what nobody's core spends: wake-ups and
waiting. Linux.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from redis.asyncio import Redis

from pilotfish.bench.children import child, own_redis
from pilotfish.bench.fleet_model import Costs
from pilotfish.bench.verifier_child import Edge, replay
from pilotfish.cloud_worker.engines.base import Verifier
from pilotfish.cloud_worker.engines.fake import VOCAB, FakeTarget, FakeVerifier, fake_target
from pilotfish.edge_agent.agent import Agent, new_boot
from pilotfish.edge_agent.drafters.fake import FakeDrafter
from pilotfish.edge_agent.generation import Generation
from pilotfish.edge_agent.task import Task
from pilotfish.edge_agent.tokenizer import ByteTokenizer
from pilotfish.protocol import fleet, keys
from pilotfish.protocol.broker import EdgeBroker, connect
from pilotfish.protocol.messages import Sampling

K: Final = 4
ALPHA: Final = 0.75
TOKEN_MS: Final = 3.0  # of the fake draft: a small model on a device
STEP_MS, ROW_US = 8.0, 50.0  # of the fake engine
TOKENS: Final = 64  # of one answer
PROMPT: Final = tuple(b"measure me: ")
CALIBRATED_AT: Final = 8  # edges
WARM_SECONDS: Final = 0.7
ENGINE_EDGES: Final = (1, 16)


@dataclass(frozen=True, slots=True)
class Measured:
    """One window of a real fleet of so many edges, per round but for `rounds_per_s` and the shares."""

    edges: int
    rounds_per_s: float
    commands: float
    redis_ms: float
    worker_ms: float
    host_ms: float
    draft_ms: float
    alpha: float

    @property
    def cycle_ms(self) -> float:
        """From one draft's begin to the next (Little's law over the whole cycle)."""
        return 1000 * self.edges / self.rounds_per_s

    @property
    def cores(self) -> float:
        """Processor time of all parts but the engine, in cores."""
        return self.rounds_per_s * (self.redis_ms + self.worker_ms + self.host_ms) / 1000


@dataclass(frozen=True, slots=True)
class Presence:
    """What one more edge costs Redis by being there, while it asks for nothing."""

    edge_ms_per_s: float
    worker_ms_per_s: float
    commands_per_s: float
    connections: float
    kilobytes: float


class Meter:
    """Processor time so far, in ms: Redis', the worker's with its engine's threads left out, ours."""

    def __init__(self, redis: Redis, worker: int) -> None:
        self.redis, self.worker = redis, worker

    async def read(self) -> dict[str, float]:
        """Milliseconds, and how many commands, clients and bytes."""
        info, stats = await self.redis.info(), await self.redis.info("commandstats")
        return {
            "at": time.monotonic() * 1000, "redis": 1000 * (info["used_cpu_sys"] + info["used_cpu_user"]),
            "commands": sum(one["calls"] for one in stats.values()), "connections": info["connected_clients"],
            "bytes": info["used_memory"], "worker": cpu_ms(self.worker), "host": 1000 * time.process_time(),
        }  # fmt: skip

    async def over(self, seconds: float) -> dict[str, float]:
        """What was added in a while."""
        before = await self.read()
        await asyncio.sleep(seconds)
        after = await self.read()
        return {name: after[name] - before[name] for name in after}


def cpu_ms(pid: int) -> float:
    """Of a process, all its threads; its children are others' account."""
    total = 0
    for thread in Path(f"/proc/{pid}/task").iterdir():
        with suppress(OSError):
            total += int((thread / "schedstat").read_text().split()[0])
    return total / 1e6


# --- the engine --------------------------------------------------------------------------------------------------


def engine_costs(engine: Verifier) -> tuple[float, float]:
    """(step_ms, row_ms) of the fake engine: a line through what replayed rounds of few and many edges took."""
    points = []
    for edges in ENGINE_EDGES:
        found = replay(engine, _replayed(edges), K)
        points.append((sum(found["round_rows"]) / found["steps"], 1000 * found["seconds"] / found["steps"]))
    return line(points)


def line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Step and row price through two (rows, ms); a price is not negative."""
    (few, short), (many, long) = points
    slope = max(0.0, (long - short) / (many - few))
    return max(0.0, short - slope * few), slope


def _replayed(edges: int) -> list[Edge]:
    coin, found = random.Random(edges), []
    for number in range(edges):
        prompt, sampling = [*PROMPT, number], Sampling()
        target, text = FakeTarget(prompt, sampling, VOCAB), list[int]()
        while len(text) < TOKENS:
            text.append(target.draw(len(prompt) + len(text)))
            target.extend(text[-1:])
        found.append(Edge(f"s{number}", prompt, text, [coin.random() < ALPHA for _ in text], VOCAB))
    return found


# --- the fleet ---------------------------------------------------------------------------------------------------


class Edges:
    """Agents in this process, each with one generation after the other."""

    def __init__(self, agents: list[Agent]) -> None:
        self.agents = agents
        self.ended = {"rounds": 0, "drafts": 0.0, "accepted": 0, "corrected": 0}
        self.running: dict[int, Generation] = {}

    def totals(self) -> dict[str, float]:
        """Rounds and what became of their drafts, those of running generations included."""
        found = dict(self.ended)
        for generation in self.running.values():
            _add(found, generation)
        return found

    async def write(self, number: int, seed: int) -> None:
        """One agent's lane, until it is cancelled."""
        agent, coin = self.agents[number], random.Random(seed)
        while True:
            task = Task(
                (*PROMPT, coin.randrange(VOCAB), coin.randrange(VOCAB)), "exact", max_tokens=TOKENS, drafting="fixed",
                draft_tokens=K, window=1,
            )  # fmt: skip
            generation = self.running[number] = agent.open(task)
            try:
                async for _ in generation.run():
                    pass
            finally:
                agent.close(generation)
                _add(self.ended, self.running.pop(number))


def _add(totals: dict[str, Any], generation: Generation) -> None:
    one = generation.summary()
    totals["rounds"] += one.rounds
    totals["drafts"] += one.draft_ms
    totals["accepted"] += one.accepted
    totals["corrected"] += one.corrected


@asynccontextmanager
async def agents(url: str, count: int) -> AsyncIterator[list[Agent]]:
    """So many, each with a name and connections of its own, taking prompts as real ones do."""
    async with AsyncExitStack() as stack:
        opened = []
        for number in range(count):
            redis = connect(url)
            target = await fleet.find_target(redis)
            broker = EdgeBroker(redis, keys.DEFAULT_TENANT, f"e{number}", new_boot())
            drafter = FakeDrafter(fake_target, alpha=ALPHA, token_ms=TOKEN_MS, seed=number)
            agent = Agent(drafter, ByteTokenizer(), (), broker, target)
            await agent.start(take_prompts=True)
            stack.push_async_callback(agent.stop)
            opened.append(agent)
        yield opened


async def measured(url: str, meter: Meter, edges: int, seconds: float) -> Measured:
    """A real fleet of so many edges at full speed for a while."""
    async with agents(url, edges) as running:
        load = Edges(running)
        writing = [asyncio.create_task(load.write(number, number)) for number in range(edges)]
        try:
            await asyncio.sleep(WARM_SECONDS)
            before = load.totals()
            spent = await meter.over(seconds)
            done = {name: value - before[name] for name, value in load.totals().items()}
        finally:
            for task in writing:
                task.cancel()
            await asyncio.gather(*writing, return_exceptions=True)
    rounds = max(1, done["rounds"])
    return Measured(
        edges, 1000 * rounds / spent["at"], spent["commands"] / rounds, spent["redis"] / rounds,
        spent["worker"] / rounds, spent["host"] / rounds, done["drafts"] / rounds,
        done["accepted"] / max(1, done["accepted"] + done["corrected"]),
    )  # fmt: skip


async def presence(url: str, meter: Meter, edges: int, seconds: float) -> Presence:
    """Redis with a worker alone, then with edges that ask for nothing."""
    before, alone = await meter.read(), await meter.over(seconds)
    async with agents(url, edges):
        await asyncio.sleep(WARM_SECONDS)
        there = await meter.read()
        both = await meter.over(seconds)
    per_s = 1000 / both["at"] / edges
    return Presence(
        max(0.0, both["redis"] - alone["redis"]) * per_s, alone["redis"] * 1000 / alone["at"],
        (both["commands"] - alone["commands"]) * per_s,
        (there["connections"] - before["connections"]) / edges, (there["bytes"] - before["bytes"]) / edges / 1024,
    )  # fmt: skip


async def calibrate(seconds: float, at: Sequence[int]) -> tuple[Costs, Presence, list[Measured]]:
    """Costs, and the real fleets that a prediction is held against."""
    step_ms, row_ms = engine_costs(FakeVerifier(step_ms=STEP_MS, row_us=ROW_US))
    switches = f"step_ms={STEP_MS},row_us={ROW_US}"
    with own_redis() as server, child("chaos_child", "worker", server.url, "w1", switches) as worker:
        async with Redis.from_url(server.url) as redis:
            meter = Meter(redis, worker.pid)
            there = await presence(server.url, meter, 2 * CALIBRATED_AT, seconds)
            alone = await measured(server.url, meter, 1, seconds)
            many = await measured(server.url, meter, CALIBRATED_AT, seconds)
            real = [await measured(server.url, meter, edges, seconds) for edges in at]
    return derived(alone, many, there, step_ms, row_ms), there, real


def derived(alone: Measured, many: Measured, there: Presence, step_ms: float, row_ms: float) -> Costs:
    """Costs of a round: busy parts by `many`, the wait on nobody by what `alone` cannot be explained otherwise."""
    present = (CALIBRATED_AT * there.edge_ms_per_s + there.worker_ms_per_s) / many.rounds_per_s
    costs = Costs(
        redis_ms=max(0.001, many.redis_ms - present), worker_ms=many.worker_ms, step_ms=step_ms, row_ms=row_ms,
        draft_ms=alone.draft_ms, host_ms=many.host_ms, redis_edge_ms=there.edge_ms_per_s,
        redis_worker_ms=there.worker_ms_per_s, k=K, alpha=many.alpha,
    )  # fmt: skip
    return replace(costs, hop_ms=max(0.0, alone.cycle_ms - alone.draft_ms - costs.alone_ms))
