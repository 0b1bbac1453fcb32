"""A child process that answers questions: msgpack values over its standard input and output, one at a time.

    with Piped("pilotfish.bench.module", environment) as child:
        child.ask({"do": "this"})

The child calls `serve(handle)`, or awaits `serve_async`. Engines live in such children: two of them never share a
process, and idle ones wait in a read, off everybody's cores. Knows nothing of what is asked.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import IO, Any, Self

import msgpack

from pilotfish.bench.children import end
from pilotfish.protocol.errors import EngineError


class Piped:
    """The parent's end. `ask` raises EngineError when the child has ended; its own errors are on standard error."""

    def __init__(self, module: str, environment: Mapping[str, str] | None = None) -> None:
        self.module, self.environment = module, environment or {}

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, "-m", self.module], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env={**os.environ, **self.environment}, start_new_session=True,  # Ctrl-C is the parent's; its end is ours
        )  # fmt: skip
        return self

    def __exit__(self, *_: object) -> None:
        end(self._process)

    @property
    def pid(self) -> int:
        """Of the child."""
        return self._process.pid

    def ask(self, question: Any) -> Any:
        """The child's answer."""
        assert self._process.stdin
        assert self._process.stdout
        try:
            _send(self._process.stdin, question)
            return _receive(self._process.stdout)
        except (BrokenPipeError, EOFError):
            raise EngineError(f"{self.module} ended: its errors are above") from None


def serve(handle: Callable[[Any], Any]) -> None:
    """Answer until standard input ends. What libraries print goes to standard error."""
    out = _own_output()
    with suppress(EOFError):
        while True:
            _send(out, handle(_receive(sys.stdin.buffer)))


async def serve_async(handle: Callable[[Any], Awaitable[Any]]) -> None:
    """The same for a child whose event loop has other things to do meanwhile."""
    out = _own_output()
    with suppress(EOFError):
        while True:
            _send(out, await handle(await asyncio.to_thread(_receive, sys.stdin.buffer)))


def _own_output() -> IO[bytes]:
    """Standard output for answers alone: what libraries print goes to standard error from here on."""
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return out


def _send(file: IO[bytes], value: Any) -> None:
    """One msgpack value behind its length in four bytes."""
    data: bytes = msgpack.packb(value)
    file.write(len(data).to_bytes(4, "little") + data)
    file.flush()


def _receive(file: IO[bytes]) -> Any:
    """The next value. Raises EOFError at the end."""
    if not (head := file.read(4)):
        raise EOFError
    return msgpack.unpackb(file.read(int.from_bytes(head, "little")), strict_map_key=False)
