"""Hot calls to Redis: answers, errors, and what a lost or cancelled call leaves behind."""

from __future__ import annotations

import asyncio

import pytest
import redis.exceptions as rx
from redis.asyncio import Redis

from helpers import wait_until
from pilotfish.protocol.wire import Wire, entries


@pytest.fixture
def wire(redis: Redis) -> Wire:
    return Wire(redis, seconds=5.0)


async def connections(redis: Redis) -> int:
    """Clients Redis has, beside the one that asks."""
    return int((await redis.info("clients"))["connected_clients"]) - 1


async def test_an_answer_comes_as_redis_sent_it(wire: Wire) -> None:
    assert await wire.call("XADD", "pf:s", "NOMKSTREAM", "*", "a", "b") is None
    assert await wire.call("PING") == b"PONG"


async def test_entries_have_the_shape_of_redis_py(wire: Wire, redis: Redis) -> None:
    for fields in ({"a": "1", "m": b"\xff"}, {"a": "2"}):
        await redis.xadd("pf:s", fields)  # type: ignore[arg-type]  # typed as invariant
    await redis.pexpire("pf:s", 10_000)
    ((stream, found),) = await redis.xread({"pf:s": "0"})
    assert entries(await wire.call("XREAD", "STREAMS", "pf:s", "0")) == [(stream, found)]
    assert entries(await wire.call("XREAD", "STREAMS", "pf:s", "$")) == []


async def test_an_error_of_redis_costs_no_connection(wire: Wire, redis: Redis) -> None:
    before = await connections(redis)
    for _ in range(3):
        with pytest.raises(rx.NoScriptError):
            await wire.call("EVALSHA", "0" * 40, 0)
    assert await wire.call("PING") == b"PONG"
    assert await connections(redis) == before + 1


async def test_calls_at_the_same_time_have_a_connection_each_and_keep_it(wire: Wire, redis: Redis) -> None:
    before = await connections(redis)
    for _ in range(3):
        answers = await asyncio.gather(*(wire.call("ECHO", str(number)) for number in range(8)))
        assert answers == [str(number).encode() for number in range(8)]
    assert await connections(redis) == before + 8


async def test_the_answer_of_a_cancelled_call_never_meets_another(wire: Wire, redis: Redis) -> None:
    waiting = asyncio.create_task(wire.call("XREAD", "BLOCK", 0, "STREAMS", "pf:nothing", "0"))
    await wait_until(lambda: blocked(redis), "the call to block")
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await redis.xadd("pf:nothing", {"late": "1"})
    await redis.pexpire("pf:nothing", 10_000)
    assert await wire.call("PING") == b"PONG"


async def test_a_redis_that_does_not_answer_is_a_timeout_and_the_next_call_connects_again(redis: Redis) -> None:
    wire = Wire(redis, seconds=0.1)
    with pytest.raises(rx.TimeoutError, match="no answer within 0.1 s"):
        await wire.call("XREAD", "BLOCK", 0, "STREAMS", "pf:nothing", "0")
    assert await wire.call("PING") == b"PONG"


async def test_a_connection_that_redis_closed_is_one_error_and_then_a_new_one(wire: Wire, redis: Redis) -> None:
    me = await wire.call("CLIENT", "ID")
    await redis.client_kill_filter(_id=str(me))
    with pytest.raises(rx.ConnectionError):
        await wire.call("PING")
    assert await wire.call("CLIENT", "ID") != me


async def test_closing_the_client_closes_its_calls_connections(redis_url: str, redis: Redis) -> None:
    before = await connections(redis)
    client = Redis.from_url(redis_url)
    assert await Wire(client, seconds=5.0).call("PING") == b"PONG"
    assert await connections(redis) == before + 1
    await client.aclose()
    await wait_until(lambda: gone(redis, before), "its connection to be gone")


async def blocked(redis: Redis) -> bool:
    return int((await redis.info("clients"))["blocked_clients"]) > 0


async def gone(redis: Redis, before: int) -> bool:
    return await connections(redis) == before
