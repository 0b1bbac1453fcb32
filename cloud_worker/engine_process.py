"""The engine in a child process: msgpack frames over a socket pair, a pump on each side, restart when it dies.

A hung or dead engine must not take the worker with it, and a busy engine must not hold the worker's event loop. The
child (`python -m pilotfish.cloud_worker.engine_process FD`) owns one `Verifier` and steps it while there is work; the
parent side is asyncio. Frames are small maps; nothing is pickled. Knows engines; nothing of Redis.

    to the child     open {...spec} · submit {...request} · cancel {id} · forget {session}
    to the parent    ready {...info} · events {events} · refused {id, why} · failed {why}
                     busy {}: steps without an event, said once a second, so that a long prefill is not taken for a hang
"""

from __future__ import annotations

import asyncio
import os
import select
import signal
import socket
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgpack

from pilotfish.cloud_worker.engines.base import EngineInfo, Verifier, VerifyEvent, VerifyRequest
from pilotfish.protocol import cores, metrics
from pilotfish.protocol.errors import EngineError, ModelError, PilotfishError, RequestRefused
from pilotfish.protocol.fleet import Vocabulary
from pilotfish.protocol.messages import Sampling

START_SECONDS = 300.0
STOP_SECONDS = 5.0
READ_BYTES = 1 << 20
BUSY_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """Which engine to open, on what. `cores` (as in "0,1") binds the child; empty leaves it where it is.

    An engine that has work and says nothing for `silence_seconds` hangs, and is killed. The fake engine's `model` is
    its switches, as in "step_ms=20,flip_rate=0.01,flip_seed=3".
    """

    engine: str
    model: str
    context: int = 4096
    draft_max: int = 16
    max_sessions: int = 16
    threads: int = 1
    dtype: str = "float32"
    kv_cache_gb: int = 1
    cores: str = ""
    silence_seconds: float = 120.0


