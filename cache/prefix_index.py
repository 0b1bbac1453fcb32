"""The prefix index: which worker holds which KV blocks, shared through Redis, each script beside its signature.

A block is 63 bits of its name (`block_hash.py`), a member of one of a worker's buckets: sets small enough that Redis
keeps them as sorted arrays of integers, 8 bytes an entry. A worker's life is a lease on Redis' clock; its *epoch*, new
with every registration, is part of the buckets' keys, so what an earlier epoch said is out of reach at once and removed
in pieces later. A sequence number tells a batch that was lost. Held blocks are closed under prefixes (an engine evicts
a block before the one it follows), so the longest held prefix is found by halving: ten looks for a thousand blocks, and
one at a worker that could not win. Soft state: what it says or forgets changes speed and nothing else. Knows blocks,
not tokens or tenants.

The scripts read keys that they make themselves: one Redis, not a cluster. They run on Redis 6.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Final

import redis.exceptions as rx

from pilotfish.cache.block_hash import SHORT_BYTES
from pilotfish.protocol import keys
from pilotfish.protocol.broker import SOCKET_SECONDS, RedisBytes
from pilotfish.protocol.wire import Wire

BUCKET_BLOCKS: Final = 256  # on average; Redis keeps a set as an array up to 512 (set-max-intset-entries)
BATCH_BLOCKS: Final = 256  # of one publication: Redis is blocked for about a millisecond
REAP_BUCKETS: Final = 128  # removed by one call
RENEW_BUCKETS: Final = 64  # whose life one beat renews
AFFINITY_BLOCKS: Final = 3  # a shorter hit is no reason to go anywhere
HOP_MS: Final = 1.0  # what passing a job on costs
RATE_UNKNOWN: Final = 1_000.0  # tokens a second, until some worker has measured its own

_NOW: Final = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
"""

#: block(blob, i) -> the upper 31 of its 63 bits, and all of them as decimal digits: Lua's numbers end at 53 bits,
#: so the digits are put together from the lower six and the rest (2^48 = 281474976|710656, 2^32 = 4294|967296)
_BLOCK: Final = """
local function block(blob, i)
  local high, low = struct.unpack('>I4I4', blob, 8 * i + 1)
  high = high % 2147483648
  local a, b = math.floor(high / 65536), high % 65536
  local digits = a * 710656 + b * 967296 + low
  local rest = a * 281474976 + b * 4294 + math.floor(digits / 1000000)
  if rest == 0 then return high, string.format('%d', digits) end
  return high, string.format('%.0f%06d', rest, digits % 1000000)
end
"""

#: register(KEYS: index, worker, gone; ARGV: worker, buckets, rate, lease ms, life ms) -> epoch
REGISTER: Final = f"""{_NOW}
local old = redis.call('HMGET', KEYS[2], 'epoch', 'buckets')
local epoch = now
if old[1] then
  epoch = math.max(now, old[1] + 1)
  redis.call('HSET', KEYS[3], old[1] .. ':' .. ARGV[1], old[2])
  redis.call('PEXPIRE', KEYS[3], ARGV[5])
end
while redis.call('HEXISTS', KEYS[3], epoch .. ':' .. ARGV[1]) == 1 do epoch = epoch + 1 end
redis.call('DEL', KEYS[2])
redis.call('HSET', KEYS[2], 'epoch', epoch, 'buckets', ARGV[2], 'rate', ARGV[3], 'seq', 0, 'blocks', 0, 'queued', 0)
redis.call('ZADD', KEYS[1], now + ARGV[4], ARGV[1])
redis.call('PEXPIRE', KEYS[1], ARGV[5])
redis.call('PEXPIRE', KEYS[2], ARGV[5])
return epoch
"""

