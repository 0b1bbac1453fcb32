"""A Redis, two proxies, workers and agents, and how each fault of `chaos_plan.py` is done to them, and undone.

Half of the processes write an older wire version, every third has a clock an hour wrong. Edges and workers reach Redis
by a proxy each, so that one side can be cut off from it while the other is not.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any, Final

import redis.exceptions as rx
from redis.asyncio import Redis

from pilotfish.bench.chaos_judge import Switches
from pilotfish.bench.chaos_plan import Fault
from pilotfish.bench.chaos_poison import flood, poison
from pilotfish.bench.chaos_process import START_SECONDS, Process, Server
from pilotfish.cli.redis_server import free_port
from pilotfish.protocol import keys
from pilotfish.protocol.errors import EngineError

HOUR: Final = 3600
WORKERS: Final = 3
AGENTS: Final = 2
STEP_MS: Final = (0.0, 1.0, 5.0)  # of each worker's engine
FLIP_RATE: Final = 0.02


def switches(*, flips: bool) -> list[Switches]:
    """Of every worker's engine: with `flips`, each reads one position in fifty differently from its peers."""
    return [(FLIP_RATE if flips else 0.0, number) for number in range(WORKERS)]


class Fleet:
    """See the module docstring. `heard(agent number, line)` gets what agents say, None when one ended."""

    def __init__(self, seed: int, heard: Callable[[int, str | None], None], *, flips: bool) -> None:
        self.seed, self.flips = seed, flips
        self.server = Server()
        self.done: Counter[str] = Counter()
        self._heard = heard
        self._healing: set[asyncio.Task[None]] = set()
        self._busy: set[Any] = set()  # victims that have not recovered yet
        self.proxies: dict[str, Process] = {}
        self.workers: list[Process] = []
        self.agents: list[Process] = []
        self.urls: dict[str, str] = {}

    async def start(self) -> None:
        """Everything, until it serves. Raises EngineError with the names of what does not."""
        try:
            async with asyncio.timeout(2 * START_SECONDS):
                await self._start()
        except TimeoutError:
            everyone = (*self.proxies.values(), *self.workers, *self.agents)
            late = ", ".join(one.name for one in everyone if not one.ready.is_set())
            why = f"not ready after {2 * START_SECONDS:g} s: {late}; CHAOS_LOG=1 shows what they say"
            raise EngineError(why) from None

    async def _start(self) -> None:
        await self.server.start(free_port())
        for number, side in enumerate(("edges", "workers")):
            port = free_port()
            self.urls[side] = f"redis://127.0.0.1:{port}/0"
            where = ["--to", f"127.0.0.1:{self.server.port}", "--listen", str(port), "--seed", f"{self.seed}{number}"]
            self.proxies[side] = Process(side, ["chaos_proxy", *where])
            await self.proxies[side].start()
        for number, (rate, flip_seed) in enumerate(switches(flips=self.flips)):
            told = f"step_ms={STEP_MS[number]},flip_rate={rate},flip_seed={flip_seed}"
            arguments = ["chaos_child", "worker", self.urls["workers"], f"w{number}", told]
            self.workers.append(Process(f"w{number}", arguments, environment(number)))
        await asyncio.gather(*(worker.start() for worker in self.workers))
        for number in range(AGENTS):
            arguments = ["chaos_child", "agent", self.urls["edges"], f"a{number}"]
            told_to = lambda line, number=number: self._heard(number, line)  # noqa: E731
            self.agents.append(Process(f"a{number}", arguments, environment(number + 1), told_to))
        await asyncio.gather(*(agent.start() for agent in self.agents))

    @property
    def crashes(self) -> dict[str, list[str]]:
        """Ends that nobody asked for."""
        return {one.name: one.crashes for one in (*self.workers, *self.agents) if one.crashes}

    async def end(self) -> dict[str, int]:
        """Agents first. Returns exit codes that are not 0."""
        codes = {}
        for group in (self.agents, self.workers):
            ended = await asyncio.gather(*(one.end() for one in group))
            codes.update({one.name: code for one, code in zip(group, ended, strict=True) if code})
        return codes

    async def close(self) -> None:
        """Nothing is left running."""
        for task in self._healing:
            task.cancel()
        await asyncio.gather(*self._healing, return_exceptions=True)
        for one in (*self.agents, *self.workers, *self.proxies.values()):
            await one.kill()
        await self.server.close()

    # --- faults ----------------------------------------------------------------------------------------------

    def strike(self, fault: Fault) -> None:
        """Do it now, and undo it after its time; a victim that has not recovered from its last one is spared."""
        victim, act = self._chosen(fault)
        if victim in self._busy:
            act.close()
            return
        self._busy.add(victim)
        self.done[fault.name] += 1
        task = asyncio.create_task(self._suffer(victim, act))
        self._healing.add(task)
        task.add_done_callback(self._healing.discard)

    @property
    def victims(self) -> list[str]:
        """Who has not recovered yet."""
        return sorted(getattr(one, "name", "Redis") for one in self._busy)

    async def _suffer(self, victim: Any, act: Coroutine[Any, Any, None]) -> None:
        try:
            await act
        finally:
            self._busy.discard(victim)

    async def healed(self) -> None:
        """Until every fault is undone. Raises what undoing one raised."""
        while self._healing:
            await asyncio.gather(*self._healing)

    def _chosen(self, fault: Fault) -> tuple[Any, Coroutine[Any, Any, None]]:
        what, _, kind = fault.name.partition("_")
        worker = self.workers[fault.victim % len(self.workers)]
        agent = self.agents[fault.victim % len(self.agents)]
        if kind in ("worker", "agent"):
            victim = worker if kind == "worker" else agent
            return victim, {"kill": kill, "stop": stop, "drain": drain}[what](victim, fault.seconds)
        if kind == "engine":
            return worker, hurt_engine(worker, what, fault.seconds)
        if kind in self.proxies:
            proxy = self.proxies[kind]
            return proxy, {"cut": kill, "part": stop}[what](proxy, fault.seconds)
        if what in ("flood", "poison"):
            return fault, self._send(flood if what == "flood" else poison, fault.noise)
        return self.server, self._hurt_redis(fault)

    async def _hurt_redis(self, fault: Fault) -> None:
        server = self.server
        if fault.name == "pause_redis":
            server.send(signal.SIGSTOP)
            await asyncio.sleep(fault.seconds)
            server.send(signal.SIGCONT)
        elif fault.name in ("restart_redis", "empty_redis"):
            await server.kill(forget=fault.name == "empty_redis")
            await asyncio.sleep(fault.seconds)
            await server.start(server.port)
        elif fault.name == "client_pause":
            await self._tell("CLIENT", "PAUSE", int(fault.seconds * 1000), "ALL")
            await asyncio.sleep(fault.seconds)
        else:
            await self._tell("CONFIG", "SET", "maxmemory", "1mb")
            await asyncio.sleep(fault.seconds)
            await self._tell("CONFIG", "SET", "maxmemory", "0")

    async def _tell(self, *command: Any) -> None:
        async with self._connect() as redis:
            await redis.execute_command(*command)  # type: ignore[no-untyped-call]

    def _connect(self) -> Redis:
        client: Redis = Redis.from_url(self.server.url, socket_timeout=5)
        return client

    async def _send(self, what: Callable[[Redis, random.Random], Coroutine[Any, Any, None]], noise: int) -> None:
        with suppress(rx.RedisError, OSError):  # it may be away just now
            async with self._connect() as redis:
                await what(redis, random.Random(noise))

    # --- afterwards ------------------------------------------------------------------------------------------

    async def left(self) -> dict[str, int]:
        """Jobs and prompts that lie in their streams: stream -> how many."""
        found = {}
        async with self._connect() as redis:
            jobs = [name.decode() async for name in redis.scan_iter(keys.jobs("*", "*", "*"))]
            for name in (*jobs, keys.prompts(keys.DEFAULT_TENANT)):
                if length := await redis.xlen(name):
                    found[name] = length
        return found


