"""The worker's side of the broker: pick up, hold by lease, reply and acknowledge in one script.

A job is leased to the worker that picked it up; the sweep renews the leases, takes over those that ran out, reads what
lies undelivered in dead peers' own streams, and puts jobs delivered too often among the dead letters. A worker may pass
a job on to a peer, by a stream no edge can write; an idle one takes such a job from a busy peer. Knows streams and
leases; nothing of what a job means. `broker.py` is the other side.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Final

import redis.exceptions as rx

from pilotfish.protocol import keys
from pilotfish.protocol.broker import SOCKET_SECONDS, RedisBytes, ensure_group
from pilotfish.protocol.codec import encode
from pilotfish.protocol.messages import Message
from pilotfish.protocol.wire import Wire, entries

#: renew_leases(KEYS: streams; ARGV: group, consumer, then (stream index, entry id)...) -> how many are still ours.
#: XCLAIM alone would steal a job back from the peer that took it over. A stream that is gone holds up no other.
RENEW_LEASES: Final = """
local kept = 0
for i = 3, #ARGV, 2 do
  local stream = KEYS[tonumber(ARGV[i])]
  local held = redis.pcall('XPENDING', stream, ARGV[1], ARGV[i + 1], ARGV[i + 1], 1, ARGV[2])
  if #held == 1 then
    redis.call('XCLAIM', stream, ARGV[1], ARGV[2], 0, ARGV[i + 1], 'JUSTID')
    kept = kept + 1
  end
end
return kept
"""

#: bury(KEYS: workers zset, the dead worker's streams...; ARGV: worker, oldest beat that counts as alive)
#: -> 1 when nothing was left and it is forgotten, 0 when jobs are left or it came back.
BURY: Final = """
local beat = redis.call('ZSCORE', KEYS[1], ARGV[1])
if beat and tonumber(beat) >= tonumber(ARGV[2]) then return 0 end
for i = 2, #KEYS do
  if redis.call('XLEN', KEYS[i]) > 0 then return 0 end
end
for i = 2, #KEYS do redis.call('DEL', KEYS[i]) end
redis.call('ZREM', KEYS[1], ARGV[1])
return 1
"""

#: start_over(KEYS: stream; ARGV: group, its life in ms) -> 1 when it was empty and began again.
#: Redis gives out ids above the largest it saw: after one far ahead, every honest one would look invented too.
START_OVER: Final = """
if redis.call('XLEN', KEYS[1]) > 0 then return 0 end
redis.call('DEL', KEYS[1])
redis.call('XGROUP', 'CREATE', KEYS[1], ARGV[1], '0', 'MKSTREAM')
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return 1
"""

#: pass_on(KEYS: job stream, peer's stream; ARGV: group, consumer, entry id, then fields and values to add...)
#: -> 1, or 0 when the job is no longer ours or the peer has no stream. One step: nobody sees it twice, or never.
PASS_ON: Final = f"""
if redis.call('EXISTS', KEYS[2]) == 0 then return 0 end
if #redis.call('XPENDING', KEYS[1], ARGV[1], ARGV[3], ARGV[3], 1, ARGV[2]) == 0 then return 0 end
local entry = redis.call('XRANGE', KEYS[1], ARGV[3], ARGV[3])[1]
if not entry then return 0 end
for i = 1, #entry[2], 2 do
  if entry[2][i] == '{keys.FIELD_MESSAGE}' then
    redis.call('XADD', KEYS[2], '*', '{keys.FIELD_MESSAGE}', entry[2][i + 1], unpack(ARGV, 4))
  end
