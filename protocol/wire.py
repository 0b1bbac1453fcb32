"""Calls to Redis with little between them and the socket, for the four commands of a round.

redis-py's client wraps a command in a check of its pool, a retry object, two time-outs and, to send it, a task of its
own: 210 us a call by a process that was asleep, against 100 us of a bare Connection, and a round has four on its path.
So the hot commands keep Connections of the client's own pool, which makes and closes them: URL, TLS, password and
database stay its business. Knows nothing of streams or messages but how redis-py shapes what XREAD answers.
"""

from __future__ import annotations

import asyncio
from typing import Any

import redis.exceptions as rx
from redis.asyncio import Redis
from redis.asyncio.connection import AbstractConnection

KEEP = 8

Entries = list[tuple[bytes, list[tuple[bytes, dict[bytes, bytes]]]]]  # [(stream, [(entry id, fields)])]


class Wire:
    """`await wire.call("XADD", ...)`: the raw answer. KEEP idle connections are kept, the rest go back to the pool."""

    def __init__(self, redis: Redis, seconds: float) -> None:
        self._pool, self._seconds = redis.connection_pool, seconds
        self._free: list[AbstractConnection] = []

    async def call(self, *command: Any) -> Any:
        """One command, sent once. Raises what redis-py does: ConnectionError, TimeoutError, ResponseError."""
        connection = await self._take()
        try:
            async with asyncio.timeout(self._seconds):
                await connection.connect()  # type: ignore[no-untyped-call]  # nothing to do, unless it was closed
                await connection.send_command(*command, check_health=False)
                return await connection.read_response()
        except rx.ResponseError:
            raise
        except TimeoutError:
            await connection.disconnect(nowait=True)
            raise rx.TimeoutError(f"no answer within {self._seconds:g} s") from None
        except BaseException:  # cancelled: the answer that is under way must not meet the next call
            await connection.disconnect(nowait=True)
            raise
        finally:
            await self._give(connection)

    async def _take(self) -> AbstractConnection:
        """An idle connection, else one of the pool's; one that Redis closed meanwhile is opened anew by `call`."""
        if self._free:
            idle = self._free.pop()
            reader = idle._reader  # the pool's own check reads with a time-out, which costs more than a command
            if reader is not None and reader.at_eof():
                await idle.disconnect(nowait=True)
            return idle
        try:
            async with asyncio.timeout(self._seconds):  # the pool connects one at a time
                connection: AbstractConnection = await self._pool.get_connection()
        except TimeoutError:
            raise rx.TimeoutError(f"no connection within {self._seconds:g} s") from None
        connection.socket_timeout = None  # `call` has its own; this one costs a task for every command sent
        return connection

    async def _give(self, connection: AbstractConnection) -> None:
        if len(self._free) < KEEP:
            self._free.append(connection)
            return
        connection.socket_timeout = self._pool.connection_kwargs.get("socket_timeout")
        await self._pool.release(connection)


def entries(answer: Any) -> Entries:
    """What XREAD and XREADGROUP answer: [] when there was nothing."""
    return [
        (stream, [(entry_id, dict(zip(fields[::2], fields[1::2], strict=True))) for entry_id, fields in found])
        for stream, found in answer or ()
    ]