#: publish(KEYS: worker; ARGV: epoch, seq, stored blob, removed blob, tokens done, bucket key, life ms) -> Published
PUBLISH: Final = f"""{_BLOCK}
local known = redis.call('HMGET', KEYS[1], 'epoch', 'seq', 'buckets', 'queued')
if known[1] ~= ARGV[1] then return -1 end
if known[2] == ARGV[2] then return 1 end
if known[2] + 1 ~= tonumber(ARGV[2]) then return 0 end
local change = 0
for i = 0, #ARGV[3] / {SHORT_BYTES} - 1 do
  local high, member = block(ARGV[3], i)
  local bucket = string.format(ARGV[6], high % known[3])
  if redis.call('SADD', bucket, member) == 1 then
    change = change + 1
    redis.call('PEXPIRE', bucket, ARGV[7])
  end
end
for i = 0, #ARGV[4] / {SHORT_BYTES} - 1 do
  local high, member = block(ARGV[4], i)
  change = change - redis.call('SREM', string.format(ARGV[6], high % known[3]), member)
end
redis.call('HSET', KEYS[1], 'seq', ARGV[2], 'queued', math.max(0, known[4] - ARGV[5]))
redis.call('HINCRBY', KEYS[1], 'blocks', change)
return 1
"""

#: beat(KEYS: index, worker; ARGV: worker, epoch, rate, queued or -1, lease ms, life ms, bucket key, from, count)
#: -> 1, or 0 when this epoch is not the worker's (Redis lost it, or another process took the name)
BEAT: Final = f"""{_NOW}
local known = redis.call('HMGET', KEYS[2], 'epoch', 'buckets')
if known[1] ~= ARGV[2] then return 0 end
redis.call('HSET', KEYS[2], 'rate', ARGV[3])
if tonumber(ARGV[4]) >= 0 then redis.call('HSET', KEYS[2], 'queued', ARGV[4]) end
redis.call('ZADD', KEYS[1], now + ARGV[5], ARGV[1])
redis.call('PEXPIRE', KEYS[1], ARGV[6])
redis.call('PEXPIRE', KEYS[2], ARGV[6])
for i = ARGV[8], ARGV[8] + ARGV[9] - 1 do
  redis.call('PEXPIRE', string.format(ARGV[7], i % known[2]), ARGV[6])
end
return 1
"""

#: reap(KEYS: index, gone; ARGV: worker key, bucket key, how many buckets, life ms) -> buckets that are left to remove
REAP: Final = f"""{_NOW}
for _, worker in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', '(' .. now)) do
  local key = string.format(ARGV[1], worker)
  local known = redis.call('HMGET', key, 'epoch', 'buckets')
  if known[1] then
    redis.call('HSET', KEYS[2], known[1] .. ':' .. worker, known[2])
    redis.call('PEXPIRE', KEYS[2], ARGV[4])
  end
  redis.call('DEL', key)
  redis.call('ZREM', KEYS[1], worker)
end
local gone, left, room = redis.call('HGETALL', KEYS[2]), 0, tonumber(ARGV[3])
for i = 1, #gone, 2 do
  local epoch, worker = string.match(gone[i], '^(%d+):(.*)$')
  local from = math.max(0, gone[i + 1] - room)
  local dead = {{}}
  for bucket = from, gone[i + 1] - 1 do dead[#dead + 1] = string.format(ARGV[2], epoch, bucket, worker) end
  if #dead > 0 then redis.call('UNLINK', unpack(dead)) end
  if from == 0 then redis.call('HDEL', KEYS[2], gone[i]) else redis.call('HSET', KEYS[2], gone[i], from) end
  room, left = room - #dead, left + from
end
return left
"""

