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
from pilotfish.bench.chaos_plan import FAULTS, FULL_STREAM, Fault
from pilotfish.bench.chaos_poison import flood, poison
from pilotfish.bench.chaos_process import START_SECONDS, Process, Server
from pilotfish.bench.chaos_proxy import FATES
from pilotfish.cli.redis_server import free_port
from pilotfish.protocol import keys
from pilotfish.protocol.errors import EngineError

HOUR: Final = 3600
WORKERS: Final = 3
AGENTS: Final = 2
STEP_MS: Final = (0.0, 1.0, 5.0)  # of each worker's engine
FLIP_RATE: Final = 0.02
FULL_AT: Final = 200  # jobs in a stream; a flood is of 500
SIDES: Final = ("edges", "workers")
MEDDLED: Final = frozenset(f"{fate}_by_{side}" for fate in FATES for side in SIDES)  # by the proxies
EVERY_FAULT: Final = MEDDLED | {*FAULTS, FULL_STREAM}


def switches(*, flips: bool) -> list[Switches]:
    """Of every worker's engine: with `flips`, each reads one position in fifty differently from its peers."""
    return [(FLIP_RATE if flips else 0.0, number) for number in range(WORKERS)]


class Missed(Exception):
    """A fault found nothing to hurt."""


class Fleet:
    """See the module docstring. `heard(agent number, line)` gets what agents say, None when one ended."""

    def __init__(self, seed: int, heard: Callable[[int, str | None], None], *, flips: bool) -> None:
        self.seed, self.flips = seed, flips
        self.server = Server()
        self.done: Counter[str] = Counter()
        self._heard = heard
        self._healing: set[asyncio.Task[None]] = set()
        self._busy: set[Any] = set()  # victims that have not recovered yet
        self._failed: list[str] = []
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
        for number, side in enumerate(SIDES):
            port = free_port()
            self.urls[side] = f"redis://127.0.0.1:{port}/0"
            where = ["--to", f"127.0.0.1:{self.server.port}", "--listen", str(port), "--seed", f"{self.seed}{number}"]
            self.proxies[side] = Process(side, ["chaos_proxy", *where], said=self._counting(f"_by_{side}"))
            await self.proxies[side].start()
        for number, (rate, flip_seed) in enumerate(switches(flips=self.flips)):
            told = f"step_ms={STEP_MS[number]},flip_rate={rate},flip_seed={flip_seed}"
            arguments = ["chaos_child", "worker", self.urls["workers"], f"w{number}", told]
            self.workers.append(Process(f"w{number}", arguments, environment(number), self._counting("")))
        await asyncio.gather(*(worker.start() for worker in self.workers))
        for number in range(AGENTS):
            arguments = ["chaos_child", "agent", self.urls["edges"], f"a{number}"]
            told_to = lambda line, number=number: self._heard(number, line)  # noqa: E731
            self.agents.append(Process(f"a{number}", arguments, environment(number + 1), told_to))
        await asyncio.gather(*(agent.start() for agent in self.agents))

    def _counting(self, suffix: str) -> Callable[[str | None], None]:
        """For processes that say what they do: a word each time."""

        def count(line: str | None) -> None:
            if line:
                self.done[line.strip() + suffix] += 1

        return count

    @property
    def crashes(self) -> dict[str, list[str]]:
        """Ends that nobody asked for, and faults that could not be done or undone."""
        everyone = (*self.workers, *self.agents, *self.proxies.values())
        failed = {"faults": self._failed} if self._failed else {}
        return {one.name: one.crashes for one in everyone if one.crashes} | failed

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
        task = asyncio.create_task(self._suffer(fault.name, victim, act))
        self._healing.add(task)
        task.add_done_callback(self._healing.discard)

    @property
    def victims(self) -> list[str]:
        """Who has not recovered yet."""
        return sorted(getattr(one, "name", "Redis") for one in self._busy)

    async def _suffer(self, name: str, victim: Any, act: Coroutine[Any, Any, None]) -> None:
        """Counted is what was done: a fault that fails in silence is none."""
        try:
            await act
            self.done[name] += 1
        except Missed:
            self.done["missed"] += 1
        except Exception as error:
            self._failed.append(f"{name}: {type(error).__name__}: {error}")
        finally:
            self._busy.discard(victim)

    async def healed(self) -> None:
        """Until every fault is undone."""
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
        try:
            async with self._connect() as redis:
                await what(redis, random.Random(noise))
        except (rx.RedisError, OSError) as error:
            raise Missed from error  # it may be away just now

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
    """Of a process: its wire version, how wrong its clock is, how many jobs fill a stream."""
    skew = (0, HOUR, -HOUR)[number % 3]
    return {"CHAOS_WIRE": str(number % 2), "CHAOS_SKEW_SECONDS": str(skew), "CHAOS_FULL": str(FULL_AT)}


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
    if not (pids := worker.children()):
        raise Missed  # it has died just now, and not begun anew
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
