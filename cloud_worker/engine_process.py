"""The engine in a child process: msgpack frames over a socket pair, restart when it dies or hangs.

A hung or dead engine must not take the worker with it, and a busy engine must not hold the worker's event loop. The
child (`python -m pilotfish.cloud_worker.engine_child FD`) owns one `Verifier` and steps it while there is work; the
parent side is asyncio. Frames are small maps; nothing is pickled. Knows engines; nothing of Redis.

    to the child     open {...spec} · submit {...request} · cancel {id} · forget {session}
    to the parent    ready {...info} · events {events} · refused {id, why} · failed {why}
                     kv {changes: [kind, short names of 8 bytes each]}: what the prefix cache stored and evicted
                     busy {}: steps without an event, said once a second, so that a long prefill is not taken for a hang
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import suppress
from dataclasses import asdict, fields
from typing import Any

import msgpack

from pilotfish.cache.block_hash import SHORT_BYTES
from pilotfish.cloud_worker.engines.base import EngineInfo, KvChange, VerifyEvent, VerifyRequest
from pilotfish.cloud_worker.engines.spec import EngineSpec
from pilotfish.protocol import metrics
from pilotfish.protocol.errors import EngineError, ModelError, PilotfishError, RequestRefused
from pilotfish.protocol.fleet import Vocabulary

START_SECONDS = 300.0
STOP_SECONDS = 5.0
READ_BYTES = 1 << 20
CHILD = "pilotfish.cloud_worker.engine_child"


class EngineProcess:
    """One engine child; `stream` may be called from many tasks at once, their requests share engine steps."""

    info: EngineInfo
    vocabulary: Vocabulary

    def __init__(self, spec: EngineSpec) -> None:
        self.spec = spec
        self.restarts = 0
        self._child: asyncio.subprocess.Process | None = None
        self._streams: dict[str, asyncio.Queue[VerifyEvent | PilotfishError | None]] = {}
        self._pump: asyncio.Task[None] | None = None
        self._watch: asyncio.Task[None] | None = None
        self._restarting: asyncio.Task[None] | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._heard = 0.0
        self.on_kv: Callable[[KvChange], None] | None = None  # hears what the engine's prefix cache does, in order

    async def start(self) -> None:
        """Start the child and wait until its model is loaded. Raises ModelError or EngineError with its sentence."""
        ours, theirs = socket.socketpair()
        environment = {**os.environ, **_environment(self.spec)}
        self._child = await asyncio.create_subprocess_exec(
            sys.executable, "-m", CHILD, str(theirs.fileno()),
            pass_fds=(theirs.fileno(),), env=environment, stdin=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
        theirs.close()
        reader, self._writer = await asyncio.open_connection(sock=ours, limit=READ_BYTES)
        self._send({"op": "open", **asdict(self.spec)})
        frames = _frames(reader)
        first = await self._first(frames)
        if first["op"] != "ready":
            await self._end_child()
            kind = ModelError if first.get("kind") == "model" else EngineError
            raise kind(f"the {self.spec.engine} engine did not start: {first['why']}")
        self._heard = time.monotonic()
        self.info = EngineInfo(**first["info"])
        self.vocabulary = Vocabulary(tuple(first["tokens"]), first["chat_template"], tuple(first["stop_ids"]))
        self._pump = asyncio.create_task(self._read(frames))
        self._watch = asyncio.create_task(self._kill_if_silent())

    async def _first(self, frames: AsyncIterator[dict[str, Any]]) -> dict[str, Any]:
        try:
            return await asyncio.wait_for(anext(frames), START_SECONDS)
        except StopAsyncIteration:
            return {"op": "failed", "why": "it exited"}
        except TimeoutError:
            return {"op": "failed", "why": f"not ready after {START_SECONDS:.0f} s"}

    async def stop(self) -> None:
        """End the child, and a restart if there is one. Who is cancelled meanwhile is so once it is over."""
        ending = asyncio.create_task(self._stop())
        cancelled = False
        while not ending.done():  # `end_tasks` cancels again and again, and a target takes its time to leave
            try:
                await asyncio.shield(ending)
            except asyncio.CancelledError:
                cancelled = True
        ending.result()
        if cancelled:
            raise asyncio.CancelledError

    async def _stop(self) -> None:
        if self._restarting:
            self._restarting.cancel()
            await asyncio.gather(self._restarting, return_exceptions=True)
        await self._end_child()

    async def _end_child(self) -> None:
        """Ask by closing its connection, then kill by pid."""
        if self._writer:
            self._writer.close()
        if self._child and self._child.returncode is None:
            try:
                await asyncio.wait_for(self._child.wait(), STOP_SECONDS)
            except TimeoutError:
                self._child.kill()
                await self._child.wait()
        if self._writer:  # only now: one that hung would not have read what was left to say
            with suppress(ConnectionError):
                await self._writer.wait_closed()
            self._writer = None
        for task in (self._watch, self._pump):
            if task:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        self._watch = self._pump = None

    @property
    def alive(self) -> bool:
        """True while the child runs and its pump is attached."""
        return self._pump is not None and not self._pump.done()

    async def stream(self, request: VerifyRequest) -> AsyncGenerator[VerifyEvent, None]:
        """Events of one request; a dead child is restarted first. Ends without `done` when cancelled.

        Raises RequestRefused, or EngineError when the child dies. Closing it stops the request in the engine.
        """
        events: asyncio.Queue[VerifyEvent | PilotfishError | None] = asyncio.Queue()
        was_idle = not self._streams
        self._streams[request.request_id] = events  # before a restart, so that a cancel finds it
        done = False
        try:
            await self._ensure_alive()
            if was_idle:
                self._heard = time.monotonic()
            if events.empty():  # else it was cancelled meanwhile
                self._send({"op": "submit", **_shallow(request), "sampling": request.sampling.model_dump()})
            while not done:
                event = await events.get()
                if event is None:
                    return
                if isinstance(event, VerifyEvent):
                    done = event.done
                    if event.error:
                        raise RequestRefused(event.error)
                    yield event
                else:
                    raise event
        finally:
            self._streams.pop(request.request_id, None)
            if not done:
                self._send({"op": "cancel", "id": request.request_id})

    async def cancel(self, request_id: str) -> None:
        """Stop a request; its stream ends without `done`."""
        if request_id in self._streams:
            self._streams[request_id].put_nowait(None)

    async def forget(self, session: str) -> None:
        """Drop what the engine keeps for a session."""
        if self.alive:
            self._send({"op": "forget", "session": session})

    async def _ensure_alive(self) -> None:
        """One restart for all who wait for it; it goes on when one of them gives up."""
        if self.alive:
            return
        if self._restarting is None or self._restarting.done():
            self._restarting = asyncio.create_task(self._restart())
        await asyncio.shield(self._restarting)
        if not self.alive:
            raise EngineError("the engine died right after its restart: try again")

    async def _restart(self) -> None:
        await self._end_child()
        self.restarts += 1
        metrics.RESTARTS.inc()
        served = self.info.fingerprint
        await self.start()
        if self.info.fingerprint != served:
            await self._end_child()
            raise EngineError("the model changed under the worker: restart the worker")

    def _send(self, frame: dict[str, Any]) -> None:
        if self._writer and not self._writer.is_closing():
            self._writer.write(msgpack.packb(frame))

    async def _read(self, frames: AsyncIterator[dict[str, Any]]) -> None:
        """The pump: frames to the streams that wait for them, until the child ends; then an error to each of them."""
        why = "the engine process died"
        try:
            async for frame in frames:
                self._heard = time.monotonic()
                if frame["op"] == "failed":
                    why = frame["why"]
                    break
                self._dispatch(frame)
        finally:
            self._say_kv(KvChange("cleared"))  # with the process
            for events in self._streams.values():
                events.put_nowait(EngineError(f"{why}: try again, it is being restarted"))

    async def _kill_if_silent(self) -> None:
        """A hung engine looks alive: only its silence tells. Its jobs get an error, the next one restarts it."""
        while self._child and self._child.returncode is None:
            await asyncio.sleep(min(1.0, self.spec.silence_seconds / 4))
            if self._streams and time.monotonic() - self._heard > self.spec.silence_seconds:
                self._child.kill()

    def _dispatch(self, frame: dict[str, Any]) -> None:
        if frame["op"] == "refused" and frame["id"] in self._streams:
            self._streams[frame["id"]].put_nowait(RequestRefused(frame["why"]))
        for kind, names in frame.get("changes", ()):
            self._say_kv(KvChange(kind, _split(names)))
        for flat in frame.get("events", ()):
            event = VerifyEvent(*flat)
            if event.request_id in self._streams:
                self._streams[event.request_id].put_nowait(event)

    def _say_kv(self, change: KvChange) -> None:
        if self.on_kv:
            self.on_kv(change)


def _split(names: bytes) -> tuple[bytes, ...]:
    return tuple(names[start : start + SHORT_BYTES] for start in range(0, len(names), SHORT_BYTES))


async def _frames(reader: asyncio.StreamReader) -> AsyncIterator[dict[str, Any]]:
    unpacker = msgpack.Unpacker(raw=False, max_buffer_size=1 << 28)
    with suppress(ConnectionError):
        while data := await reader.read(READ_BYTES):
            unpacker.feed(data)
            for frame in unpacker:
                yield frame


def _shallow(request: VerifyRequest) -> dict[str, Any]:
    """Its fields, not copied: `asdict` would walk every id of the prefix, 2 ms a round at 4,000 tokens."""
    return {field.name: getattr(request, field.name) for field in fields(request)}


def _environment(spec: EngineSpec) -> dict[str, str]:
    """Thread counts must be set before the child imports an OpenMP runtime; busy waits would eat a neighbour's core."""
    return {"OMP_NUM_THREADS": str(spec.threads), "KMP_BLOCKTIME": "0", "OMP_WAIT_POLICY": "PASSIVE"}
