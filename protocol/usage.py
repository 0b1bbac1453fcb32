"""What tenants with a quota have used, counted by the workers: a token bucket on Redis' time, and tokens in flight.

Nobody is asked per job: a worker counts what it takes, and every SWEEP_MS one script settles with Redis what it took
and learns what its peers did. So a burst may exceed a quota by what peers take in a quarter of a second; what is owed
is paid back before anything more is taken, and the rate over time is exact. A tenant over its quota is not read: its
jobs wait in its own stream (back-pressure) until they are due, or are refused by `shedding.py`. Of a worker that died
nothing is counted, its beat says so.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from typing import Final

from pilotfish.protocol import keys
from pilotfish.protocol.broker import RedisBytes
from pilotfish.protocol.quota import UNLIMITED, Quota

#: settle(KEYS: workers zset, then each tenant's use; ARGV: worker, oldest beat that counts as alive, life in ms, then
#: for each tenant: rows taken, tokens in flight here, rows a second, most rows saved up)
#: -> for each tenant: rows saved up (negative: owed), tokens in flight at live peers. A name has no colon, ours have.
SETTLE: Final = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local alive, told = {}, {}
for _, name in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], ARGV[2], '+inf')) do alive[name] = true end
for i = 2, #KEYS do
  local at = 4 * i - 4
  local took, here, rate, most = tonumber(ARGV[at]), ARGV[at + 1], tonumber(ARGV[at + 2]), tonumber(ARGV[at + 3])
  local saved, since = most, now
  local elsewhere, held = 0, redis.call('HGETALL', KEYS[i])
  for j = 1, #held, 2 do
    local name, value = held[j], tonumber(held[j + 1]) or 0
    if name == ':rows' then saved = value
    elseif name == ':at' then since = value
    elseif name == ARGV[1] then
    elseif alive[name] then elsewhere = elsewhere + value
    else redis.call('HDEL', KEYS[i], name) end
  end
  saved = math.min(most, saved + rate * math.max(0, now - since) / 1000) - took
  redis.call('HSET', KEYS[i], ':rows', tostring(saved), ':at', now, ARGV[1], here)
  redis.call('PEXPIRE', KEYS[i], ARGV[3])
  told[#told + 1] = tostring(saved)
  told[#told + 1] = elsewhere
end
return told
"""


class Usage:
    """The use of one target's tenants as one worker knows it. `quotas` are those read last, by the one who reads."""

    def __init__(self, redis: RedisBytes, target: str, worker: str, quotas: Mapping[str, Quota]) -> None:
        self.target, self.worker, self.quotas = target, worker, quotas
        self.in_flight: Counter[str] = Counter()  # tokens, here
        self._took: Counter[str] = Counter()  # rows, since we last settled
        self._saved: dict[str, tuple[float, float]] = {}  # rows, and when that was so on our monotonic clock
        self._elsewhere: dict[str, int] = {}  # tokens in flight at peers
        self._settle = redis.register_script(SETTLE)

    def quota(self, tenant: str) -> Quota:
        """What it is granted."""
        return self.quotas.get(tenant, UNLIMITED)

    def over(self, tenant: str) -> str:
        """Which limit a tenant has reached, in words; "" where more may be taken from it."""
        quota = self.quota(tenant)
        if quota.rows_per_second and self._rows(tenant, quota) <= 0:
            return f"over its {quota.rows_per_second:g} rows a second"
        if quota.tokens_in_flight and self._in_flight(tenant) >= quota.tokens_in_flight:
            return f"at its {quota.tokens_in_flight} tokens in flight"
        return ""

    def _rows(self, tenant: str, quota: Quota) -> float:
        saved, since = self._saved.setdefault(tenant, (quota.burst_rows, time.monotonic()))
        earned = quota.rows_per_second * (time.monotonic() - since)
        return min(quota.burst_rows, saved - self._took[tenant] + earned)

    def _in_flight(self, tenant: str) -> int:
        return self.in_flight[tenant] + self._elsewhere.get(tenant, 0)

    def begin(self, tenant: str, rows: int, tokens: int) -> None:
        """A job is taken."""
        if self.quota(tenant).limited:
            self._took[tenant] += rows
        self.in_flight[tenant] += tokens

    def end(self, tenant: str, tokens: int) -> None:
        """It is over."""
        self.in_flight[tenant] -= tokens
        if self.in_flight[tenant] <= 0:
            del self.in_flight[tenant]

    async def settle(self, oldest_beat_ms: int) -> None:
        """Tell what was taken, learn what is left: one round trip per STREAMS_MAX tenants that have limits."""
        limited = sorted(tenant for tenant, quota in self.quotas.items() if quota.limited)
        for first in range(0, len(limited), keys.STREAMS_MAX):
            await self._settle_some(limited[first : first + keys.STREAMS_MAX], oldest_beat_ms)

    async def _settle_some(self, tenants: list[str], oldest_beat_ms: int) -> None:
        took, args = {tenant: self._took.pop(tenant, 0) for tenant in tenants}, []
        for tenant in tenants:
            quota = self.quota(tenant)  # one that was revoked while the first of many were settled has none
            args += [took[tenant], self.in_flight[tenant], quota.rows_per_second, quota.burst_rows]
        names = [keys.workers(self.target), *(keys.use(self.target, tenant) for tenant in tenants)]
        try:
            told = await self._settle(keys=names, args=[self.worker, oldest_beat_ms, keys.JOBS_TTL_MS, *args])
        except BaseException:
            self._took.update(took)  # Redis may have heard it: a tenant then owes once more than it took
            raise
        now = time.monotonic()
        for tenant, saved, elsewhere in zip(tenants, told[::2], told[1::2], strict=True):
            self._saved[tenant], self._elsewhere[tenant] = (float(saved), now), int(elsewhere)