end
redis.call('XACK', KEYS[1], ARGV[1], ARGV[3])
redis.call('XDEL', KEYS[1], ARGV[3])
return 1
"""

DEAD_LETTER_BYTES: Final = 65_536  # of a payload, for people; anyone may send a megabyte of nothing
SWEEP_COUNT: Final = 16  # jobs taken over from one stream in one sweep

#: answer(KEYS: job stream, reply stream, dead letters; ARGV: group, entry id, reply or "", last, letter's fields...)
#: A script and not a MULTI: one command to send and one answer to read, on the hottest path there is.
ANSWER: Final = f"""
if ARGV[3] ~= '' then
  redis.call('XADD', KEYS[2], 'MAXLEN', '~', {keys.REPLY_MAXLEN}, '*', '{keys.FIELD_MESSAGE}', ARGV[3])
  redis.call('PEXPIRE', KEYS[2], {keys.REPLY_TTL_MS})
end
if #ARGV > 4 then
  redis.call('XADD', KEYS[3], 'MAXLEN', '~', {keys.DLQ_MAXLEN}, '*', unpack(ARGV, 5))
  redis.call('PEXPIRE', KEYS[3], {keys.DLQ_TTL_MS})
end
if ARGV[4] == '1' then
  redis.call('XACK', KEYS[1], ARGV[1], ARGV[2])
  redis.call('XDEL', KEYS[1], ARGV[2])
end
"""


@dataclass(frozen=True, slots=True)
class Delivery:
    """One job as it was picked up; `deliveries` counts this one, also those before it was passed on.

    Of a job that a peer passed on, `first_id` is the id it came with, `cached_tokens` what its new worker should have
    (-1: nobody knows) and `queued_tokens` what was reserved there. `stolen` from a peer that lives.
    """

    stream: str
    entry_id: str
    tenant: str
    agent: str
    payload: bytes
    deliveries: int = 1
    first_id: str = ""
    hops: int = 0
    cached_tokens: int = -1
    queued_tokens: int = 0
    stolen: bool = False

    @property
    def sent_ms(self) -> int:
        """When it was published, on Redis' clock."""
        return int((self.first_id or self.entry_id).partition("-")[0])


