"""The phases of `bench broker`: blocks of rounds, commands counted by Redis, an idle worker, a WAN, stock arq."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractContextManager, asynccontextmanager
from dataclasses import dataclass, field
from itertools import chain
from time import perf_counter
from typing import Any, Final
from urllib.parse import urlsplit, urlunsplit

from pilotfish.bench import noop_worker as noop
from pilotfish.bench import stock_arq as arq
from pilotfish.bench.broker_edge import ROUNDS_PER_SESSION, Lane, StreamEdge
from pilotfish.bench.children import Child, child
from pilotfish.bench.echo import EchoEdge
from pilotfish.bench.stats import spread
from pilotfish.cloud_worker.arq_pool import arq_pool
from pilotfish.protocol import keys
from pilotfish.protocol.broker import EdgeBroker, RedisBytes, connect
from pilotfish.protocol.codec import encode
from pilotfish.protocol.messages import Verdict

RTT_MS: Final = 40.0
WARM_UP = 50
BLOCK_SECONDS = 60.0  # far longer than any block takes: a lost reply must not hang the benchmark
WORKER = "noop-1"

Round = Callable[[int], Awaitable[float]]  # lane -> seconds


@dataclass(slots=True)
class Measured:
    """Blocks of round trips in seconds, and the Redis commands they and everything around them took."""

    seconds: list[list[float]] = field(default_factory=list)
    commands: int = 0

    @property
    def all(self) -> list[float]:
        """Every round of every block."""
        return list(chain.from_iterable(self.seconds))

    @property
    def commands_per_round(self) -> float:
        """By `INFO commandstats`, nothing left out: sweeps, beats and empty reads are in it."""
        return self.commands / len(self.all)

    def shown(self) -> dict[str, float]:
        """For the report."""
        return {**spread(self.all), "commands_per_round": round(self.commands_per_round, 3)}


Blocks = dict[tuple[str, int], Measured]  # ("echo" | "ours", rounds in flight)


# --- messages of real size -----------------------------------------------------------------------------------


def payloads() -> tuple[bytes, bytes, bytes]:
    """A session's first job, a later one, and a verdict, as they are on the wire."""
    lane = Lane(EdgeBroker(connect("redis://localhost"), keys.DEFAULT_TENANT, "bench", "boot"), 1)
    first = lane.job()
    verdict = Verdict(
        boot=first.boot, session=first.session, epoch=0, round=1, base=first.base, digest=first.digest,
        draws=(*first.draft, 7), accepted=len(first.draft), worker=WORKER, credit=63, queue_ms=1.0, engine_ms=0.125,
        rows=9, steps=1, cached=400,
    )  # fmt: skip
    lane.apply(verdict)
    return encode(first), encode(lane.job()), encode(verdict)


def message_bytes() -> dict[str, Any]:
    """Sizes for the conditions."""
    first, later, verdict = payloads()
    return {"first_job_bytes": len(first), "job_bytes": len(later), "verdict_bytes": len(verdict)}


# --- a block of rounds ---------------------------------------------------------------------------------------


