"""Who may generate now: a bounded number at a time, others wait in fair turns, too many are told when to come back.

A free place goes to the client that holds the fewest, among equals to the one whose last turn is longest ago. So one
client with a hundred requests delays another's first one by a single answer. Knows names and places, no requests.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from pilotfish.protocol import metrics
from pilotfish.protocol.errors import Overloaded

RETRY_MAX_SECONDS = 30
USUAL_SECONDS = 2.0  # how long an answer takes, before any was measured
_MEMORY = 0.2  # weight of the newest answer in the running mean


class Turnstile:
    """`places` generations at once, at most `waiting` more in line."""

    def __init__(self, places: int, waiting: int) -> None:
        self.places, self.max_waiting = places, waiting
        self._running: Counter[str] = Counter()
        self._lines: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()  # who waits longest for a turn first
        self._mean_seconds = USUAL_SECONDS

    @property
    def running(self) -> int:
        """Places taken."""
        return self._running.total()

    @property
    def waiting(self) -> int:
        """Requests in line."""
        return sum(map(len, self._lines.values()))

    def _count(self) -> None:
        metrics.WAITING.set(self.waiting)

    def check(self, wanted: int) -> None:
        """Raise Overloaded if `wanted` more do not fit."""
        free = self.places + self.max_waiting - self.running - self.waiting
        if wanted > free:
            raise Overloaded(
                f"{self.running} generations run here and {self.waiting} wait: try again in a few seconds",
                retry_after_s=self._retry_after(),
            )

    def _retry_after(self) -> int:
        seconds = self._mean_seconds * (1 + self.waiting / self.places)
        return max(1, min(RETRY_MAX_SECONDS, math.ceil(seconds)))

    @asynccontextmanager
    async def place(self, client: str) -> AsyncIterator[None]:
        """One place for the block, once it is this client's turn."""
        await self._enter(client)
        clock = asyncio.get_running_loop().time
        since = clock()
        try:
            yield
        finally:
            self._mean_seconds += _MEMORY * (clock() - since - self._mean_seconds)
            self._leave(client)

    async def _enter(self, client: str) -> None:
        if self.running < self.places and not self._lines:
            self._running[client] += 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._lines.setdefault(client, deque()).append(turn)
        self._count()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._leave(client)  # the place came together with the cancellation
            else:
                self._forget(client, turn)
            raise
        finally:
            self._count()

    def _forget(self, client: str, turn: asyncio.Future[None]) -> None:
        line = self._lines.get(client, deque())
        if turn in line:  # else `_admit` met it cancelled, before we heard of it
            line.remove(turn)
            if not line:
                del self._lines[client]

    def _leave(self, client: str) -> None:
        self._running[client] -= 1
        if not self._running[client]:
            del self._running[client]
        while self._lines and self.running < self.places:
            self._admit(min(self._lines, key=lambda name: self._running[name]))

    def _admit(self, client: str) -> None:
        line = self._lines[client]
        turn = line.popleft()
        if line:
            self._lines.move_to_end(client)
        else:
            del self._lines[client]
        if not turn.cancelled():
            self._running[client] += 1
            turn.set_result(None)
