"""Calls to Redis with little between them and the socket, for the four commands of a round.

redis-py's client wraps a command in a check of its pool, a retry object, two time-outs and, to send it, a task of its
own: 210 us a call by a process that was asleep, against 100 us of a bare Connection, and a round has four on its path.
So the hot commands keep Connections of the client's own pool, which makes and closes them: URL, TLS, password and
database stay its business. Knows nothing of streams or messages but how redis-py shapes what XREAD answers.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any

import redis.exceptions as rx
from redis.asyncio import Redis
from redis.asyncio.connection import AbstractConnection

KEEP = 8
CLOSED = "the connection was closed"

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

    @property
    def ready(self) -> bool:
        """Whether the next call finds an open connection; else it may have to open one, in round trips of its own."""
        return bool(self._free) and _is_open(self._free[-1])

    async def _take(self) -> AbstractConnection:
        """An idle connection, else one of the pool's; one that Redis closed meanwhile is opened anew by `call`."""
        if self._free:
            idle = self._free.pop()
            if _hung_up(idle):
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


class Line:
    """One connection whose commands do not wait for the answers of those before them: `send` many, `receive` each.

    A command may block in Redis; the next runs the moment it ends, without asking the edge. `seconds` bounds each wait.
    After an error nothing under way is answered any more, and the next `send` connects anew.
    """

    def __init__(self, redis: Redis, seconds: float) -> None:
        self._pool, self._seconds = redis.connection_pool, seconds
        self._connection: AbstractConnection | None = None
        self._life = 0  # of the connection: what was asked in an earlier one is answered by nobody

    @property
    def ready(self) -> bool:
        """As a Wire's."""
        return self._connection is not None and _is_open(self._connection)

    async def send(self, *command: Any) -> None:
        """The command has left when this returns. Raises ConnectionError or TimeoutError of redis-py."""
        try:
            async with asyncio.timeout(self._seconds):
                connection = await self._open()
                await connection.send_command(*command, check_health=False)
        except TimeoutError:
            await self.close()
            raise rx.TimeoutError(f"nothing could be sent within {self._seconds:g} s") from None
        except BaseException:  # half a command may have left
            await self.close()
            raise

    async def receive(self) -> Any:
        """The next answer, in the order of the commands. Raises ResponseError, and what `send` does."""
        if self._connection is None:
            raise rx.ConnectionError(CLOSED)
        life = self._life
        try:
            async with asyncio.timeout(self._seconds):
                answer = await self._connection.read_response()
        except rx.ResponseError as error:
            answer = error
        except TimeoutError:
            await self._close(life)
            raise rx.TimeoutError(f"no answer within {self._seconds:g} s") from None
        except BaseException:  # cancelled: the answer under way must not meet whoever receives next
            await self._close(life)
            raise
        if life != self._life:  # closed while its last words were on their way to us
            raise rx.ConnectionError(CLOSED)
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def close(self) -> None:
        """Drop what is under way. The connection stays the pool's, which closes it with its others."""
        await self._close(self._life)

    async def _close(self, life: int) -> None:
        """Unless another life has begun: who still waits on the old connection must not close the new one."""
        if self._connection is not None and life == self._life:
            self._life += 1
            await self._connection.disconnect(nowait=True)
            self._connection.socket_timeout = self._pool.connection_kwargs.get("socket_timeout")
            connection, self._connection = self._connection, None
            await self._pool.release(connection)

    async def _open(self) -> AbstractConnection:
        if self._connection is None:
            self._connection = await self._pool.get_connection()
            self._connection.socket_timeout = None  # the time-outs are ours
        if _hung_up(self._connection):
            self._life += 1
            await self._connection.disconnect(nowait=True)
        await self._connection.connect()  # nothing to do, unless it was closed
        return self._connection


class Lane:
    """Calls on one line: they leave in the order they came, and none waits for the answer of the one before.

    So what follows each other arrives in that order, and a far Redis costs one round trip, not one for each call.
    """

    def __init__(self, redis: Redis, seconds: float) -> None:
        self._line = Line(redis, seconds)
        self._sending = asyncio.Lock()
        self._due: deque[asyncio.Future[Any]] = deque()
        self._reading: asyncio.Task[None] | None = None

    @property
    def ready(self) -> bool:
        """As a Wire's."""
        return self._line.ready

    async def call(self, *command: Any) -> Any:
        """One command, sent once. Raises what `Wire.call` does; the answer of a cancelled call is dropped."""
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        async with self._sending:
            try:
                await self._line.send(*command)
            except BaseException:
                self._fail(rx.ConnectionError(CLOSED))
                if self._reading:  # on a connection that is gone: its last word must not meet the calls of the next
                    self._reading.cancel()
                    self._reading = None
                raise
            self._due.append(answer)
            if self._reading is None or self._reading.done():
                self._reading = asyncio.create_task(self._read())
        return await answer

    async def _read(self) -> None:
        """Answers in the order of their calls, as long as one is due; what ends the connection fails all of them."""
        while self._due:
            try:
                answer = await self._line.receive()
            except rx.ResponseError as error:
                self._settle(self._due.popleft(), error)
            except (rx.RedisError, OSError) as error:
                self._fail(error)
            else:
                self._settle(self._due.popleft(), answer)

    def _fail(self, error: Exception) -> None:
        while self._due:
            self._settle(self._due.popleft(), error)

    def _settle(self, due: asyncio.Future[Any], answer: Any) -> None:
        if due.done():  # cancelled
            return
        if isinstance(answer, Exception):
            due.set_exception(answer)
        else:
            due.set_result(answer)


def _hung_up(connection: AbstractConnection) -> bool:
    """Whether Redis closed it. The pool's own check reads with a time-out, which costs more than a command."""
    return connection._reader is not None and connection._reader.at_eof()


def _is_open(connection: AbstractConnection) -> bool:
    return connection.is_connected and not _hung_up(connection)


def entries(answer: Any) -> Entries:
    """What XREAD and XREADGROUP answer: [] when there was nothing."""
    return [(stream, [(entry_id, by_name(fields)) for entry_id, fields in found]) for stream, found in answer or ()]


def by_name(fields: list[bytes]) -> dict[bytes, bytes]:
    """An entry's fields, which Redis tells as name, value, name, value, ..."""
    return dict(zip(fields[::2], fields[1::2], strict=True))
