"""Hot calls to Redis: answers, errors, and what a lost or cancelled call leaves behind."""

from __future__ import annotations

import asyncio

import pytest
import redis.exceptions as rx
from redis.asyncio import Redis

from helpers import wait_until
from pilotfish.protocol.wire import KEEP, Lane, Line, Wire, entries


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


# --- one lane ------------------------------------------------------------------------------------------------


@pytest.fixture
def lane(redis: Redis) -> Lane:
    return Lane(redis, seconds=5.0)


async def test_commands_of_a_lane_leave_in_order_on_one_connection(lane: Lane, redis: Redis) -> None:
    before = await connections(redis)
    answers = await asyncio.gather(*(lane.call("ECHO", str(number)) for number in range(50)))
    assert answers == [str(number).encode() for number in range(50)]
    assert await connections(redis) == before + 1


async def test_a_command_that_blocks_is_followed_by_the_next_without_asking(lane: Lane, redis: Redis) -> None:
    """The second read is in Redis before the first is answered, so both entries come although nobody asks again."""
    await redis.xgroup_create("pf:s", "g", id="0", mkstream=True)
    await redis.pexpire("pf:s", 10_000)
    read = ("XREADGROUP", "GROUP", "g", "c", "BLOCK", 5000, "NOACK", "STREAMS", "pf:s", ">")
    first, second = asyncio.create_task(lane.call(*read)), asyncio.create_task(lane.call(*read))
    await wait_until(lambda: blocked(redis), "the first read to block")
    for value in ("1", "2"):
        await redis.xadd("pf:s", {"a": value})
        await wait_until(lambda: first.done() if value == "1" else second.done(), "its answer")  # noqa: B023
    got = [entries(await answer)[0][1][0][1] for answer in (first, second)]
    assert got == [{b"a": b"1"}, {b"a": b"2"}]


async def test_an_error_of_redis_is_told_to_its_own_call_only(lane: Lane) -> None:
    told = await asyncio.gather(lane.call("PING"), lane.call("NOSUCH"), lane.call("PING"), return_exceptions=True)
    assert (told[0], told[2]) == (b"PONG", b"PONG")
    assert isinstance(told[1], rx.ResponseError)


async def test_the_answer_of_a_cancelled_call_is_dropped_and_the_next_has_its_own(lane: Lane, redis: Redis) -> None:
    waiting = asyncio.create_task(lane.call("BLPOP", "pf:nothing", 1))
    await wait_until(lambda: blocked(redis), "the call to block")
    waiting.cancel()
    assert await lane.call("ECHO", "next") == b"next"


async def test_a_lost_connection_fails_what_is_under_way_and_the_next_call_connects_again(
    lane: Lane, redis: Redis
) -> None:
    waiting = [asyncio.create_task(lane.call("BLPOP", "pf:nothing", 0)) for _ in range(2)]
    await wait_until(lambda: blocked(redis), "the call to block")
    await redis.client_kill_filter(_type="normal", skipme=True)
    lost = await asyncio.gather(*waiting, return_exceptions=True)
    assert all(isinstance(error, rx.ConnectionError) for error in lost)
    assert await lane.call("PING") == b"PONG"


async def test_a_lane_whose_redis_says_nothing_times_out_and_goes_on(redis: Redis) -> None:
    lane = Lane(redis, seconds=0.1)
    with pytest.raises(rx.TimeoutError, match="no answer within 0.1 s"):
        await lane.call("BLPOP", "pf:nothing", 0)
    assert await lane.call("PING") == b"PONG"


async def test_what_a_closed_connection_still_said_answers_no_call_of_the_next_one(
    redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is closed (another call could not be sent) while the answer is between the socket and who waits for it."""
    line, feed = Line(redis, seconds=5.0), asyncio.StreamReader.feed_data
    await line.send("BLPOP", "pf:q", 0)
    receiving = asyncio.create_task(line.receive())
    await wait_until(lambda: blocked(redis), "the call to block")
    old, closing = line._connection._reader, set[asyncio.Task[None]]()  # type: ignore[union-attr]

    def close_first(reader: asyncio.StreamReader, data: bytes) -> None:
        if reader is old:
            closing.add(asyncio.create_task(line.close()))
        feed(reader, data)

    monkeypatch.setattr(asyncio.StreamReader, "feed_data", close_first)
    await redis.rpush("pf:q", "late")  # type: ignore[misc]
    with pytest.raises(rx.ConnectionError, match="was closed"):
        await receiving
    assert closing
    await line.send("ECHO", "next")
    assert await line.receive() == b"next"


class Torn:
    """A line whose first connection breaks when the second command is sent; who waits on it hears late (TLS)."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.late, self.again = asyncio.Event(), False

    async def send(self, *command: bytes) -> None:
        if command == (b"breaks",):
            self.again = True
            self.sent.clear()
            raise rx.ConnectionError("broken")
        self.sent.append(command[0])

    async def receive(self) -> bytes:
        if not self.again:
            await self.late.wait()
            raise rx.ConnectionError("closed")
        return self.sent.pop(0)


async def test_whoever_waits_on_a_broken_connection_fails_no_call_of_the_next_one(
    lane: Lane, monkeypatch: pytest.MonkeyPatch
) -> None:
    torn = Torn()
    monkeypatch.setattr(lane, "_line", torn)
    first = asyncio.create_task(lane.call(b"first"))
    await wait_until(lambda: torn.sent, "the first to leave")
    with pytest.raises(rx.ConnectionError, match="broken"):
        await lane.call(b"breaks")
    third = asyncio.create_task(lane.call(b"third"))
    await wait_until(lambda: torn.sent or third.done(), "the third to leave")
    torn.late.set()
    assert await third == b"third"
    assert await lane.call(b"fourth") == b"fourth"
    with pytest.raises(rx.ConnectionError):
        await first
