"""An ASGI answer that is made while its client waits: ended when the client goes, cut off when it does not read.

A client that hangs up ends the work at once. One that takes nothing for STALL_SECONDS is hung up on; what it did not
read is the connection's own buffer (64 KiB) and no more. Knows ASGI; nothing of agents.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import aclosing
from typing import Any

from pilotfish.edge_agent.http.faults import Fault, fault
from pilotfish.protocol.errors import PilotfishError
from pilotfish.protocol.http_guard import Receive, Scope, Send
from pilotfish.protocol.http_server import HANG_UP

log = logging.getLogger("pilotfish.http")

STALL_SECONDS = 30.0
FIRST_SECONDS = 5.0  # how long the status may wait for the first event, so that an early failure has its own
BEAT_SECONDS = 15.0  # a comment is sent where nothing else is, so that nothing between us takes the line for dead


class Stalled(Exception):
    """The client takes nothing any more."""


class Answer:
    """Speaks while it listens for the client to leave; made by `whole` or `streamed`."""

    def __init__(self, speak: Callable[[Send], Coroutine[Any, Any, None]]) -> None:
        self._speak = speak

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        speaking = asyncio.create_task(self._speak(send))
        leaving = asyncio.create_task(_gone(receive))
        try:
            await asyncio.wait({speaking, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (speaking, leaving):
                task.cancel()
            ended, _ = await asyncio.gather(speaking, leaving, return_exceptions=True)
        if isinstance(ended, Stalled):
            await hang_up(scope)
        elif isinstance(ended, Exception):
            raise ended


def whole(work: Callable[[], Awaitable[bytes]]) -> Answer:
    """One JSON object, once `work` has it."""
    return Answer(lambda send: _say(work, send))


def streamed(events: AsyncGenerator[bytes, None]) -> Answer:
    """Server-sent events, as they come."""
    return Answer(lambda send: _stream(events, send))


async def _say(work: Callable[[], Awaitable[bytes]], send: Send) -> None:
    try:
        body = await work()
    except Exception as error:
        await send_fault(fault(error), send)
    else:
        await _start(send, 200, {"content-type": "application/json"})
        await _put(send, body, more=False)


async def hang_up(scope: Scope) -> None:
    """Cut the line to a client that does not read."""
    log.info("a client took nothing for %g s: hung up", STALL_SECONDS)
    scope["state"][HANG_UP]()
    await asyncio.sleep(0)  # uvicorn hears of it


def sse(data: bytes) -> bytes:
    """One event; JSON holds no bare line break."""
    return b"data: " + data + b"\n\n"


async def send_fault(told: Fault, send: Send) -> None:
    """A refusal as a whole answer."""
    await _start(send, told.status, {"content-type": "application/json", **told.headers})
    await _put(send, told.body, more=False)


async def _stream(events: AsyncGenerator[bytes, None], send: Send) -> None:
    """SSE. A failure before the first event is an ordinary refusal, a later one is an event of its own."""
    async with aclosing(events):
        coming = asyncio.ensure_future(anext(events, None))
        try:
            await asyncio.wait({coming}, timeout=FIRST_SECONDS)
            if coming.done() and (early := coming.exception()):
                await send_fault(fault(early if isinstance(early, Exception) else PilotfishError(str(early))), send)
                return
            await _start(send, 200, {"content-type": "text/event-stream; charset=utf-8", "x-accel-buffering": "no"})
            while (event := await _next(coming, send)) is not None:
                await _put(send, event)
                coming = asyncio.ensure_future(anext(events, None))
        except Stalled:
            raise
        except Exception as error:
            await _put(send, sse(fault(error).body))
        finally:
            coming.cancel()
            await asyncio.gather(coming, return_exceptions=True)
        await _put(send, sse(b"[DONE]"), more=False)


async def _next(coming: asyncio.Future[bytes | None], send: Send) -> bytes | None:
    while not coming.done():
        await asyncio.wait({coming}, timeout=BEAT_SECONDS)
        if not coming.done():
            await _put(send, b": still at it\n\n")
    return coming.result()


async def _start(send: Send, status: int, headers: dict[str, str]) -> None:
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})


async def _put(send: Send, body: bytes, *, more: bool = True) -> None:
    try:
        async with asyncio.timeout(STALL_SECONDS):
            await send({"type": "http.response.body", "body": body, "more_body": more})
    except TimeoutError:
        raise Stalled from None


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