#: workers() -> every live worker; held(blob, worker, needs) -> how many blocks of the prefix it holds, or nil when that
#: is less than it needs, which one look tells
_WORKERS: Final = f"""{_NOW}{_BLOCK}
local call, floor, highs, members = redis.call, math.floor, {{}}, {{}}
local function holds(blob, worker, i)
  if not members[i] then highs[i], members[i] = block(blob, i) end
  return call('SISMEMBER', worker.head .. highs[i] % worker.buckets .. worker.tail, members[i]) == 1
end
local function held(blob, worker, needs)
  local low, high = math.max(1, needs), #blob / {SHORT_BYTES}
  if low > high or not holds(blob, worker, low - 1) then return needs == 0 and 0 or nil end
  while low < high do
    local middle = floor((low + high) / 2)
    if holds(blob, worker, middle) then low = middle + 1 else high = middle end
  end
  return low
end
local function workers()
  local found = {{}}
  for _, name in ipairs(call('ZRANGEBYSCORE', KEYS[1], now, '+inf')) do
    local f = call('HMGET', string.format(ARGV[1], name), 'epoch', 'buckets', 'queued', 'rate', 'blocks')
    if f[1] then
      local head, tail = string.match(string.format(ARGV[2], f[1], 0, name), '^(.*:)0(:[^:]*)$')
      found[#found + 1] = {{name=name, epoch=f[1], buckets=f[2], queued=tonumber(f[3]), rate=tonumber(f[4]),
                           blocks=f[5], head=head, tail=tail}}
    end
  end
  return found
end
"""

#: route(KEYS: index; ARGV: worker key, bucket key, blob, me, tokens, tokens in a block)
#: -> {worker, blocks it holds, tokens reserved in its queue}, or nil when nobody is registered.
#: Whoever would need more blocks than it holds to be sooner than the best so far is asked for that many, and no more.
ROUTE: Final = f"""{_WORKERS}
local found, known, rates, best = workers(), 0, 0, nil
for _, w in ipairs(found) do
  if w.rate > 0 then known, rates = known + 1, rates + w.rate end
end
local function seconds(w, hit)
  return (w.queued + ARGV[5] - (hit < {AFFINITY_BLOCKS} and 0 or hit) * ARGV[6]) / w.rate + w.hop
end
for _, w in ipairs(found) do
  if w.rate <= 0 then w.rate = known > 0 and rates / known or {RATE_UNKNOWN} end
  w.hop = w.name == ARGV[4] and 0 or {HOP_MS / 1000}
  local needs = best and seconds(w, 0) >= best.seconds
    and math.max({AFFINITY_BLOCKS}, floor((seconds(w, 0) - best.seconds) * w.rate / ARGV[6])) or 0
  w.hit = held(ARGV[3], w, needs)
  if w.hit then
    w.seconds = seconds(w, w.hit)
    if not best or w.seconds < best.seconds then best = w end
  end
end
if not best then return false end
local reserved = ARGV[5] - best.hit * ARGV[6]
redis.call('HINCRBY', string.format(ARGV[1], best.name), 'queued', reserved)
return {{best.name, best.hit, reserved}}
"""

#: look(KEYS: index; ARGV: worker key, bucket key, blob) -> {worker, epoch, blocks, queued, rate, blocks held} of each
LOOK: Final = f"""{_WORKERS}
local told = {{}}
for i, w in ipairs(workers()) do
  told[i] = {{w.name, w.epoch, w.blocks, tostring(w.queued), tostring(w.rate), held(ARGV[3], w, 0)}}
end
return told
"""


class Published(IntEnum):
    """What became of a batch."""

    DONE = 1
    LOST = 0  # a batch before this one never came: register and publish everything
    FENCED = -1  # this epoch is over, or Redis forgot it: the same


@dataclass(slots=True)
class Share:
    """One worker's part of the index, for one epoch: `seq` counts its batches, `renewed` the buckets by beats."""

    worker: str
    epoch: int
    buckets: int
    seq: int = 0
    renewed: int = 0


@dataclass(frozen=True, slots=True)
class Route:
    """Who should take a job: `blocks` of its prefix are cached there, `tokens` were reserved in its queue."""

    worker: str
    blocks: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Holder:
    """One live worker as the index knows it; `hit` is the held length of the prefix that was asked for, in blocks."""

    worker: str
    epoch: int
    blocks: int
    queued: int
    rate: float
    hit: int


