"""A TCP proxy that delays: each direction by half the round-trip time, in order, at any bandwidth.

    python -m pilotfish.bench.delay_proxy --to 127.0.0.1:6379 --rtt-ms 40 [--listen 7000]

Stands between an edge and Redis for what a WAN does to latency, and counts the bytes. It knows nothing of Redis; it
loses nothing.
"""

from __future__ import annotations

import argparse
import asyncio
from contextlib import suppress
from typing import Self
from urllib.parse import urlsplit, urlunsplit

from pilotfish.bench.children import say_ready

CHUNK_BYTES = 1 << 16
ACCEPTING = 5  # passes of the loop from accept() to the first step of the connection's task
HOST = "127.0.0.1"

Chunks = asyncio.Queue[tuple[float, bytes]]  # (when it is due on the loop's clock, bytes; b"" is the end)


class DelayProxy:
    """`async with DelayProxy(host, port, rtt_ms=40) as proxy:` then connect to `proxy.port`. `rtt_ms` may change."""

    def __init__(self, host: str, port: int, *, rtt_ms: float, listen: int = 0) -> None:
        self.host, self.to_port, self.rtt_ms = host, port, rtt_ms
        self.port = listen
        self.bytes_up = self.bytes_down = 0  # carried so far, to the server and from it
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    @classmethod
    def before(cls, url: str, *, rtt_ms: float) -> Self:
        """In front of a Redis, by its URL."""
        parts = urlsplit(url)
        return cls(parts.hostname or HOST, parts.port or 6379, rtt_ms=rtt_ms)

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, HOST, self.port)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *error: object) -> None:
        assert self._server
        self._server.close()
        for _ in range(ACCEPTING):
            await asyncio.sleep(0)  # a connection just accepted has no task yet that could be cancelled
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)
        await asyncio.sleep(0)  # what was aborted is closed
        await self._server.wait_closed()

    def through(self, url: str) -> str:
        """The same URL, by way of this proxy."""
        parts = urlsplit(url)
        user = parts.netloc.rpartition("@")[0]
        return urlunsplit(parts._replace(netloc=f"{user}@{HOST}:{self.port}" if user else f"{HOST}:{self.port}"))

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        self._connections.add(task)
        writers = [writer]
        try:
            there_reader, there_writer = await asyncio.open_connection(self.host, self.to_port)
            writers.append(there_writer)
            async with asyncio.TaskGroup() as both:
                both.create_task(self._carry(reader, there_writer, up=True))
                both.create_task(self._carry(there_reader, writer, up=False))
        except* asyncio.CancelledError:
            for one in writers:
                one.transport.abort()  # a peer that was killed or stopped would never take what is left
        except* OSError:
            pass
        finally:
            self._connections.discard(task)
            for one in writers:
                one.close()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, up: bool) -> None:
        """One direction: what arrives now leaves half a round trip later, the end of the stream too."""
        waiting: Chunks = asyncio.Queue()
        async with asyncio.TaskGroup() as both:
            both.create_task(self._receive(reader, waiting, up=up))
            both.create_task(_send_when_due(waiting, writer))

    async def _receive(self, reader: asyncio.StreamReader, waiting: Chunks, *, up: bool) -> None:
        loop, data = asyncio.get_running_loop(), b"-"
        while data:
            try:
                data = await reader.read(CHUNK_BYTES)
            except ConnectionError:
                data = b""
            self.bytes_up += len(data) * up
            self.bytes_down += len(data) * (not up)
            waiting.put_nowait((loop.time() + self.rtt_ms / 2000, data))


async def _send_when_due(waiting: Chunks, writer: asyncio.StreamWriter) -> None:
    """One after the other, so nothing overtakes; what is due already leaves at once."""
    loop = asyncio.get_running_loop()
    while not writer.is_closing():
        due, data = await waiting.get()
        await asyncio.sleep(due - loop.time())
        if not data:
            with suppress(OSError):
                writer.write_eof()  # the other direction may still have something to say
            return
        writer.write(data)


async def _serve(host: str, port: int, rtt_ms: float, listen: int) -> None:
    async with DelayProxy(host, port, rtt_ms=rtt_ms, listen=listen) as proxy:
        say_ready(proxy.port)
        await asyncio.Event().wait()


def main(argv: list[str] | None = None) -> None:
    """Serve until interrupted; prints "ready PORT"."""
    parser = argparse.ArgumentParser(prog="python -m pilotfish.bench.delay_proxy", description="TCP, delayed.")
    parser.add_argument("--to", required=True, metavar="HOST:PORT")
    parser.add_argument("--rtt-ms", type=float, default=40.0)
    parser.add_argument("--listen", type=int, default=0, metavar="PORT")
    chosen = parser.parse_args(argv)
    host, _, port = chosen.to.rpartition(":")
    with suppress(KeyboardInterrupt):
        asyncio.run(_serve(host or HOST, int(port), chosen.rtt_ms, chosen.listen))


if __name__ == "__main__":
    main()
