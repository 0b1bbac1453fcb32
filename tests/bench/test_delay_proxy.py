"""The delay proxy delays by what it says, keeps order, and ends when the connection does."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from redis.asyncio import Redis

from pilotfish.bench.children import child
from pilotfish.bench.delay_proxy import DelayProxy

RTT_MS = 60.0
SLACK_SECONDS = 2.0  # shared cores: what is checked exactly is the lower bound

Connection = tuple[DelayProxy, asyncio.StreamReader, asyncio.StreamWriter]


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(1 << 16):
        writer.write(data)
    writer.close()


@asynccontextmanager
async def through(
    rtt_ms: float = RTT_MS,
) -> AsyncIterator[tuple[DelayProxy, asyncio.StreamReader, asyncio.StreamWriter]]:
    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server, DelayProxy("127.0.0.1", port, rtt_ms=rtt_ms) as proxy:
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        try:
            yield proxy, reader, writer
        finally:
            writer.close()


async def test_a_round_trip_takes_the_delay_and_little_more() -> None:
    async with through() as (_, reader, writer):
        taken = []
        for _ in range(5):
            started = time.perf_counter()
            writer.write(b"ping")
            assert await reader.readexactly(4) == b"ping"
            taken.append(time.perf_counter() - started)
    assert min(taken) >= RTT_MS / 1000
    assert min(taken) < RTT_MS / 1000 + SLACK_SECONDS


async def test_a_stream_keeps_its_order_and_waits_once_not_per_chunk() -> None:
    sent = b"".join(number.to_bytes(4, "big") for number in range(5000))
    async with through() as (_, reader, writer):
        started = time.perf_counter()
        for at in range(0, len(sent), 100):
            writer.write(sent[at : at + 100])
            await asyncio.sleep(0)
        assert await reader.readexactly(len(sent)) == sent
    assert time.perf_counter() - started < RTT_MS / 1000 + SLACK_SECONDS


async def test_the_delay_may_change_while_it_runs() -> None:
    async with through(rtt_ms=0) as (proxy, reader, writer):
        proxy.rtt_ms = 80
        started = time.perf_counter()
        writer.write(b"x")
        await reader.readexactly(1)
    assert time.perf_counter() - started >= 0.08


async def test_the_end_of_a_connection_is_passed_on() -> None:
    async with through() as (_, reader, writer):
        writer.write(b"last words")
        writer.write_eof()
        assert await reader.read() == b"last words"


async def test_a_server_that_is_away_ends_the_connection() -> None:
    async with DelayProxy("127.0.0.1", 1, rtt_ms=1) as proxy:
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        assert await reader.read() == b""
        writer.close()


def test_a_url_goes_by_way_of_it_with_its_password() -> None:
    proxy = DelayProxy("redis.example", 6379, rtt_ms=1, listen=7000)
    assert proxy.through("redis://:secret@redis.example:6379/0") == "redis://:secret@127.0.0.1:7000/0"
    assert proxy.through("redis://redis.example:6379/0") == "redis://127.0.0.1:7000/0"


async def test_redis_works_behind_the_command(redis_url: str) -> None:
    at = redis_url.rpartition("@")[2].partition("/")[0]
    with child("delay_proxy", "--to", at, "--rtt-ms", "30") as proxy:
        async with Redis.from_url(redis_url.replace(at, f"127.0.0.1:{proxy.said}")) as client:
            await client.set("pf:through", "yes", px=10_000)
            started = time.perf_counter()
            assert await client.get("pf:through") == b"yes"
    assert time.perf_counter() - started >= 0.03


def test_a_child_that_cannot_start_is_an_error() -> None:
    with pytest.raises(Exception, match="ended before it was ready"), child("echo", "no number"):
        pass
