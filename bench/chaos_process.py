"""Processes that are killed, stopped and started again while others use them. Linux: an engine is found in /proc."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

from pilotfish.bench.children import READY
from pilotfish.cli.redis_server import find_program
from pilotfish.protocol.errors import EngineError

START_SECONDS: Final = 90.0  # a worker and its engine import for seconds, on a busy machine for many
END_SECONDS: Final = 30.0  # SIGTERM to exit, the longest that is allowed
PIPE_SECONDS: Final = 5.0
PAUSE_SECONDS: Final = 0.2


class Process:
    """One child, `python -m pilotfish.bench.<module>`; started again until it says it is ready.

    `said` gets every line after that. `crashes` tells of ends that nobody asked for.
    """

    def __init__(
        self,
        name: str,
        arguments: list[str],
        environment: Mapping[str, str] | None = None,
        said: Callable[[str | None], None] = lambda _: None,
    ) -> None:
        self.name, self._arguments, self._said = name, arguments, said
        self._environment = {**os.environ, **(environment or {})}
        self._process: asyncio.subprocess.Process | None = None
        self._reading: asyncio.Task[None] | None = None
        self.crashes: list[str] = []
        self.ready = asyncio.Event()

    async def start(self) -> None:
        """Until it is ready; an attempt that ends before (Redis is away) is repeated. One that hangs is a crash."""
        while not self.ready.is_set():
            try:
                async with asyncio.timeout(START_SECONDS):
                    await self._start_once()
            except TimeoutError:
                self.crashes.append("it did not start")
                await self.kill()

    async def _start_once(self) -> None:
        self._process = process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", f"pilotfish.bench.{self._arguments[0]}", *self._arguments[1:],
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=self._log(),
            env=self._environment, limit=1 << 22,
        )  # fmt: skip
        assert process.stdout
        if (await process.stdout.readline()).startswith(READY.encode()):
            self.ready.set()
            self._reading = asyncio.create_task(self._read(process))
        else:
            await process.wait()
            await asyncio.sleep(PAUSE_SECONDS)

    def _log(self) -> int | None:
        """Its standard error is ours when someone asked for it: half of what it says is that it was hurt."""
        return None if os.environ.get("CHAOS_LOG") else asyncio.subprocess.DEVNULL

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout
        try:
            while line := await process.stdout.readline():
                self._hear(line)
            code = await process.wait()
            if self.ready.is_set():  # nobody asked for it
                self.ready.clear()
                self.crashes.append(f"it ended by itself with {code}")
        finally:
            self._said(None)

    def _hear(self, line: bytes) -> None:
        try:
            self._said(line.decode())
        except (ValueError, KeyError) as error:  # whoever waits for what it said waits in vain: no reason to go deaf
            self.crashes.append(f"it said {line[:200]!r}, which means nothing ({type(error).__name__}: {error})")

    def write(self, line: str) -> None:
        """One line to its standard input."""
        assert self._process
        assert self._process.stdin
        with suppress(ConnectionError, RuntimeError):
            self._process.stdin.write(line.encode() + b"\n")

    def send(self, signum: signal.Signals) -> None:
        """A signal, if it runs."""
        if self._process and self._process.returncode is None:
            with suppress(ProcessLookupError):
                self._process.send_signal(signum)

    async def kill(self) -> None:
        """At once; nothing happens to one that never ran."""
        self.ready.clear()
        self.send(signal.SIGKILL)
        if self._process:
            await self._gone()

    async def end(self) -> int:
        """Ask it to end. Returns its exit code; -9 if it had to be killed."""
        self.ready.clear()
        self.send(signal.SIGCONT)
        self.send(signal.SIGTERM)
        try:
            async with asyncio.timeout(END_SECONDS):
                return await self._gone()
        except TimeoutError:
            await self.kill()
            return -signal.SIGKILL

    async def _gone(self) -> int:
        assert self._process
        code = await self._process.wait()
        if self._reading:
            await asyncio.wait({self._reading}, timeout=PIPE_SECONDS)
            if not self._reading.done():
                self.crashes.append("its output stayed open when it had ended: a child of it lives on")
                self._reading.cancel()
        return code

    @property
    def pid(self) -> int:
        """Of the process that runs now."""
        assert self._process
        return self._process.pid

    def children(self) -> list[int]:
        """Process ids of its children: of a worker, its engine."""
        with suppress(OSError):
            return [int(child) for child in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()]
        return []


class Server:
    """A Redis on a port that stays. It writes down what it does, so that it can come back with it or without."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="pilotfish-chaos-")
        self._process: asyncio.subprocess.Process | None = None
        self.port = 0
        self.down = False

    @property
    def url(self) -> str:
        """Straight to it."""
        return f"redis://127.0.0.1:{self.port}/0"

    async def start(self, port: int) -> None:
        """Until it answers."""
        self.port = port
        options = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "yes"]
        self._process = await asyncio.create_subprocess_exec(
            str(find_program()), *options, "--dir", self._folder.name, stdout=asyncio.subprocess.DEVNULL
        )
        await self._answering()
        self.down = False

    async def _answering(self) -> None:
        assert self._process
        async with asyncio.timeout(START_SECONDS):
            while True:
                if self._process.returncode is not None:
                    raise EngineError("the Redis of the chaos run ended at once: is its port taken?")
                with suppress(OSError):
                    reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
                    writer.write(b"PING\r\n")
                    answer = await reader.readline()
                    writer.close()
                    if answer == b"+PONG\r\n":
                        return
                await asyncio.sleep(0.02)

    def send(self, signum: signal.Signals) -> None:
        """A signal, if it runs."""
        if self._process and self._process.returncode is None:
            self._process.send_signal(signum)

    async def kill(self, *, forget: bool = False) -> None:
        """At once; with `forget`, so does all it knew."""
        self.down = True
        assert self._process
        self.send(signal.SIGKILL)
        await self._process.wait()
        if forget:
            self._folder.cleanup()
            self._folder = tempfile.TemporaryDirectory(prefix="pilotfish-chaos-")

    async def close(self) -> None:
        """For good."""
        await self.kill(forget=True)
        self._folder.cleanup()