# --- parent side -----------------------------------------------------------------------------------------------


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

    async def start(self) -> None:
        """Start the child and wait until its model is loaded. Raises ModelError or EngineError with its sentence."""
        ours, theirs = socket.socketpair()
        environment = {**os.environ, **_environment(self.spec)}
        self._child = await asyncio.create_subprocess_exec(
            sys.executable, "-m", __name__, str(theirs.fileno()),
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
        """End the child, and a restart if there is one."""
        if self._restarting:
            self._restarting.cancel()
            await asyncio.gather(self._restarting, return_exceptions=True)
        await self._end_child()

    async def _end_child(self) -> None:
        """Ask by closing its connection, then kill by pid."""
        if self._writer:
            self._writer.close()
            with suppress(ConnectionError):
                await self._writer.wait_closed()
            self._writer = None
        if self._child and self._child.returncode is None:
            try:
                await asyncio.wait_for(self._child.wait(), STOP_SECONDS)
            except TimeoutError:
                self._child.kill()
                await self._child.wait()
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
        await self._ensure_alive()
        if not self._streams:
            self._heard = time.monotonic()
        events: asyncio.Queue[VerifyEvent | PilotfishError | None] = asyncio.Queue()
        self._streams[request.request_id] = events
        done = False
        try:
            self._send({"op": "submit", **asdict(request), "sampling": request.sampling.model_dump()})
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
        for fields in frame.get("events", ()):
            event = VerifyEvent(*fields)
            if event.request_id in self._streams:
                self._streams[event.request_id].put_nowait(event)


async def _frames(reader: asyncio.StreamReader) -> AsyncIterator[dict[str, Any]]:
    unpacker = msgpack.Unpacker(raw=False, max_buffer_size=1 << 28)
    with suppress(ConnectionError):
        while data := await reader.read(READ_BYTES):
            unpacker.feed(data)
            for frame in unpacker:
                yield frame


def _environment(spec: EngineSpec) -> dict[str, str]:
    """Thread counts must be set before the child imports an OpenMP runtime; busy waits would eat a neighbour's core."""
    return {"OMP_NUM_THREADS": str(spec.threads), "KMP_BLOCKTIME": "0", "OMP_WAIT_POLICY": "PASSIVE"}


# --- child side ------------------------------------------------------------------------------------------------


def open_verifier(spec: EngineSpec) -> tuple[Verifier, Vocabulary]:
    """Import and open the engine a spec names, with its vocabulary. Raises ModelError or EngineError."""
    limits = {"context": spec.context, "draft_max": spec.draft_max}
    if spec.engine == "fake":
        from pilotfish.cloud_worker.engines.fake import VOCAB, FakeVerifier

        vocabulary = Vocabulary(tuple(bytes([value]) for value in range(VOCAB)))
        switches: dict[str, Any] = {**limits, **fake_switches(spec.model)}
        return FakeVerifier(**switches), vocabulary
    limits["max_sessions"], limits["threads"] = spec.max_sessions, spec.threads
    if spec.engine == "llamacpp":
        from pilotfish.cloud_worker.engines.llamacpp import LlamaCppVerifier

        llama = LlamaCppVerifier(Path(spec.model), **limits)
        model = llama.model
        stops = tuple(sorted(model.eog_ids))
        return llama, Vocabulary(tuple(model.token_bytes), model.chat_template or "", stops)
    if spec.engine == "vllm":
        from pilotfish.cloud_worker.engines.hf_vocabulary import read_vocabulary
        from pilotfish.cloud_worker.engines.vllm_engine import VllmVerifier

        vocabulary = read_vocabulary(Path(spec.model))
        return VllmVerifier(Path(spec.model), dtype=spec.dtype, kv_cache_gb=spec.kv_cache_gb, **limits), vocabulary
    raise ModelError(f"there is no engine {spec.engine!r}: choose vllm, llamacpp or fake")


def fake_switches(text: str) -> dict[str, Any]:
    """`FakeVerifier`'s arguments from "step_ms=20,flip_rate=0.01,flip_seed=3". Raises ModelError."""
    kinds = {"step_ms": float, "flip_rate": float, "flip_seed": int}
    try:
        pairs = [part.split("=", 1) for part in text.split(",") if part not in ("", ".")]  # an empty path reads "."
        return {name: kinds[name](value) for name, value in pairs}
    except (KeyError, ValueError) as error:
        fix = f"give {', '.join(kinds)} as name=number"
        raise ModelError(f"the fake engine cannot read {text!r} ({error}): {fix}") from None


class Child:
    """The engine's main loop: read frames, step while there is work, write events."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.unpacker = msgpack.Unpacker(raw=False, max_buffer_size=1 << 28)
        self.engine: Verifier | None = None
        self.said = 0.0

    def run(self) -> None:
        """Serve until the parent closes its end. An engine that raises is reported and ends the process."""
        try:
            while self._read(wait=not (self.engine and self.engine.busy)):
                if self.engine and self.engine.busy:
                    self._step(self.engine)
        except (BrokenPipeError, ConnectionResetError):
            return  # the parent is gone
        except Exception as error:
            self._write({"op": "failed", "why": f"{type(error).__name__}: {error}"[:400]})
            raise

    def _step(self, engine: Verifier) -> None:
        events = engine.step()
        if events:
            self._write({"op": "events", "events": [_flat(event) for event in events]})
        elif time.monotonic() - self.said > BUSY_SECONDS:
            self._write({"op": "busy"})

    def _read(self, *, wait: bool) -> bool:
        """Handle what has arrived, blocking if there is nothing else to do. False at the end of the stream."""
        while select.select([self.connection], [], [], None if wait else 0)[0]:
            data = self.connection.recv(READ_BYTES)
            if not data:
                return False
            self.unpacker.feed(data)
            for frame in self.unpacker:
                self._handle(frame)
                wait = False
        return True

    def _handle(self, frame: dict[str, Any]) -> None:
        op = frame.pop("op")
        if op == "open":
            self._open(EngineSpec(**frame))
        elif self.engine is None:
            return
        elif op == "submit":
            self._submit(VerifyRequest(**{**frame, "sampling": Sampling(**frame["sampling"])}))
        elif op == "cancel":
            self.engine.cancel(frame["id"])
        elif op == "forget":
            self.engine.forget(frame["session"])

    def _open(self, spec: EngineSpec) -> None:
        cores.bind(spec.cores)
        try:
            self.engine, vocabulary = open_verifier(spec)
        except PilotfishError as error:
            kind = "model" if isinstance(error, ModelError) else "engine"
            self._write({"op": "failed", "kind": kind, "why": str(error)})
            raise SystemExit(1) from None
        self._write(
            {
                "op": "ready",
                "info": asdict(self.engine.info),
                "tokens": list(vocabulary.tokens),
                "chat_template": vocabulary.chat_template,
                "stop_ids": list(vocabulary.stop_ids),
            }
        )

    def _submit(self, request: VerifyRequest) -> None:
        assert self.engine is not None
        try:
            self.engine.submit(request)
        except RequestRefused as error:
            self._write({"op": "refused", "id": request.request_id, "why": str(error)})

    def _write(self, frame: dict[str, Any]) -> None:
        self.said = time.monotonic()
        self.connection.sendall(msgpack.packb(frame))


def _flat(event: VerifyEvent) -> list[Any]:
    return [
        event.request_id, [int(draw) for draw in event.draws], event.accepted, event.rows, event.steps, event.cached,
        event.done, event.error,
    ]  # fmt: skip


def main() -> None:
    """Entry point of the child; what libraries print on stdout goes to stderr."""
    for signum in (signal.SIGINT, signal.SIGTERM):  # they reach the whole group or service; the parent drains first
        signal.signal(signum, signal.SIG_IGN)
    os.dup2(2, 1)
    with socket.socket(fileno=int(sys.argv[1])) as connection:
        child = Child(connection)
        child.run()
        if child.engine:
            child.engine.close()
    sys.stderr.flush()
    os._exit(0)  # Triton's bindings would report a hundred lines of leaks on the way out


if __name__ == "__main__":
    main()
