"""Looking at the queue without changing it: streams, workers, agents, dead letters, and what an entry says.

Lengths and ages come from Redis as they are; nothing is consumed, claimed or created.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass
from typing import Any

import redis.exceptions as rx

from pilotfish.protocol import keys
from pilotfish.protocol.broker import RedisBytes, live, read_entry, translated
from pilotfish.protocol.codec import unpack
from pilotfish.protocol.errors import InvalidMessage, UsageError
from pilotfish.protocol.messages import Prompt

MESSAGE = keys.FIELD_MESSAGE.encode()
AGENT = keys.FIELD_AGENT.encode()


@dataclass(frozen=True, slots=True)
class Stream:
    """One stream of jobs or prompts: `pending` of its entries are in somebody's hands."""

    key: str
    kind: str
    length: int
    pending: int
    oldest_ms: int | None


@dataclass(frozen=True, slots=True)
class Peer:
    """A worker or an agent: its beat, as it wrote it; `alive` False once the beat is old."""

    name: str
    alive: bool
    beat: dict[str, str]


@dataclass(frozen=True, slots=True)
class Served:
    """A target and who serves it."""

    id: str
    name: str
    workers: list[Peer]


@dataclass(frozen=True, slots=True)
class Queue:
    """All there is to see."""

    targets: list[Served]
    agents: list[Peer]
    streams: list[Stream]

    def as_json(self) -> dict[str, Any]:
        """Plain maps and lists."""
        return asdict(self)


async def look(redis: RedisBytes, tenant: str) -> Queue:
    """Everything of all tenants' jobs; prompts and agents are this tenant's."""
    with translated():
        listed = sorted((await text_hash(redis, keys.TARGETS)).items())
        targets = [await _target(redis, target, text) for target, text in listed]
        names = [name.decode() for name in await redis.zrange(keys.agents(tenant), 0, -1)]
        alive = await live(redis, keys.agents(tenant))
        agents = [await _peer(redis, name, keys.agent_beat(tenant, name), name in alive) for name in names]
        streams = [s async for s in _streams(redis, tenant, targets)]
    return Queue([t for t in targets if t.workers], agents, streams)


async def who_serves(redis: RedisBytes, target: str, name: str) -> Queue:
    """What an edge's own user may see of the same (`acl.py`): which workers are alive."""
    with translated():
        workers = [Peer(worker, True, {"state": "alive"}) for worker in await live(redis, keys.workers(target))]
    return Queue([Served(target, name, workers)], [], [])


async def _target(redis: RedisBytes, target: str, text: str) -> Served:
    names = [name.decode() for name in await redis.zrange(keys.workers(target), 0, -1)]
    alive = await live(redis, keys.workers(target))
    workers = [await _peer(redis, name, keys.beat(target, name), name in alive) for name in names]
    return Served(target, text.split()[0], workers)


async def _peer(redis: RedisBytes, name: str, key: str, alive: bool) -> Peer:
    return Peer(name, alive, await text_hash(redis, key))


async def text_hash(redis: RedisBytes, key: str) -> dict[str, str]:
    """A hash that people may read; empty if there is none."""
    found: dict[bytes, bytes] = await redis.hgetall(key)  # type: ignore[misc]  # typed as sync or async
    return {field.decode(): value.decode() for field, value in found.items()}


async def _streams(redis: RedisBytes, tenant: str, targets: list[Served]) -> AsyncIterator[Stream]:
    """Streams that exist, prompts first, then each target's, then its dead letters."""
    known: set[bytes] = await redis.smembers(keys.TENANTS)  # type: ignore[misc]  # typed as sync or async
    tenants = sorted(name.decode() for name in known) or [keys.DEFAULT_TENANT]
    candidates = [(keys.prompts(tenant), "prompts", keys.GROUP_AGENTS)]
    for target in targets:
        names = [keys.ANY, *(worker.name for worker in target.workers)]
        streams = [keys.jobs(target.id, one, name) for one in tenants for name in names]
        candidates += [(stream, "jobs", keys.GROUP_WORKERS) for stream in streams]
        candidates.append((keys.dead_letters(target.id), "dead letters", ""))
    for key, kind, group in candidates:
        if await redis.exists(key):
            yield await _stream(redis, key, kind, group)


async def _stream(redis: RedisBytes, key: str, kind: str, group: str) -> Stream:
    pending = 0
    if group:
        try:
            pending = (await redis.xpending(key, group))["pending"]
        except rx.ResponseError as error:
            if "NOGROUP" not in str(error):
                raise
    oldest = await redis.xrange(key, count=1)
    age = await _now_ms(redis) - _sent_ms(oldest[0][0]) if oldest else None
    return Stream(key, kind, await redis.xlen(key), pending, age)


async def _now_ms(redis: RedisBytes) -> int:
    seconds, micros = await redis.time()
    return int(seconds) * 1000 + int(micros) // 1000


def _sent_ms(entry_id: bytes) -> int:
    return int(entry_id.partition(b"-")[0])


# --- what lies in a stream -----------------------------------------------------------------------------------


async def peek(redis: RedisBytes, key: str, count: int) -> list[dict[str, Any]]:
    """The oldest entries of a stream, decoded; one that cannot be read says why. Raises UsageError for no stream."""
    with translated():
        if (kind := await redis.type(key)) != b"stream":
            what = "does not exist" if kind == b"none" else f"is a {kind.decode()}"
            raise UsageError(f"{key} {what}: `pilotfish queue ls` names the streams there are")
        now = await _now_ms(redis)
        entries = await redis.xrange(key, count=count)
    return [_entry(key, now, *entry) for entry in entries]


def _entry(key: str, now: int, entry_id: bytes, fields: dict[bytes, bytes]) -> dict[str, Any]:
    about: dict[str, Any] = {"stream": key, "id": entry_id.decode(), "age_ms": now - _sent_ms(entry_id)}
    if AGENT in fields:
        about["agent"] = fields[AGENT].decode(errors="replace")
    try:
        about["message"] = _readable(unpack(fields.get(MESSAGE, b"")))
    except InvalidMessage as error:
        about["unreadable"] = str(error)
    others = {name.decode(errors="replace"): value for name, value in fields.items() if name not in (MESSAGE, AGENT)}
    about.update(_readable(others))
    return about


def _readable(value: Any) -> Any:
    """Bytes as text if they are some, else as hex; maps and lists likewise."""
    if isinstance(value, dict):
        return {str(key): _readable(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_readable(one) for one in value]
    if isinstance(value, bytes):
        return value.decode() if value.isascii() and value.decode().isprintable() else value.hex()
    return value


async def prompts(redis: RedisBytes, tenant: str) -> list[Prompt | InvalidMessage]:
    """The prompts nobody has finished."""
    with translated():
        return [read_entry(fields, Prompt) for _, fields in await redis.xrange(keys.prompts(tenant))]
