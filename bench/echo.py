"""The least a queue over Redis Streams can do, as the baseline of `bench broker`: XADD, XREADGROUP, XADD, XREAD.

No leases, no acknowledgement, no checks, no messages: the bytes that arrive are dropped and bytes of a verdict's size
sent back, with the same redis-py client on both sides.

    REDIS_URL=... python -m pilotfish.bench.echo REPLY_BYTES
"""

from __future__ import annotations

import asyncio
import os
import sys
from typing import Any

from pilotfish.bench.children import say_ready
from pilotfish.protocol import keys
from pilotfish.protocol.broker import RedisBytes, connect, ensure_group
from pilotfish.protocol.tasks import end_tasks

JOBS, REPLIES, GROUP = "echo:jobs", "echo:replies", "echo"


class EchoEdge:
    """The edge of the echo: one XADD to ask, one blocking XREAD that hands replies to those who wait."""

    def __init__(self, redis: RedisBytes) -> None:
        self.redis = redis
        self._waiting: dict[bytes, asyncio.Future[None]] = {}
        self._reader: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin to read replies."""
        self._reader = asyncio.create_task(self._read())

    async def stop(self) -> None:
        """Stop reading, close the connections."""
        if self._reader:
            await ended(self._reader)
        await self.redis.aclose()

    async def round(self, lane: bytes, payload: bytes) -> None:
        """One round trip."""
        reply = self._waiting[lane] = asyncio.get_running_loop().create_future()
        await self.redis.xadd(JOBS, {"a": lane, "m": payload}, nomkstream=True)
        await reply

    async def _read(self) -> None:
        cursor: Any = "0-0"
        while True:
            got = await self.redis.xread({REPLIES: cursor}, count=64, block=keys.BLOCK_MS)
            for entry_id, fields in got[0][1] if got else ():
                cursor = entry_id
                self._waiting.pop(fields[b"a"]).set_result(None)


async def ended(task: asyncio.Task[None]) -> None:
    """Cancel a task that talks to Redis until it is over; raises what it failed with."""
    await end_tasks([task])
    if not task.cancelled():
        task.result()


async def serve(url: str, reply: bytes) -> None:
    """Answer for ever."""
    redis = connect(url)
    await ensure_group(redis, JOBS, GROUP)
    say_ready()
    while True:
        got = await redis.xreadgroup(GROUP, "echo", {JOBS: ">"}, count=64, block=keys.BLOCK_MS, noack=True)
        for _, entries in got:
            for _, fields in entries:
                await redis.xadd(REPLIES, {"a": fields[b"a"], "m": reply}, maxlen=keys.REPLY_MAXLEN, approximate=True)


if __name__ == "__main__":
    asyncio.run(serve(os.environ["REDIS_URL"], b"x" * int(sys.argv[1])))