class Ingress:
    """The job streams of one target as one worker sees them."""

    def __init__(self, redis: RedisBytes, target: str, worker: str) -> None:
        self.redis, self.target, self.worker = redis, target, worker
        self.tenants: list[str] = []
        self._claim_from: dict[str, Any] = {}  # stream -> where the next XAUTOCLAIM begins
        self.held: dict[tuple[str, str], Delivery] = {}  # by (stream, entry id)
        self._beats: dict[str, float] = {}  # of the peers, in Redis ms; 0 once they have left
        self.waiting = 0  # jobs passed on to us that are not in our hands, as of the last beat
        self._clock = (0, 0.0)  # Redis ms, our monotonic seconds at the same moment
        self._renew = redis.register_script(RENEW_LEASES)
        self._bury = redis.register_script(BURY)
        self._answer = redis.register_script(ANSWER)
        self._pass_on = redis.register_script(PASS_ON)
        self._wire = Wire(redis, SOCKET_SECONDS)
        self._start_over = redis.register_script(START_OVER)

    # --- life ------------------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Create our streams and groups; called at start, for a new tenant, and after Redis lost them."""
        await self._read_clock_and_tenants()
        for stream in self._streams([self.worker, keys.ANY]):
            await ensure_group(self.redis, stream, keys.GROUP_WORKERS)

    async def beat(self, fields: dict[str, str], *, serving: bool = True) -> bool:
        """Say that we live, renew what we own, and learn about peers and tenants. Two round trips.

        A worker that is not `serving` counts as dead, so that peers read its own streams while it finishes its jobs.
        False when the target's pair key is gone (Redis restarted empty): announce the target again.
        """
        before = set(self.tenants)
        await self._read_clock_and_tenants()
        if serving and set(self.tenants) - before:
            await self.open()
        pipe = self.redis.pipeline(transaction=False)
        name, workers = keys.beat(self.target, self.worker), keys.workers(self.target)
        pipe.hset(name, mapping=dict(fields))
        pipe.pexpire(name, keys.BEAT_TTL_MS)
        pipe.zadd(workers, {self.worker: self.now_ms() if serving else 0})
        pipe.pexpire(workers, keys.JOBS_TTL_MS)
        for stream in self._streams([self.worker, keys.ANY]):
            pipe.pexpire(stream, keys.JOBS_TTL_MS)
        pipe.xlen(self._passed_to_us)
        pipe.pexpire(keys.pair(self.target), keys.PAIR_TTL_MS)
        pipe.zrange(workers, 0, -1, withscores=True)
        *_, waiting, renewed, scores = await pipe.execute()
        self.waiting = waiting - sum(held.stream == self._passed_to_us for held in self.held.values())
        self._beats = {name.decode(): beat for name, beat in scores if name.decode() != self.worker}
        return bool(renewed)

    async def leave(self) -> None:
        """We pick nothing up any more: peers may read what lies in our own streams at once."""
        pipe = self.redis.pipeline(transaction=False)
        pipe.delete(keys.beat(self.target, self.worker))
        pipe.zadd(keys.workers(self.target), {self.worker: 0})
        pipe.pexpire(keys.workers(self.target), keys.JOBS_TTL_MS)
        await pipe.execute()

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

    @property
    def dead(self) -> list[str]:
        """Peers whose beat is too old, by now."""
        return [name for name, beat in self._beats.items() if beat < self._oldest_beat()]

    def is_mine(self, delivery: Delivery) -> bool:
        """Whether a peer passed this job on to us, and nobody had to take it over."""
        return delivery.stream == self._passed_to_us

    @property
    def _passed_to_us(self) -> str:
        return keys.forwarded(self.target, self.worker)

    def _oldest_beat(self) -> int:
        return self.now_ms() - keys.BEAT_TTL_MS

    def _streams(self, workers: Iterable[str]) -> list[str]:
        """Of each of these: one stream a tenant, and what peers passed on."""
        named = list(workers)
        ingress = [keys.jobs(self.target, tenant, worker) for tenant in self.tenants for worker in named]
        return ingress + [keys.forwarded(self.target, worker) for worker in named if worker != keys.ANY]

    # --- picking up ------------------------------------------------------------------------------------------

    async def pick_up(self, count: int, block_ms: int, *, passed_on: bool = True) -> list[Delivery]:
        """New jobs from our own streams and from `any`: XREADGROUP, one round trip. They are leased to us.

        COUNT is per stream, so a worker with little room asks each for its share (one at least). One that has enough
        to do leaves what was passed on to it for others to take.
        """
        streams = self._streams([self.worker, keys.ANY])
        if not passed_on:
            streams.remove(self._passed_to_us)
        share = max(1, count // max(1, len(streams)))
        try:
            options = ("COUNT", share, "BLOCK", block_ms, "STREAMS", *streams, *(">" for _ in streams))
            got = entries(await self._wire.call("XREADGROUP", "GROUP", keys.GROUP_WORKERS, self.worker, *options))
        except rx.ResponseError as error:
            if not _is_gone(error):
                raise
            await self.open()  # Redis restarted empty, or peers thought us dead and buried our streams
            return []
        return [self._hold(stream.decode(), *entry) for stream, found in got for entry in found]

    async def sweep(self, room: int) -> list[Delivery]:
        """Renew our leases; with `room`, take over those that ran out and what dead peers left. Once in SWEEP_MS."""
        await self._renew_leases()
        if room <= 0:
            return []
        count = min(room, SWEEP_COUNT)
        found = await self._expired(count)
        try:
            dead = self.dead
            return found + (await self._left_behind(dead, count) if dead else [])
        except BaseException:
            for delivery in found:
                self.release(delivery)  # nobody will begin them: their leases must run out again
            raise

    async def steal(self, count: int) -> list[Delivery]:
        """What was passed on to busy peers and they have not taken: `count` of each at most. One round trip."""
        dead = self.dead
        busy = [keys.forwarded(self.target, name) for name in self._beats if name not in dead]
        return [replace(delivery, stolen=True) for delivery in await self._undelivered(busy, count)]

    async def start_over(self, stream: str) -> None:
        """Make a stream honest again after an entry whose id was invented ahead of Redis' clock, once it is empty."""
        await self._start_over(keys=[stream], args=[keys.GROUP_WORKERS, keys.JOBS_TTL_MS])

    async def _renew_leases(self) -> None:
        if not self.held:
            return
        streams = sorted({delivery.stream for delivery in self.held.values()})
        args: list[Any] = [keys.GROUP_WORKERS, self.worker]
        for delivery in self.held.values():
            args += [streams.index(delivery.stream) + 1, delivery.entry_id]
        await self._renew(keys=streams, args=args)

    async def _expired(self, count: int) -> list[Delivery]:
        """XAUTOCLAIM over every stream of the target, ours included. One round trip, a second for delivery counts."""
        streams = self._streams([self.worker, keys.ANY, *self._beats])
        pipe = self.redis.pipeline(transaction=False)
        for stream in streams:
            start = self._claim_from.get(stream, "0-0")
            pipe.xautoclaim(stream, keys.GROUP_WORKERS, self.worker, keys.LEASE_MS, start_id=start, count=count)
        answers = await pipe.execute(raise_on_error=False)
        # Redis looks at ten times `count` pending entries only, and says where to go on.
        self._claim_from = {s: a[0] for s, a in zip(streams, answers, strict=True) if not isinstance(a, Exception)}
        entries: list[tuple[str, bytes, dict[bytes, bytes]]] = [
            (stream, *entry)
            for stream, answer in zip(streams, answers, strict=True)
            for entry in (_unless_gone(answer) or ((), ()))[1]
            if entry[1] is not None and (stream, entry[0].decode()) not in self.held  # Redis 6.2 names the deleted too
        ]
        counts = await self._deliveries(entries)
        return [self._hold(*entry, count) for entry, count in zip(entries, counts, strict=True)]

    async def _left_behind(self, dead: list[str], count: int) -> list[Delivery]:
        """Bury the dead of whom nothing is left; what nobody took from the others' own streams."""
        for name in dead:
            streams = [keys.workers(self.target), *self._streams([name])]
            if await self._bury(keys=streams, args=[name, self._oldest_beat()]):
                self._beats.pop(name, None)
        return await self._undelivered(self._streams(dead), count)

    async def _undelivered(self, streams: list[str], count: int) -> list[Delivery]:
        """XREADGROUP over streams of others: undelivered jobs are nobody's pending entries."""
        if not streams:
            return []
        pipe = self.redis.pipeline(transaction=False)
        for stream in streams:
            pipe.xreadgroup(keys.GROUP_WORKERS, self.worker, {stream: ">"}, count=count)
        answers = [_unless_gone(answer) for answer in await pipe.execute(raise_on_error=False)]
        return [
            self._hold(stream.decode(), *entry)
            for answer in answers
            for stream, entries in answer or ()
            for entry in entries
        ]

    async def _deliveries(self, entries: list[tuple[str, bytes, dict[bytes, bytes]]]) -> list[int]:
        if not entries:
            return []
        pipe = self.redis.pipeline(transaction=False)
        for stream, entry_id, _ in entries:
            pipe.xpending_range(stream, keys.GROUP_WORKERS, entry_id, entry_id, 1)
        return [int(pending[0]["times_delivered"]) if pending else 1 for pending in await pipe.execute()]

    def _hold(self, stream: str, entry_id: bytes, fields: dict[bytes, bytes], deliveries: int = 1) -> Delivery:
        agent = _name(fields.get(keys.FIELD_AGENT.encode(), b""))
        payload = fields.get(keys.FIELD_MESSAGE.encode(), b"")
        delivery = Delivery(stream, entry_id.decode(), stream.split(":")[3], agent, payload, deliveries)
        if stream.split(":")[2] == "fwd":
            delivery = _passed_on(delivery, fields)
        self.held[stream, delivery.entry_id] = delivery
        return delivery

    # --- answering -------------------------------------------------------------------------------------------

    async def reply(self, delivery: Delivery, message: Message | None, *, last: bool = True, dead: str = "") -> None:
        """Add the reply and, with `last`, acknowledge and delete the job: one script, nothing comes between.

        `message` None acknowledges without a reply (cancel, close). `dead` says why a copy goes to the dead letters.
        """
        streams = [delivery.stream, keys.replies(delivery.tenant, delivery.agent), keys.dead_letters(self.target)]
        payload = encode(message) if message is not None and delivery.agent else b""
        letter = _dead_letter(delivery, dead) if dead else ()
        told = [len(streams), *streams, keys.GROUP_WORKERS, delivery.entry_id, payload, int(last), *letter]
        try:
            await self._wire.call("EVALSHA", self._answer.sha, *told)
        except rx.NoScriptError:
            await self._wire.call("EVAL", ANSWER, *told)
        if last:
            self.release(delivery)

    async def pass_on(
        self, delivery: Delivery, worker: str, *, cached_tokens: int = -1, queued_tokens: int = 0
    ) -> bool:
        """Move a job to a peer's own stream, with its age and delivery count: one script. False if that cannot be."""
        fields = {
            keys.FIELD_TENANT: delivery.tenant,
            keys.FIELD_AGENT: delivery.agent,
            keys.FIELD_FIRST: delivery.first_id or delivery.entry_id,
            keys.FIELD_DELIVERIES: delivery.deliveries,
            keys.FIELD_HOPS: delivery.hops + 1,
            keys.FIELD_CACHED: cached_tokens,
            keys.FIELD_QUEUED: queued_tokens,
        }
        added: list[Any] = [part for pair in fields.items() for part in pair]
        moved = await self._pass_on(
            keys=[delivery.stream, keys.forwarded(self.target, worker)],
            args=[keys.GROUP_WORKERS, self.worker, delivery.entry_id, *added],
        )
        if moved:
            self.release(delivery)
        return bool(moved)

    def release(self, delivery: Delivery) -> None:
        """Stop renewing a lease without an answer: the job will be delivered again, here or to a peer."""
        self.held.pop((delivery.stream, delivery.entry_id), None)


def _passed_on(delivery: Delivery, fields: dict[bytes, bytes]) -> Delivery:
    """With what the peer said about it; only workers write that stream, so it is as it should be."""

    def said(field: str) -> int:
        return int(fields[field.encode()])

    return replace(
        delivery,
        tenant=fields[keys.FIELD_TENANT.encode()].decode(),
        deliveries=said(keys.FIELD_DELIVERIES) + delivery.deliveries - 1,
        first_id=fields[keys.FIELD_FIRST.encode()].decode(),
        hops=said(keys.FIELD_HOPS),
        cached_tokens=said(keys.FIELD_CACHED),
        queued_tokens=said(keys.FIELD_QUEUED),
    )


def _name(raw: bytes) -> str:
    """An agent's name if it is one; a client may write anything there, and it becomes part of a key."""
    text = raw.decode("ascii", "replace")
    return text if keys.NAME.fullmatch(text) else ""


def _dead_letter(delivery: Delivery, why: str) -> tuple[Any, ...]:
    """Fields and values of the copy."""
    payload = delivery.payload[:DEAD_LETTER_BYTES]
    return (keys.FIELD_AGENT, delivery.agent, keys.FIELD_MESSAGE, payload, "stream", delivery.stream, "why", why)


def _is_gone(error: Exception) -> bool:
    """A stream or group was deleted, before we asked for it or (Redis 7.0) while we waited on it."""
    return "NOGROUP" in str(error) or "UNBLOCKED" in str(error)


def _unless_gone(answer: Any) -> Any:
    """One answer of a pipeline; None where the stream does not exist. Raises what else went wrong."""
    if not isinstance(answer, Exception):
        return answer
    if not _is_gone(answer):
        raise answer
    return None
