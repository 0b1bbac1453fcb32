"""Hot calls to Redis: answers, errors, and what a lost or cancelled call leaves behind."""

from __future__ import annotations

import asyncio

import pytest
import redis.exceptions as rx
from redis.asyncio import Redis

from helpers import wait_until
from pilotfish.protocol.wire import KEEP, Wire, entries


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


async def test_connections_redis_closed_meanwhile_fail_no_call(wire: Wire, redis: Redis) -> None:
    await asyncio.gather(*(wire.call("PING") for _ in range(4)))
    await redis.client_kill_filter(_type="normal", skipme=True)
    await asyncio.sleep(0)
    await wait_until(lambda: all(c._reader is None or c._reader.at_eof() for c in wire._free), "the ends to be seen")
    assert await asyncio.gather(*(wire.call("PING") for _ in range(4))) == [b"PONG"] * 4


async def test_after_a_burst_the_pool_has_its_connections_back(redis: Redis) -> None:
    wire = Wire(redis, seconds=5.0)
    await asyncio.gather(*(wire.call("PING") for _ in range(KEEP * 3)))
    assert len(wire._free) == KEEP
    assert len(redis.connection_pool._in_use_connections) == KEEP


async def test_a_server_that_says_nothing_costs_every_call_its_time_once() -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with Redis.from_url(f"redis://:secret@127.0.0.1:{port}/0") as client:
        wire, began = Wire(client, seconds=0.3), asyncio.get_running_loop().time()
        results = await asyncio.gather(*(wire.call("PING") for _ in range(4)), return_exceptions=True)
        assert all(isinstance(result, rx.TimeoutError) for result in results), results
        assert asyncio.get_running_loop().time() - began < 1.5
    server.close()
    await server.wait_closed()