async def block(one_round: Round, in_flight: int, rounds: int) -> list[float]:
    """`rounds` round trips, `in_flight` of them at a time; seconds each. A round that never ends is a TimeoutError."""

    async def lane(number: int) -> list[float]:
        return [await one_round(number) for _ in range(rounds // in_flight)]

    async with asyncio.timeout(BLOCK_SECONDS):
        return list(chain.from_iterable(await asyncio.gather(*(lane(number) for number in range(in_flight)))))


async def commands(redis: RedisBytes) -> int:
    """Commands Redis has executed, of any kind and client, those inside of MULTI and scripts too."""
    return sum(entry["calls"] for entry in (await redis.info("commandstats")).values())


async def measure(into: Measured, control: RedisBytes, one_round: Round, in_flight: int, rounds: int) -> None:
    """Add one block."""
    before = await commands(control)
    into.seconds.append(await block(one_round, in_flight, rounds))
    into.commands += await commands(control) - before - 1  # the INFO that ends it


# --- against the echo ----------------------------------------------------------------------------------------


async def against_echo(url: str, pairs: int, rounds_1: int, rounds_16: int) -> Blocks:
    """Echo, ours, echo, ours ... at 1 and at 16 in flight."""
    sizes = {1: rounds_1, 16: rounds_16}
    blocks: Blocks = {(name, n): Measured() for n in sizes for name in ("echo", "ours")}
    reply = len(payloads()[2])
    environment = {"REDIS_URL": url}
    with noop_worker(url), child("echo", str(reply), environment=environment):
        async with connect(url) as control, edge(url, lanes=16) as ours, echo_edge(url) as echo:
            rounds: dict[str, Round] = {"echo": echo, "ours": ours.round}
            for one_round in rounds.values():
                await block(one_round, 1, WARM_UP)
            for _ in range(pairs):
                for (name, in_flight), measured in blocks.items():
                    await measure(measured, control, rounds[name], in_flight, sizes[in_flight])
    return blocks


def noop_worker(url: str) -> AbstractContextManager[Child]:
    """A worker process."""
    return child("noop_worker", WORKER, environment={"REDIS_URL": url})


@asynccontextmanager
async def edge(url: str, lanes: int = 1) -> AsyncIterator[StreamEdge]:
    """An edge of ours on its own client."""
    running = StreamEdge(EdgeBroker(connect(url), keys.DEFAULT_TENANT, "bench", "boot"), lanes)
    await running.start()
    try:
        yield running
    finally:
        await running.stop()


@asynccontextmanager
async def echo_edge(url: str) -> AsyncIterator[Round]:
    """An edge of the echo; a lane sends a long job first, then short ones, as ours does."""
    running = EchoEdge(connect(url))
    await running.start()
    first, later, _ = payloads()
    sent = dict.fromkeys(range(16), 0)

    async def one_round(lane: int) -> float:
        payload = later if sent[lane] % ROUNDS_PER_SESSION else first
        sent[lane] += 1
        started = perf_counter()
        await running.round(b"%d" % lane, payload)
        return perf_counter() - started

    try:
        yield one_round
    finally:
        await running.stop()


# --- an idle worker, and a WAN -------------------------------------------------------------------------------


async def idle_cpu(url: str, worker: Child, seconds: float) -> float:
    """Per cent of one core that a worker without jobs uses, by the clocks in its own beat."""
    async with connect(url) as redis:
        await asyncio.sleep(1.0)
        used, at = await _clocks(redis)
        await asyncio.sleep(seconds)
        used_then, then = await _clocks(redis)
    return 100 * (used_then - used) / (then - at)


async def _clocks(redis: RedisBytes) -> tuple[float, float]:
    beat = await redis.hgetall(keys.beat(noop.TARGET, WORKER))  # type: ignore[misc]  # typed for both clients at once
    return float(beat[noop.CPU_SECONDS.encode()]), float(beat[noop.AT_SECONDS.encode()])


async def over_wan(url: str, rounds: int) -> tuple[list[float], list[float]]:
    """Rounds, and bare PINGs, of an edge behind the delay proxy; the worker stays beside Redis."""
    parts = urlsplit(url)
    with child("delay_proxy", "--to", f"{parts.hostname}:{parts.port}", "--rtt-ms", str(RTT_MS)) as proxy:
        far = urlunsplit(parts._replace(netloc=f":{parts.password}@127.0.0.1:{proxy.said}"))
        async with edge(far) as ours:
            await block(ours.round, 1, 5)
            ping = await block(lambda _: _timed(ours.broker.redis.ping()), 1, 10)
            return await block(ours.round, 1, rounds), ping


async def _timed(wait: Awaitable[Any]) -> float:
    started = perf_counter()
    await wait
    return perf_counter() - started


# --- stock arq -----------------------------------------------------------------------------------------------


async def stock_arq(url: str, rounds: int, fast_rounds: int) -> dict[str, Measured]:
    """arq polling as it does by default, and every 10 ms on both sides; one in flight."""
    measured = {}
    for name, poll, count in (("poll_default", arq.DEFAULT_POLL_SECONDS, rounds), ("poll_10_ms", 0.01, fast_rounds)):
        with child("stock_arq", str(poll), environment={"REDIS_URL": url}):
            measured[name] = await _one_arq(url, poll, count)
    return measured


async def _one_arq(url: str, poll_seconds: float, rounds: int) -> Measured:
    _, later, verdict = payloads()
    edge_, measured = arq.ArqEdge(arq_pool(url, arq.QUEUE), poll_seconds), Measured()
    async with connect(url) as control:
        await edge_.round(later, len(verdict))
        await measure(measured, control, lambda _: _timed(edge_.round(later, len(verdict))), 1, rounds)
    await edge_.stop()
    return measured