def environment(number: int) -> dict[str, str]:
    """Of a process: its wire version and how wrong its clock is."""
    return {"CHAOS_WIRE": str(number % 2), "CHAOS_SKEW_SECONDS": str((0, HOUR, -HOUR)[number % 3])}


async def kill(victim: Process, seconds: float) -> None:
    """Kill it; start it again after a while."""
    await victim.kill()
    await asyncio.sleep(seconds)
    await victim.start()


async def drain(victim: Process, seconds: float) -> None:
    """Ask it to end; start it again."""
    code = await victim.end()
    if code:
        victim.crashes.append(f"it ended with {code} at SIGTERM")
    await asyncio.sleep(seconds)
    await victim.start()


async def stop(victim: Process, seconds: float) -> None:
    """It sleeps, and does not know."""
    victim.send(signal.SIGSTOP)
    try:
        await asyncio.sleep(seconds)
    finally:
        victim.send(signal.SIGCONT)


async def hurt_engine(worker: Process, what: str, seconds: float) -> None:
    """Of a worker, the engine only: dead, or too slow."""
    pids = worker.children()
    _signal(pids, signal.SIGKILL if what == "kill" else signal.SIGSTOP)
    if what == "stop":
        try:
            await asyncio.sleep(seconds)
        finally:
            _signal(pids, signal.SIGCONT)


def _signal(pids: list[int], signum: signal.Signals) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signum)


@asynccontextmanager
async def fleet(seed: int, heard: Callable[[int, str | None], None], *, flips: bool) -> AsyncIterator[Fleet]:
    """Started; nothing is left of it at the end."""
    running = Fleet(seed, heard, flips=flips)
    try:
        await running.start()
        yield running
    finally:
        await running.close()
