"""The edge's side of the broker: one XADD to publish, one blocking connection to read replies; neither waits its turn.

`ingress.py` is the worker's side of the same streams, `shell.py` that of who submits prompts. All are thin: a method
says which commands it sends, and Redis' errors become ours. Knows messages and keys; nothing of sessions or engines.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import redis.exceptions as rx
from redis.asyncio import Redis

from pilotfish.protocol import keys, metrics
from pilotfish.protocol.codec import decode, encode
from pilotfish.protocol.errors import BrokerError, BrokerRefused, BrokerUnreachable, InvalidMessage, NoWorker, WrongType
from pilotfish.protocol.messages import Message, Prompt, ToEdge, ToShell
from pilotfish.protocol.pulse import Pulse
from pilotfish.protocol.settings import redacted
from pilotfish.protocol.wire import Lane, Line, entries

log = logging.getLogger("pilotfish.broker")

CONNECT_SECONDS = 2.0
SOCKET_SECONDS = 5.0  # longer than any BLOCK, so that a silent network is noticed and a quiet stream is not

RENEW_SECONDS = 60.0  # between two renewals of what lives for an hour
READS = 8  # requests for replies that wait in Redis: as many answers may come in one round trip
PAUSE_SECONDS = 0.05  # the first pause of a lost connection; each next one is twice as long, up to PAUSE_MAX_SECONDS
PAUSE_MAX_SECONDS = 1.0
PROMPT_LEASE_MS = 3 * keys.LEASE_MS  # an agent renews it with its beat

RedisBytes = Redis


def connect(url: str) -> RedisBytes:
    """A client for `url`; nothing is sent yet. Raises BrokerUnreachable for a URL that is none."""
    with readable(url):
        client: RedisBytes = Redis.from_url(
            url, socket_connect_timeout=CONNECT_SECONDS, socket_timeout=SOCKET_SECONDS, health_check_interval=0
        )
    return client


@contextmanager
def readable(url: str) -> Iterator[None]:
    """Raise BrokerUnreachable with the fix where redis-py stumbles over a URL."""
    try:
        yield
    except ValueError as error:
        fix = "use redis://[:password@]host:port/0"
        raise BrokerUnreachable(f"{redacted(url)!r} is no Redis URL ({error}): {fix}") from None


@contextmanager
def translated(url: str = "") -> Iterator[None]:
    """Turn what redis-py raises into the error tree; the sentence says what to do."""
    at = f" at {redacted(url)}" if url else ""
    try:
        yield
    except (rx.AuthenticationError, rx.NoPermissionError) as error:
        why = str(error).rstrip(".")
        raise BrokerRefused(
            f"Redis{at} refuses this user: {why}. Check the password or ACL in REDIS_URL, and --tenant"
        ) from error
    except rx.OutOfMemoryError as error:
        raise BrokerRefused(f"Redis{at} is out of memory: raise maxmemory, the broker needs noeviction") from error
    except (rx.ConnectionError, rx.TimeoutError, OSError) as error:
        if "CERTIFICATE_VERIFY_FAILED" in str(error):
            raise BrokerUnreachable(
                f"the certificate of Redis{at} does not hold: certificate verify failed ({error}). "
                f"Use the name it was made for, and name a private CA's file with --tls-ca"
            ) from error
        raise BrokerUnreachable(
            f"no Redis answers{at} ({error}): start one, `pilotfish up` runs a private one, or set REDIS_URL"
        ) from error
    except rx.RedisError as error:
        raise BrokerError(f"Redis{at} answered: {error}") from error


async def ping(redis: RedisBytes, url: str) -> None:
    """Raise BrokerUnreachable or BrokerRefused with the fix, or return."""
    with translated(url):
        await redis.ping()


class Taken(NamedTuple):
    """A prompt as an agent took it; `deliveries` counts this one."""

    entry_id: bytes
    prompt: Prompt | InvalidMessage
    deliveries: int = 1


class EdgeBroker:
    """What one agent says to Redis. `agent` names the device, `boot` this run of it; `padded` hides jobs' sizes."""

    def __init__(self, redis: RedisBytes, tenant: str, agent: str, boot: str, *, padded: bool = False) -> None:
        self.redis, self.tenant, self.agent, self.boot, self.padded = redis, tenant, agent, boot, padded
        self._jobs, self._replies = Lane(redis, SOCKET_SECONDS), Line(redis, SOCKET_SECONDS)
        self.pulse = Pulse(redis, SOCKET_SECONDS)
        self._renew_at = 0.0  # when what lives for an hour is renewed next

    @property
    def patience(self) -> float:
        """Seconds after which a job that Redis has not confirmed is no longer merely on its way."""
        return self.pulse.patience(connected=self._jobs.ready)

    async def publish(self, target: str, worker: str, message: Message) -> bytes:
        """XADD NOMKSTREAM to the worker that served last, else to `any`. Returns the entry's id.

        Raises NoWorker when no worker of the target has opened its streams (or Redis lost them).
        """
        entry = (keys.FIELD_AGENT, self.agent, keys.FIELD_MESSAGE, encode(message, padded=self.padded))
        for name in dict.fromkeys((worker or keys.ANY, keys.ANY)):
            with translated():
                added = await self._jobs.call("XADD", keys.jobs(target, self.tenant, name), "NOMKSTREAM", "*", *entry)
            if added is not None:
                return bytes(added)
        raise NoWorker(f"no worker serves target {target}: start one with `pilotfish worker`")

    async def replies(self) -> AsyncGenerator[ToEdge | InvalidMessage, None]:
        """Everything said to this agent from its boot on, for ever; survives a Redis that restarts.

        READS requests wait in Redis, one behind the other on one connection: an answer that comes while the last one is
        on its way to a far edge need not wait until the edge has asked again. A group keeps the place between them.
        Yields an InvalidMessage (not raised) for an entry that cannot be read. Waits out lost connections.
        """
        stream, pause, asked = keys.replies(self.tenant, self.agent), PAUSE_SECONDS, 0
        read = ("XREADGROUP", "GROUP", self.boot, self.agent, "COUNT", 64, "BLOCK", keys.BLOCK_MS, "NOACK")
        while True:
            try:
                while asked < READS:
                    await self._replies.send(*read, "STREAMS", stream, ">")
                    asked += 1
                asked -= 1
                got = entries(await self._replies.receive())
            except rx.ResponseError as error:  # the stream is new, or ran out of its life: so is the group
                if "NOGROUP" not in str(error) and "UNBLOCKED" not in str(error):
                    raise
                await self._open_replies(stream)
                continue
            except (rx.RedisError, OSError) as error:
                asked = 0
                if pause == PAUSE_SECONDS:
                    log.warning("no replies for now, Redis is away: %s", error)
                await asyncio.sleep(pause)
                pause = min(PAUSE_MAX_SECONDS, pause * 2)
                continue
            pause = PAUSE_SECONDS
            for _, found in got:
                for _, fields in found:
                    yield read_entry(fields, ToEdge)
            await asyncio.sleep(0)  # those who waited go on first, then the next read is sent

    async def _open_replies(self, stream: str) -> None:
        """Create the reply stream and this boot's group; what was said before it existed is read too."""
        with suppress(BrokerError):
            await ensure_group(self.redis, stream, self.boot, keys.REPLY_TTL_MS)

    async def beat(self, fields: dict[str, str], *, taking: bool = True) -> None:
        """Say that this agent lives and, if so, takes prompts; renews the life of what it owns. Two round trips.

        What the first one took is told with the fields, as `rtt_ms`. What lives for an hour is renewed once a minute:
        many agents at rest are a load for Redis.
        """
        name, agents = keys.agent_beat(self.tenant, self.agent), keys.agents(self.tenant)
        with translated():
            asked = time.perf_counter()
            now_ms = await clock_ms(self.redis)
            seconds = time.perf_counter() - asked
            metrics.RTT_SECONDS.set(seconds)
            pipe = self.redis.pipeline(transaction=False)
            if taking:
                pipe.zadd(agents, {self.agent: now_ms})
            else:
                pipe.zrem(agents, self.agent)
            pipe.hset(name, mapping={**fields, "rtt_ms": f"{1000 * seconds:.2f}"})
            pipe.pexpire(name, keys.BEAT_TTL_MS)
            if renews := time.monotonic() >= self._renew_at:
                pipe.pexpire(keys.prompts(self.tenant), keys.JOBS_TTL_MS)
                pipe.zremrangebyscore(agents, 0, now_ms - keys.JOBS_TTL_MS)  # those that died without a word
                pipe.pexpire(agents, keys.JOBS_TTL_MS)
            changed, *_ = await pipe.execute()
            if renews:
                self._renew_at = time.monotonic() + RENEW_SECONDS
            elif changed:
                self._renew_at = 0.0  # Redis had forgotten us, and perhaps the life of the key

    async def leave(self) -> None:
        """This agent takes no more prompts. What it owned ends at once, by PEXPIRE: no edge needs the right to DEL."""
        await self.pulse.end()
        with translated():
            pipe = self.redis.pipeline(transaction=False)
            pipe.pexpire(keys.agent_beat(self.tenant, self.agent), 0)
            pipe.pexpire(keys.replies(self.tenant, self.agent), 0)
            pipe.zrem(keys.agents(self.tenant), self.agent)
            await pipe.execute()

    async def live_workers(self, target: str) -> int:
        """How many workers of the target have beaten lately."""
        with translated():
            return len(await live(self.redis, keys.workers(target)))

    # --- submitted prompts -----------------------------------------------------------------------------------

    async def open_prompts(self) -> None:
        """Create the tenant's prompt stream and its group, once."""
        await ensure_group(self.redis, keys.prompts(self.tenant), keys.GROUP_AGENTS)

    async def take_prompts(self, count: int) -> list[Taken]:
        """Prompts of agents that stopped renewing theirs, else those nobody has. Waits up to BLOCK_MS."""
        stream, group, me = keys.prompts(self.tenant), keys.GROUP_AGENTS, self.agent
        with translated():
            _, old, *_ = await self.redis.xautoclaim(stream, group, me, PROMPT_LEASE_MS, count=count)
            if taken := [entry for entry in old if entry[1] is not None]:  # Redis 6.2 names deleted entries too
                return [
                    Taken(entry_id, read_entry(fields, Prompt), await deliveries(self.redis, stream, group, entry_id))
                    for entry_id, fields in taken
                ]
            got = await self.redis.xreadgroup(group, me, {stream: ">"}, count=count, block=keys.BLOCK_MS)
        return [Taken(entry_id, read_entry(fields, Prompt)) for entry_id, fields in (got[0][1] if got else ())]

    async def keep_prompts(self, taken: list[bytes]) -> list[bytes]:
        """Renew the lease of prompts being worked on. Returns those that are no longer ours.

        XCLAIM alone would steal a prompt back from the agent that took it over while we slept.
        """
        if not taken:
            return []
        stream, group, me = keys.prompts(self.tenant), keys.GROUP_AGENTS, self.agent
        with translated():
            pending = await self.redis.xpending_range(stream, group, "-", "+", 1000, me)
            ours = {entry["message_id"] for entry in pending}.intersection(taken)
            if ours:
                await self.redis.xclaim(stream, group, me, 0, sorted(ours), justid=True)
        return [entry_id for entry_id in taken if entry_id not in ours]

    async def drop_prompt(self, entry_id: bytes) -> None:
        """The prompt is answered: it leaves the stream."""
        stream = keys.prompts(self.tenant)
        with translated():
            async with self.redis.pipeline(transaction=True) as pipe:
                pipe.xack(stream, keys.GROUP_AGENTS, entry_id)
                pipe.xdel(stream, entry_id)
                await pipe.execute()

    async def withdrawn(self, request: str) -> bool:
        """True if the request's last word is already written: it was cancelled before anyone took it."""
        with translated():
            newest = await self.redis.xrevrange(keys.output(self.tenant, request), count=1)
        last = read_entry(newest[0][1], ToShell) if newest else None
        return getattr(last, "type", "") in ("finished", "failed")

    async def say(self, request: str, message: Message) -> None:
        """Append to a submitted prompt's output."""
        await append_output(self.redis, keys.output(self.tenant, request), message)


