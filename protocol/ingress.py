"""The worker's side of the broker: pick up, hold by lease, reply and acknowledge in one transaction.

A job is leased to the worker that picked it up; the sweep renews the leases, takes over those that ran out, reads what
lies undelivered in dead peers' own streams, and puts jobs delivered too often among the dead letters. Knows streams
and leases; nothing of what a job means. `broker.py` is the other side.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

import redis.exceptions as rx

from pilotfish.protocol import keys
from pilotfish.protocol.broker import RedisBytes, ensure_group
from pilotfish.protocol.codec import encode
from pilotfish.protocol.messages import Message

#: renew_leases(KEYS: streams; ARGV: group, consumer, then (stream index, entry id)...) -> ids still ours.
#: XCLAIM alone would steal a job back from the peer that took it over.
RENEW_LEASES: Final = """
local kept = {}
for i = 3, #ARGV, 2 do
  local stream = KEYS[tonumber(ARGV[i])]
  local held = redis.call('XPENDING', stream, ARGV[1], ARGV[i + 1], ARGV[i + 1], 1, ARGV[2])
  if #held == 1 then
    redis.call('XCLAIM', stream, ARGV[1], ARGV[2], 0, ARGV[i + 1], 'JUSTID')
    kept[#kept + 1] = ARGV[i + 1]
  end
end
return kept
"""

#: bury(KEYS: workers zset, the dead worker's streams...; ARGV: worker) -> 1 when nothing was left and it is forgotten.
BURY: Final = """
for i = 2, #KEYS do
  if redis.call('XLEN', KEYS[i]) > 0 then return 0 end
end
for i = 2, #KEYS do redis.call('DEL', KEYS[i]) end
redis.call('ZREM', KEYS[1], ARGV[1])
return 1
"""


@dataclass(frozen=True, slots=True)
class Delivery:
    """One job as it was picked up; `deliveries` counts this one."""

    stream: str
    entry_id: str
    tenant: str
    agent: str
    payload: bytes
    deliveries: int = 1

    @property
    def sent_ms(self) -> int:
        """When it was published, on Redis' clock."""
        return int(self.entry_id.partition("-")[0])


class Ingress:
    """The job streams of one target as one worker sees them."""

    def __init__(self, redis: RedisBytes, target: str, worker: str) -> None:
        self.redis, self.target, self.worker = redis, target, worker
        self.tenants: list[str] = []
        self.held: dict[tuple[str, str], Delivery] = {}  # by (stream, entry id)
        self._dead: list[str] = []
        self._peers: list[str] = []
        self._clock = (0, 0.0)  # Redis ms, our monotonic seconds at the same moment
        self._renew = redis.register_script(RENEW_LEASES)
        self._bury = redis.register_script(BURY)

    # --- life ------------------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Create our streams and groups; called at start, for a new tenant, and after Redis lost them."""
        await self._read_clock_and_tenants()
        for stream in self._streams([self.worker, keys.ANY]):
            await ensure_group(self.redis, stream, keys.GROUP_WORKERS)

    async def beat(self, fields: dict[str, str]) -> bool:
        """Say that we live, renew what we own, and learn about peers and tenants. Two round trips.

        False when the target's pair key is gone (Redis restarted empty): announce the target again.
        """
        before = set(self.tenants)
        await self._read_clock_and_tenants()
        if set(self.tenants) - before:
            await self.open()
        pipe = self.redis.pipeline(transaction=False)
        name, workers = keys.beat(self.target, self.worker), keys.workers(self.target)
        pipe.hset(name, mapping=dict(fields))
        pipe.pexpire(name, keys.BEAT_TTL_MS)
        pipe.zadd(workers, {self.worker: self.now_ms()})
        pipe.pexpire(workers, keys.JOBS_TTL_MS)
        for stream in self._streams([self.worker, keys.ANY]):
            pipe.pexpire(stream, keys.JOBS_TTL_MS)
        pipe.pexpire(keys.pair(self.target), keys.PAIR_TTL_MS)
        pipe.zrange(workers, 0, -1, withscores=True)
        *_, renewed, scores = await pipe.execute()
        self._sort_peers(scores)
        return bool(renewed)

    async def leave(self) -> None:
        """We pick nothing up any more: peers may read what lies in our own streams at once."""
        await self.redis.delete(keys.beat(self.target, self.worker))
        await self.redis.zadd(keys.workers(self.target), {self.worker: 0})

    def now_ms(self) -> int:
        """Redis' clock, carried on by our monotonic one since it was last read."""
        return self._clock[0] + int((time.monotonic() - self._clock[1]) * 1000)

    def age_ms(self, delivery: Delivery) -> int:
        """How long ago a job was published; negative if its id was invented ahead of Redis' clock."""
        return self.now_ms() - delivery.sent_ms

    async def _read_clock_and_tenants(self) -> None:
        pipe = self.redis.pipeline(transaction=False)
        pipe.time()
        pipe.smembers(keys.TENANTS)
        (seconds, micros), tenants = await pipe.execute()
        self._clock = (seconds * 1000 + micros // 1000, time.monotonic())
        self.tenants = sorted(t.decode() for t in tenants) or [keys.DEFAULT_TENANT]

    def _sort_peers(self, scores: Iterable[tuple[bytes, float]]) -> None:
        stale = self.now_ms() - keys.BEAT_TTL_MS
        peers = [(name.decode(), score) for name, score in scores if name.decode() != self.worker]
        self._peers = [name for name, _ in peers]
        self._dead = [name for name, score in peers if score < stale]

    def _streams(self, workers: Iterable[str]) -> list[str]:
        return [keys.jobs(self.target, tenant, worker) for tenant in self.tenants for worker in workers]

    # --- picking up ------------------------------------------------------------------------------------------

    async def pick_up(self, count: int, block_ms: int) -> list[Delivery]:
        """New jobs from our own streams and from `any`: XREADGROUP, one round trip. They are leased to us."""
        return await self._read(self._streams([self.worker, keys.ANY]), count, block_ms)

    async def sweep(self) -> list[Delivery]:
        """Renew our leases, take over those that ran out and what dead peers left. At least every SWEEP_MS."""
        await self._renew_leases()
        found = await self._take_over()
        if self._dead:
            found += await self._read(self._streams(self._dead), 16, None)
            for name in self._dead:
                await self._bury(keys=[keys.workers(self.target), *self._streams([name])], args=[name])
        return found

    async def _read(self, streams: list[str], count: int, block_ms: int | None) -> list[Delivery]:
        try:
            got = await self.redis.xreadgroup(
                keys.GROUP_WORKERS, self.worker, dict.fromkeys(streams, ">"), count=count, block=block_ms
            )
        except rx.ResponseError as error:
            if "NOGROUP" not in str(error):
                raise
            await self.open()  # Redis restarted empty, or a dead peer's stream was just buried
            return []
        return [self._hold(stream.decode(), *entry) for stream, entries in got or () for entry in entries]

    async def _renew_leases(self) -> None:
        if not self.held:
            return
        streams = sorted({delivery.stream for delivery in self.held.values()})
        args: list[Any] = [keys.GROUP_WORKERS, self.worker]
        for delivery in self.held.values():
            args += [streams.index(delivery.stream) + 1, delivery.entry_id]
        try:
            await self._renew(keys=streams, args=args)
        except rx.ResponseError as error:
            if "NOGROUP" not in str(error):
                raise

    async def _take_over(self) -> list[Delivery]:
        """XAUTOCLAIM over every stream of the target, ours included; one pipelined round trip, a second for counts."""
        streams = self._streams([self.worker, keys.ANY, *self._peers])
        pipe = self.redis.pipeline(transaction=False)
        for stream in streams:
            pipe.xautoclaim(stream, keys.GROUP_WORKERS, self.worker, keys.LEASE_MS, count=16)
        answers = await pipe.execute(raise_on_error=False)
        expired = [
            (stream, *entry)
            for stream, answer in zip(streams, answers, strict=True)
            if not isinstance(answer, Exception)
            for entry in answer[1]
            if entry[1] is not None and (stream, entry[0].decode()) not in self.held
        ]
        return [self._hold(*entry, deliveries=await self._deliveries(*entry[:2])) for entry in expired]

    async def _deliveries(self, stream: str, entry_id: bytes) -> int:
        pending = await self.redis.xpending_range(stream, keys.GROUP_WORKERS, entry_id, entry_id, 1)
        return int(pending[0]["times_delivered"]) if pending else 1

    def _hold(self, stream: str, entry_id: bytes, fields: dict[bytes, bytes], deliveries: int = 1) -> Delivery:
        delivery = Delivery(
            stream=stream,
            entry_id=entry_id.decode(),
            tenant=stream.split(":")[3],
            agent=_name(fields.get(keys.FIELD_AGENT.encode(), b"")),
            payload=fields.get(keys.FIELD_MESSAGE.encode(), b""),
            deliveries=deliveries,
        )
        self.held[stream, delivery.entry_id] = delivery
        return delivery

    # --- answering -------------------------------------------------------------------------------------------

    async def reply(self, delivery: Delivery, message: Message | None, *, last: bool = True, dead: bool = False) -> None:
        """XADD the reply and, with `last`, acknowledge and delete the job, all in one MULTI.

        `message` None acknowledges without a reply (cancel, close). `dead` keeps a copy among the dead letters.
        """
        pipe = self.redis.pipeline(transaction=True)
        if message is not None and delivery.agent:
            stream = keys.replies(delivery.tenant, delivery.agent)
            pipe.xadd(stream, {keys.FIELD_MESSAGE: encode(message)}, maxlen=keys.REPLY_MAXLEN, approximate=True)
            pipe.pexpire(stream, keys.REPLY_TTL_MS)
        if dead:
            letters = keys.dead_letters(self.target)
            entry: dict[Any, Any] = {keys.FIELD_AGENT: delivery.agent, keys.FIELD_MESSAGE: delivery.payload}
            pipe.xadd(letters, {**entry, "stream": delivery.stream}, maxlen=keys.DLQ_MAXLEN, approximate=True)
            pipe.pexpire(letters, keys.DLQ_TTL_MS)
        if last:
            pipe.xack(delivery.stream, keys.GROUP_WORKERS, delivery.entry_id)
            pipe.xdel(delivery.stream, delivery.entry_id)
        await pipe.execute()
        if last:
            self.held.pop((delivery.stream, delivery.entry_id), None)

    def release(self, delivery: Delivery) -> None:
        """Stop renewing a lease without an answer: the job will be delivered again, here or to a peer."""
        self.held.pop((delivery.stream, delivery.entry_id), None)


def _name(raw: bytes) -> str:
    """An agent's name if it is one; a client may write anything there, and it becomes part of a key."""
    text = raw.decode("ascii", "replace")
    return text if re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", text) else ""
