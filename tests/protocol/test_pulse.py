"""Whether Redis answers: soon where it is silent, not too soon where it is far away."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import pytest
from redis.asyncio import Redis

from helpers import wait_until
from pilotfish.bench.delay_proxy import DelayProxy
from pilotfish.protocol.broker import EdgeBroker, connect
from pilotfish.protocol.pulse import LATE_SECONDS, OPENING, PATIENCE, SILENCE_SECONDS, Pulse

SECONDS = 5.0
RTT_MS = 80.0


@pytest.fixture
def pulse(redis: Redis) -> Pulse:
    return Pulse(redis, SECONDS)


@pytest.fixture
async def far(redis_url: str) -> AsyncIterator[Redis]:
    """A client far away that has no connection yet."""
    async with DelayProxy.before(redis_url, rtt_ms=RTT_MS) as proxy, connect(proxy.through(redis_url)) as client:
        yield client


async def cut(pulse: Pulse) -> None:
    for connection in pulse._wire._free:
        await connection.disconnect(nowait=True)


async def test_a_paused_redis_does_not_answer_and_is_not_waited_for(redis: Redis, pulse: Pulse) -> None:
    assert await pulse.answers()
    started = time.monotonic()
    await redis.client_pause(1_000)
    assert not await pulse.answers()
    assert time.monotonic() - started < 0.8
    await wait_until(pulse.answers, "Redis to answer again")


async def test_who_slept_itself_calls_nobody_silent(redis: Redis, pulse: Pulse) -> None:
    assert await pulse.answers()
    await redis.client_pause(500)
    asyncio.get_running_loop().call_later(0.01, time.sleep, SILENCE_SECONDS + LATE_SECONDS + 0.15)
    assert await pulse.answers()


async def test_a_connection_that_is_not_open_yet_is_given_time(far: Redis) -> None:
    """To open one takes longer than a PING may: a far Redis would be silent before it was ever asked."""
    pulse = Pulse(far, SECONDS)
    started = time.monotonic()
    assert await pulse.answers()
    assert time.monotonic() - started > SILENCE_SECONDS
    await cut(pulse)  # as a firewall does with one that was idle
    assert await pulse.answers()


async def test_a_far_redis_that_was_silent_is_seen_to_be_back(far: Redis) -> None:
    """Who gives an attempt up after a PING's time, and its connection with it, never gets through."""
    pulse = Pulse(far, SECONDS)
    pulse._well = False
    assert not await pulse.answers()
    await wait_until(pulse.answers, "the connection to be opened in the meantime", 1.0)


async def test_what_is_usual_is_learnt_and_a_pause_is_not(redis: Redis, far: Redis, pulse: Pulse) -> None:
    assert pulse.patience(connected=True) == SILENCE_SECONDS
    assert pulse.patience(connected=False) == OPENING * SILENCE_SECONDS
    away = Pulse(far, SECONDS)
    for _ in range(2):
        assert await away.answers()
    usual = away.patience(connected=True)
    assert usual >= PATIENCE * RTT_MS / 1000
    await redis.client_pause(900)
    assert not await away.answers()
    await wait_until(away.answers, "Redis to answer again")
    assert away.patience(connected=True) < 2 * usual


async def test_the_first_job_to_a_far_redis_is_given_the_time_to_open_its_connection(far: Redis) -> None:
    edge = EdgeBroker(far, "default", "edge1", "boot1")
    cold = edge.patience
    assert cold == OPENING * SILENCE_SECONDS
    await edge._jobs.call("PING")
    assert edge.patience < cold


async def test_an_answer_that_is_awaited_no_more_leaves_nothing_running(redis: Redis, pulse: Pulse) -> None:
    await pulse.end()  # nothing was asked yet
    assert await pulse.answers()
    await redis.client_pause(300)
    assert not await pulse.answers()
    await pulse.end()
    assert pulse._asked
    assert pulse._asked.cancelled()
