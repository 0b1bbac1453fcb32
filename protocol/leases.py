"""Jobs held by lease: renewing ours, taking over those that ran out, reading what the dead left, burying them.

The second layer of `ingress.py`. A lease is an entry's idle time in its consumer group; whoever holds a job renews it
every SWEEP_MS, and a worker that stalls loses it to a peer. Knows streams and leases; nothing of what a job means.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

from pilotfish.protocol import keys
from pilotfish.protocol.broker import RedisBytes
from pilotfish.protocol.delivery import Delivery, read
from pilotfish.protocol.roster import Roster
from pilotfish.protocol.wire import by_name

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

#: claim(KEYS: streams; ARGV: group, consumer, idle ms, how many of each, then where to begin in each) -> (place of the
#: stream, where to go on, entries) of those where something is found or left to be looked at.
CLAIM: Final = """
local told = {}
for i, stream in ipairs(KEYS) do
  local got = redis.pcall('XAUTOCLAIM', stream, ARGV[1], ARGV[2], ARGV[3], ARGV[i + 4], 'COUNT', ARGV[4])
  if got.err then
    if not (got.err:find('NOGROUP') or got.err:find('WRONGTYPE')) then return got end
  elseif got[1] ~= '0-0' or #got[2] > 0 then
    told[#told + 1] = {i, got[1], got[2]}
  end
end
return told
"""

#: bury(KEYS: workers zset, the dead worker's streams...; ARGV: worker, oldest beat that counts as alive)
#: -> 1 when nothing was left and it is forgotten, 0 when jobs are left or it came back.
BURY: Final = """
local beat = redis.call('ZSCORE', KEYS[1], ARGV[1])
if beat and tonumber(beat) >= tonumber(ARGV[2]) then return 0 end
for i = 2, #KEYS do
  local left = redis.pcall('XLEN', KEYS[i])
  if type(left) == 'number' and left > 0 then return 0 end
end
for i = 2, #KEYS do redis.call('DEL', KEYS[i]) end
redis.call('ZREM', KEYS[1], ARGV[1])
return 1
"""

SWEEP_COUNT: Final = 16  # jobs taken over from one stream in one sweep


class Leases(Roster):
    """What one worker holds, and what it may take from others."""

    def __init__(self, redis: RedisBytes, target: str, worker: str) -> None:
        super().__init__(redis, target, worker)
        self.held: dict[tuple[str, str], Delivery] = {}  # by (stream, entry id)
        self._claim_from: dict[str, bytes] = {}  # stream -> where the next XAUTOCLAIM begins, if not at its start
        self._claim = redis.register_script(CLAIM)
        self._renew = redis.register_script(RENEW_LEASES)
        self._bury = redis.register_script(BURY)

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

    def _hold(self, stream: str, entry_id: bytes, fields: dict[bytes, bytes], deliveries: int = 1) -> Delivery:
        delivery = read(stream, entry_id, fields, deliveries)
        self.held[stream, delivery.entry_id] = delivery
        return delivery

    def release(self, delivery: Delivery) -> None:
        """Stop renewing a lease without an answer: the job will be delivered again, here or to a peer."""
        self.held.pop((delivery.stream, delivery.entry_id), None)

    # --- ours ------------------------------------------------------------------------------------------------

    async def _renew_leases(self) -> None:
        if not self.held:
            return
        streams = sorted({delivery.stream for delivery in self.held.values()})
        args: list[Any] = [keys.GROUP_WORKERS, self.worker]
        for delivery in self.held.values():
            args += [streams.index(delivery.stream) + 1, delivery.entry_id]
        await self._renew(keys=streams, args=args)

    # --- others' ---------------------------------------------------------------------------------------------

    async def _expired(self, count: int) -> list[Delivery]:
        """XAUTOCLAIM over every stream of the target, ours included, by a script for STREAMS_MAX of them at a time."""
        streams = self._streams([self.worker, keys.ANY, *self._beats])
        entries: list[tuple[str, bytes, dict[bytes, bytes]]] = []
        starts, self._claim_from = self._claim_from, {}
        for first in range(0, len(streams), keys.STREAMS_MAX):
            some = streams[first : first + keys.STREAMS_MAX]
            args = [keys.GROUP_WORKERS, self.worker, keys.LEASE_MS, count, *(starts.get(name, "0-0") for name in some)]
            for place, start, claimed in await self._claim(keys=some, args=args):
                stream = some[place - 1]
                self._claim_from[stream] = start  # Redis looks at ten times `count` entries, and says where to go on
                entries += [
                    (stream, *entry) for entry in _present(claimed) if (stream, entry[0].decode()) not in self.held
                ]
        counts = await self._deliveries(entries)
        return [self._hold(*entry, count) for entry, count in zip(entries, counts, strict=True)]

    async def _deliveries(self, entries: list[tuple[str, bytes, dict[bytes, bytes]]]) -> list[int]:
        if not entries:
            return []
        pipe = self.redis.pipeline(transaction=False)
        for stream, entry_id, _ in entries:
            pipe.xpending_range(stream, keys.GROUP_WORKERS, entry_id, entry_id, 1)
        return [int(pending[0]["times_delivered"]) if pending else 1 for pending in await pipe.execute()]

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
        answers = [unless_gone(answer) for answer in await pipe.execute(raise_on_error=False)]
        return [
            self._hold(stream.decode(), *entry)
            for answer in answers
            for stream, entries in answer or ()
            for entry in entries
        ]


def _present(claimed: list[Any]) -> list[tuple[bytes, dict[bytes, bytes]]]:
    """Entries that are still in their stream: Redis 6.2 names the deleted too."""
    there = [entry for entry in claimed if entry and entry[1] is not None]
    return [(entry_id, by_name(fields)) for entry_id, fields in there]


def is_gone(error: Exception) -> bool:
    """A stream or group was deleted or replaced, before we asked for it or (Redis 7.0) while we waited on it."""
    return any(word in str(error) for word in ("NOGROUP", "UNBLOCKED", "WRONGTYPE"))


def unless_gone(answer: Any) -> Any:
    """One answer of a pipeline; None where the stream does not exist. Raises what else went wrong."""
    if not isinstance(answer, Exception):
        return answer
    if not is_gone(answer):
        raise answer
    return None