async def append_output(redis: RedisBytes, output: str, message: Message) -> None:
    """One more message about a submitted prompt; renews the life of its output."""
    with translated():
        async with redis.pipeline(transaction=True) as pipe:
            pipe.xadd(output, {keys.FIELD_MESSAGE: encode(message)})
            pipe.pexpire(output, keys.OUT_TTL_MS)
            await pipe.execute()


async def clock_ms(redis: RedisBytes) -> int:
    """Redis' own clock."""
    seconds, micros = await redis.time()
    return int(seconds) * 1000 + int(micros) // 1000


async def deliveries(redis: RedisBytes, stream: str, group: str, entry_id: bytes) -> int:
    """How often an entry was delivered."""
    pending = await redis.xpending_range(stream, group, entry_id, entry_id, 1)
    return int(pending[0]["times_delivered"]) if pending else 1


async def live(redis: RedisBytes, zset: str) -> list[str]:
    """Members of a beat zset that are not stale, on Redis' own clock."""
    oldest = await clock_ms(redis) - keys.BEAT_TTL_MS
    return [name.decode() for name in await redis.zrangebyscore(zset, oldest, "+inf")]


async def ensure_group(redis: RedisBytes, stream: str, group: str, ttl_ms: int = keys.JOBS_TTL_MS) -> bool:
    """Create stream and consumer group, reading from its beginning; renew the stream's life. True if it was not there.

    Idempotent. Raises WrongType where another kind of key stands in the stream's place.
    """
    with translated():
        async with redis.pipeline(transaction=True) as pipe:  # whoever dies between the two leaves no stream for ever
            pipe.xgroup_create(stream, group, id="0", mkstream=True)
            pipe.pexpire(stream, ttl_ms)
            created, _ = await pipe.execute(raise_on_error=False)
        if not isinstance(created, rx.ResponseError):
            return True
        if "WRONGTYPE" in str(created):
            raise WrongType(f"{stream} is no stream: whoever may write it has put something else there") from created
        if "BUSYGROUP" not in str(created):
            raise created
        return False


def read_entry(fields: dict[bytes, bytes], kind: Any) -> Any:
    """A stream entry's message of `kind`, or the InvalidMessage that says why it is none."""
    try:
        return decode(fields.get(keys.FIELD_MESSAGE.encode(), b""), kind)
    except InvalidMessage as error:
        return error
