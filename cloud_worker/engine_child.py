"""The engine's own process: reads frames, steps its engine while there is work, writes events.

`python -m pilotfish.cloud_worker.engine_child FD`, started by `engine_process.py`, which has the frames on its page.
Owns one `Verifier`; knows nothing of asyncio or Redis.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import time
from dataclasses import asdict
from typing import Any

import msgpack

from pilotfish.cloud_worker.engines.base import Verifier, VerifyEvent, VerifyRequest
from pilotfish.cloud_worker.engines.spec import EngineSpec, open_verifier
from pilotfish.protocol import cores
from pilotfish.protocol.errors import ModelError, PilotfishError, RequestRefused
from pilotfish.protocol.messages import Sampling

READ_BYTES = 1 << 20
BUSY_SECONDS = 1.0
TIDY_SECONDS = 5.0


class Child:
    """The engine's main loop: read frames, step while there is work, write events."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.unpacker = msgpack.Unpacker(raw=False, max_buffer_size=1 << 28)
        self.engine: Verifier | None = None
        self.said = self.tidied = 0.0

    def run(self) -> None:
        """Serve until the parent closes its end. An engine that raises is reported and ends the process."""
        try:
            while self._read(wait=not (self.engine and self.engine.busy)):
                if self.engine:
                    self._tidy(self.engine)
                    if self.engine.busy:
                        self._step(self.engine)
        except (BrokenPipeError, ConnectionResetError):
            return  # the parent is gone
        except Exception as error:
            self._write({"op": "failed", "why": f"{type(error).__name__}: {error}"[:400]})
            raise

    def _step(self, engine: Verifier) -> None:
        events = engine.step()
        self._tell_kv(engine)  # before the events: whoever hears of a round may ask what it left in the cache
        if events:
            self._write({"op": "events", "events": [_flat(event) for event in events]})
        elif time.monotonic() - self.said > BUSY_SECONDS:
            self._write({"op": "busy"})

    def _tidy(self, engine: Verifier) -> None:
        if time.monotonic() - self.tidied > TIDY_SECONDS:
            engine.tidy()
            self._tell_kv(engine)
            self.tidied = time.monotonic()

    def _read(self, *, wait: bool) -> bool:
        """Handle what has arrived, waiting if there is nothing else to do. False at the end of the stream."""
        while select.select([self.connection], [], [], TIDY_SECONDS if wait else 0)[0]:
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
            self._tell_kv(self.engine)
        elif op == "forget":
            self.engine.forget(frame["session"])
            self._tell_kv(self.engine)

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

    def _tell_kv(self, engine: Verifier) -> None:
        if changes := engine.kv_changes():
            self._write({"op": "kv", "changes": [[change.kind, b"".join(change.blocks)] for change in changes]})

    def _write(self, frame: dict[str, Any]) -> None:
        self.said = time.monotonic()
        self.connection.sendall(msgpack.packb(frame))


def _flat(event: VerifyEvent) -> list[Any]:
    return [
        event.request_id, [int(draw) for draw in event.draws], event.accepted, event.rows, event.steps, event.cached,
        event.done, event.error, event.logprobs,
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
