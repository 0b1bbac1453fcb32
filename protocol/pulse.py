"""Whether Redis answers: a PING on a connection of its own, waited for no longer than is usual.

A paused Redis accepts connections, so nothing else tells soon. A PING that is late stays under way, and so does opening
a connection: across a far network that takes several round trips, and who gave up each time would never see Redis come
back. Knows seconds; nothing of what they are waited for.
"""

from __future__ import annotations

import asyncio
import time
from typing import Final

import redis.exceptions as rx
from redis.asyncio import Redis

from pilotfish.protocol.tasks import end_tasks
from pilotfish.protocol.wire import Wire

SILENCE_SECONDS: Final = 0.12  # a Redis that owes an answer for so long, or for PATIENCE usual ones, counts as silent
PATIENCE: Final = 4.0
OPENING: Final = 6.0  # times as long where a connection has to be opened first: TCP, TLS, log in, introduce oneself
LATE_SECONDS: Final = 0.03


class Pulse:
    """`answers()` asks, `patience()` is how long anyone may wait who is in a hurry."""

    def __init__(self, redis: Redis, seconds: float) -> None:
        self._wire = Wire(redis, seconds)
        self._usual_seconds = 0.0  # of a PING, smoothed
        self._well = True  # it answered last
        self._asked: asyncio.Task[bool] | None = None

    def patience(self, *, connected: bool) -> float:
        """Seconds after which an answer of Redis is no longer merely late, on a connection that is open or is not."""
        return max(SILENCE_SECONDS, PATIENCE * self._usual_seconds) * (1.0 if connected else OPENING)

    async def answers(self) -> bool:
        """Whether Redis answers in time. One that was silent is not given the time to open a connection again."""
        started, patience = time.monotonic(), self.patience(connected=self._wire.ready or not self._well)
        if self._asked is None or self._asked.done():
            self._asked = asyncio.create_task(self._ask())
        await asyncio.wait({self._asked}, timeout=patience)
        if self._asked.done():
            self._well = self._asked.result()
        else:  # or it is we who slept: ask again
            self._well = time.monotonic() - started > patience + LATE_SECONDS
        return self._well

    async def _ask(self) -> bool:
        connected, started = self._wire.ready, time.monotonic()
        try:
            await self._wire.call("PING")
        except (rx.RedisError, OSError):
            return False
        if connected:
            self._learn(time.monotonic() - started)
        return True

    def _learn(self, seconds: float) -> None:
        """A pause is no usual answer, and a network that became slower is one in the end."""
        seconds = min(seconds, self.patience(connected=True))
        self._usual_seconds += (seconds - self._usual_seconds) / (8 if self._usual_seconds else 1)

    async def end(self) -> None:
        """Wait for no answer any more."""
        await end_tasks([self._asked] if self._asked else [])
