"""The edges of `bench load`, hundreds in one process: raw commands, messages of real form, a connection each.

An edge sends a session's round, waits for its answer, thinks for as long as drafting would take, and sends the next;
a refused one pauses first. A flood sends at its own rate, whatever comes back. A job carries its whole prefix and a
right draft, so that it can be sent again with another number, at no cost. Knows nothing of what is measured.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any
from urllib.parse import unquote, urlsplit

import hiredis
import msgpack

from pilotfish.cloud_worker.engines.fake import FakeVerifier, fake_target
from pilotfish.protocol import fleet, keys
from pilotfish.protocol.codec import encode
from pilotfish.protocol.history import History
from pilotfish.protocol.messages import Sampling, VerifyJob

TARGET = fleet.target_id(FakeVerifier().info.fingerprint)
PROMPT_TOKENS, K = 32, 8
ROWS = PROMPT_TOKENS + K + 1  # of a job, as a quota counts them
PAUSE_SECONDS = 0.25  # of an edge that was refused; the product's begin with 0.1 s (`edge_agent/retry.py`) and grow
TICK_SECONDS = 0.01


class Raw(asyncio.Protocol):
    """One connection to Redis: commands out, each answer to `heard`, in their order."""

    def __init__(self, heard: Callable[[Any], None]) -> None:
        self.heard, self._reader = heard, hiredis.Reader()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """It is open."""
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        """Parse what has come."""
        self._reader.feed(data)
        while (answer := self._reader.gets()) is not False:
            self.heard(answer)

    def send(self, *parts: Any) -> None:
        """One command."""
        self.transport.write(hiredis.pack_command(parts))


async def connected(url: str, heard: Callable[[Any], None]) -> Raw:
    """A connection that has said its password; the answer to that is dropped."""
    parts, loop = urlsplit(url), asyncio.get_running_loop()
    said: asyncio.Future[Any] = loop.create_future()
    _, raw = await loop.create_connection(
        lambda: Raw(said.set_result), parts.hostname or "127.0.0.1", parts.port or 6379
    )
    raw.send("AUTH", *filter(None, (unquote(parts.username or ""), unquote(parts.password or ""))))
    await said
    raw.heard = heard
    return raw


@dataclass(slots=True)
class Seen:
    """What became of the jobs of one tenant, sent since `begin`."""

    latency: list[float] = field(default_factory=list)  # seconds, of those that were verified
    overhead: list[float] = field(default_factory=list)  # the same without the engine's own time
    codes: Counter[str] = field(default_factory=Counter)
    sent: int = 0


class Edge:
    """One device of a tenant with one session."""

    def __init__(self, tenant: Tenant, number: int) -> None:
        self.tenant, self.name = tenant, f"{tenant.name}-{number}"
        self._random, self._body = random.Random(self.name), _body(self.name, number)
        self._stream, self._cursor = keys.replies(tenant.name, self.name), b"0"
        self._sent: dict[int, tuple[float, Seen]] = {}

    async def open(self, url: str) -> None:
        """Read replies from here on."""
        self._raw = await connected(url, self._heard)
        self._listen()

    def _listen(self) -> None:
        self._raw.send("XREAD", "COUNT", 64, "BLOCK", 0, "STREAMS", self._stream, self._cursor)

    def send(self, **changes: Any) -> None:
        """The next round, to any worker."""
        self._body |= {"round": self._body["round"] + 1, **changes}
        self._sent[self._body["round"]] = perf_counter(), self.tenant.seen
        self.tenant.seen.sent += 1
        payload = msgpack.packb(self._body)
        self.tenant.out.send("XADD", self.tenant.jobs, "NOMKSTREAM", "*", "a", self.name, "m", payload)

    def _heard(self, answer: Any) -> None:
        for _, entries in answer or ():
            for entry_id, fields in entries:
                self._cursor = entry_id
                self._told(msgpack.unpackb(fields[1]))
        self._listen()

    def _told(self, message: dict[str, Any]) -> None:
        sent = self._sent.pop(message["round"], None)
        if sent is None:
            return
        seconds, seen = perf_counter() - sent[0], sent[1]
        code = message.get("code", "verdict")
        self.tenant.answered[code] += 1
        seen.codes[code] += 1
        if code == "verdict":
            seen.latency.append(seconds)
            seen.overhead.append(seconds - message["engine_ms"] / 1000)
        if self.tenant.think is not None:
            pause = self.tenant.think if code == "verdict" else max(PAUSE_SECONDS, self.tenant.think)
            asyncio.get_running_loop().call_later(pause * self._random.uniform(0.5, 1.5), self._goes_on)

    def _goes_on(self) -> None:
        if self.tenant.running:
            self.send()

    def close(self) -> None:
        """Hang up."""
        self._raw.transport.close()


class Tenant:
    """Some edges of one tenant. With `think` seconds each goes round by round; without, `flood` says how many come."""

    def __init__(self, name: str, edges: int, think: float | None = None) -> None:
        self.name, self.think, self.jobs = name, think, keys.jobs(TARGET, name)
        self.edges = [Edge(self, number) for number in range(edges)]
        self.seen, self.running = Seen(), False
        self.answered: Counter[str] = Counter()  # by code, since it was opened

    async def open(self, url: str) -> None:
        """Connect every edge."""
        self.out = await connected(url, lambda _: None)
        for edge in self.edges:
            await edge.open(url)

    def begin(self) -> None:
        """Count from here on; edges that think begin at times of their own."""
        self.seen = Seen()
        if self.think is not None and not self.running:
            self.running = True
            for edge in self.edges:
                asyncio.get_running_loop().call_later(edge._random.uniform(0, self.think), edge.send)

    def stop(self) -> None:
        """Send nothing more."""
        self.running = False

    async def flood(self, per_second: float, seconds: float, **changes: Any) -> None:
        """So many jobs a second, spread over the edges, whatever becomes of them."""
        loop, sent = asyncio.get_running_loop(), 0
        start = loop.time()
        while (gone := loop.time() - start) < seconds:
            while sent < gone * per_second:
                self.edges[sent % len(self.edges)].send(**changes)
                sent += 1
            await asyncio.sleep(TICK_SECONDS)

    @property
    def owed(self) -> int:
        """Jobs without an answer."""
        return sum(len(edge._sent) for edge in self.edges)

    def close(self) -> None:
        """Hang up."""
        self.stop()
        self.out.transport.close()
        for edge in self.edges:
            edge.close()


def _body(agent: str, number: int) -> dict[str, Any]:
    """A job of this device as it is before msgpack: a prompt of its own, a draft that the target draws too."""
    rng = random.Random(number)
    ids = [rng.randrange(256) for _ in range(PROMPT_TOKENS)]
    text = list(ids)
    for _ in range(K):
        text.append(fake_target(text, len(text), Sampling()))
    job = VerifyJob(
        agent=agent, boot="boot", session=f"{rng.getrandbits(128):032x}", epoch=0, round=0, base=len(ids), offset=0,
        digest=History(TARGET, Sampling(), ids).digest(len(ids)), ids=tuple(ids), draft=tuple(text[len(ids) :]),
    )  # fmt: skip
    body: dict[str, Any] = msgpack.unpackb(encode(job))
    return body
