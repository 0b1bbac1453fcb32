"""A proxy before Redis that loses, doubles, delays and reorders what edges and workers say to each other.

    python -m pilotfish.bench.chaos_proxy --to HOST:PORT --listen PORT --seed N --share 0.05

It reads the commands that pass and meddles with two: the XADD of a job and the script that answers one. Of each, a
`share` is lost, as large a share comes twice, and as large a share late, behind what was said after it; the sender is
told that all is well, and standard output which fate it was. Everything else passes as it is. To part the two sides,
stop or kill this process.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from pilotfish.bench.children import say_ready
from pilotfish.protocol import keys

HOST: Final = "127.0.0.1"
CHUNK_BYTES: Final = 1 << 16
LATE_SECONDS: Final = (0.01, 1.5)
REPLIES: Final = keys.replies("", "").rstrip(":").encode()
NOTHING: Final = b"$-1\r\n"
FATES: Final = ("lost", "twice", "late")  # of jobs and answers


def read_command(data: bytearray) -> tuple[list[bytes], int] | None:
    """The first command of a RESP stream and where it ends; None if there is more to come."""
    head = data.find(b"\r\n")
    if head < 0:
        return None
    words, at = list[bytes](), head + 2
    for _ in range(int(data[1:head])):
        line = data.find(b"\r\n", at)
        if line < 0:
            return None
        end = line + 2 + int(data[at + 1 : line])
        if len(data) < end + 2:
            return None
        words.append(bytes(data[line + 2 : end]))
        at = end + 2
    return words, at


def pretended_answer(words: list[bytes]) -> bytes:
    """What Redis would have answered to a job or to an answer; b"" for a command that is none of them."""
    name = words[0].upper()
    if name == b"XADD" and b":jobs:" in words[1]:
        entry = b"%d-0" % (time.time_ns() // 1_000_000)
        return b"$%d\r\n%s\r\n" % (len(entry), entry)
    if name in (b"EVAL", b"EVALSHA") and len(words) > 4 and words[4].startswith(REPLIES):
        return NOTHING
    return b""


class ChaosProxy:
    """See the module docstring. `told` hears of each command that did not pass as it was.

    Of several jobs under way on one connection the answers may change places: an edge looks at none of them, but for
    one that says there is no stream.
    """

    def __init__(self, host: str, port: int, *, seed: int, share: float, told: Callable[[str], None]) -> None:
        self.host, self.port, self.share, self.told = host, port, share, told
        self._coin = random.Random(f"proxy {seed}")
        self._late: set[asyncio.Task[None]] = set()

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One client, until either side ends."""
        try:
            there_reader, there = await asyncio.open_connection(self.host, self.port)
        except OSError:
            writer.close()
            return
        both = {
            asyncio.create_task(self._forward(reader, there, writer)),
            asyncio.create_task(_copy(there_reader, writer)),
        }
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        for task in both:
            task.cancel()
        await asyncio.gather(*both, return_exceptions=True)
        writer.close()
        there.close()

    async def _forward(
        self, reader: asyncio.StreamReader, there: asyncio.StreamWriter, back: asyncio.StreamWriter
    ) -> None:
        data = bytearray()
        while chunk := await reader.read(CHUNK_BYTES):
            data += chunk
            while command := read_command(data):
                words, end = command
                raw = bytes(data[:end])
                del data[:end]
                pretended = pretended_answer(words)
                if not pretended or not self._meddle(raw):
                    there.write(raw)
                else:
                    back.write(pretended)
            await there.drain()

    def _meddle(self, raw: bytes) -> bool:
        """True if the command must not pass now."""
        drawn = self._coin.random()
        fate = next((name for at, name in enumerate(FATES, 1) if drawn < at * self.share), "")
        if not fate:
            return False
        self.told(fate)
        if fate != "lost":
            task = asyncio.create_task(self._send_later(raw))
            self._late.add(task)
            task.add_done_callback(self._late.discard)
        return fate != "twice"

    async def _send_later(self, raw: bytes) -> None:
        await asyncio.sleep(self._coin.uniform(*LATE_SECONDS))
        with suppress(OSError):
            reader, writer = await asyncio.open_connection(self.host, self.port)
            writer.write(raw)
            await reader.read(CHUNK_BYTES)
            writer.close()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while chunk := await reader.read(CHUNK_BYTES):
        writer.write(chunk)
        await writer.drain()


async def _serve(host: str, port: int, listen: int, seed: int, share: float) -> None:
    proxy = ChaosProxy(host, port, seed=seed, share=share, told=lambda fate: print(fate, flush=True))
    server = await asyncio.start_server(proxy.accept, HOST, listen)
    say_ready(server.sockets[0].getsockname()[1])
    await asyncio.Event().wait()


def main() -> None:
    """Serve until killed; prints "ready PORT"."""
    parser = argparse.ArgumentParser(prog="python -m pilotfish.bench.chaos_proxy", description="TCP, unreliable.")
    parser.add_argument("--to", required=True, metavar="HOST:PORT")
    parser.add_argument("--listen", type=int, default=0, metavar="PORT")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--share", type=float, default=0.05, help="lost, as many twice, as many late")
    chosen = parser.parse_args()
    host, _, port = chosen.to.rpartition(":")
    asyncio.run(_serve(host or HOST, int(port), chosen.listen, chosen.seed, chosen.share))


if __name__ == "__main__":
    main()