def buckets_for(blocks: int) -> int:
    """How many buckets a cache of so many blocks wants."""
    return max(1, -(-blocks // BUCKET_BLOCKS))


class PrefixIndex:
    """The index of one target. Every method is one round trip, and raises what redis-py raises."""

    def __init__(self, redis: RedisBytes, target: str, *, lease_ms: int = keys.BEAT_TTL_MS) -> None:
        self.redis, self.target, self.lease_ms = redis, target, lease_ms
        self._wire = Wire(redis, SOCKET_SECONDS)
        self._scripts = {text: redis.register_script(text) for text in (REGISTER, PUBLISH, BEAT, REAP, ROUTE, LOOK)}
        self._index, self._gone = keys.index(target), keys.index_gone(target)
        self._templates = (keys.index_worker(target, "%s"), keys.index_bucket(target, "%s", "%d", "%s"))

    # --- what a worker says of itself ------------------------------------------------------------------------

    async def register(self, worker: str, buckets: int, rate: float = 0.0) -> Share:
        """A new epoch, which holds nothing yet; the one before is out of reach from now on."""
        names = [self._index, keys.index_worker(self.target, worker), self._gone]
        epoch = await self._run(REGISTER, names, worker, buckets, rate, self.lease_ms, keys.JOBS_TTL_MS)
        return Share(worker, int(epoch), buckets)

    async def publish(
        self, share: Share, stored: Sequence[bytes] = (), removed: Sequence[bytes] = (), *, done_tokens: int = 0
    ) -> Published:
        """Blocks (short names) that came and went, and reserved tokens that were computed. May be sent again as is."""
        blobs = b"".join(stored), b"".join(removed)
        names = [keys.index_worker(self.target, share.worker)]
        said = await self._run(
            PUBLISH, names, share.epoch, share.seq + 1, *blobs, done_tokens, self._bucket(share), keys.JOBS_TTL_MS
        )
        if (outcome := Published(said)) is Published.DONE:
            share.seq += 1
        return outcome

    async def beat(self, share: Share, rate: float, queued: int = -1) -> bool:
        """Renew the lease, say the prefill rate (tokens/s) and, unless -1, the true length of the queue in tokens.

        False when the epoch is over: register again.
        """
        names = [self._index, keys.index_worker(self.target, share.worker)]
        count = min(RENEW_BUCKETS, share.buckets)
        said = await self._run(
            BEAT, names, share.worker, share.epoch, rate, queued, self.lease_ms, keys.JOBS_TTL_MS, self._bucket(share),
            share.renewed, count,
        )  # fmt: skip
        share.renewed = (share.renewed + count) % share.buckets
        return bool(said)

    async def leave(self, share: Share) -> None:
        """End the lease now; peers remove the rest."""
        await self.redis.zadd(self._index, {share.worker: 0}, xx=True)

    # --- what anyone may do ----------------------------------------------------------------------------------

    async def reap(self, buckets: int = REAP_BUCKETS) -> int:
        """Forget workers whose lease ended and remove some of what they left; how many buckets are still to go."""
        return int(await self._run(REAP, [self._index, self._gone], *self._templates, buckets, keys.JOBS_TTL_MS))

    async def route(self, me: str, tokens: int, block_size: int, blocks: Sequence[bytes]) -> Route | None:
        """The worker that would be through with a prefix of `tokens` first, its share of the queue reserved.

        `blocks` are the short names of the prefix's cacheable blocks; without them the shortest queue wins.
        """
        got = await self._run(ROUTE, [self._index], *self._templates, b"".join(blocks), me, tokens, block_size)
        return Route(got[0].decode(), int(got[1]), int(got[2])) if got else None

    async def look(self, blocks: Sequence[bytes] = ()) -> list[Holder]:
        """Every live worker, and how much of a prefix it holds; nothing is reserved."""
        got = await self._run(LOOK, [self._index], *self._templates, b"".join(blocks))
        return [
            Holder(name.decode(), int(epoch), int(held), int(float(queued)), float(rate), int(hit))
            for name, epoch, held, queued, rate, hit in got
        ]

    def _bucket(self, share: Share) -> str:
        return keys.index_bucket(self.target, share.epoch, "%d", share.worker)

    async def _run(self, script: str, names: Sequence[str], *args: Any) -> Any:
        told = (len(names), *names, *args)
        try:
            return await self._wire.call("EVALSHA", self._scripts[script].sha, *told)
        except rx.NoScriptError:
            return await self._wire.call("EVAL", script, *told)
