"""What one tenant may fill of a shared Redis, held by the workers: an ACL says which keys, and never how much.

Two looks. With each beat a worker cuts the streams it reads (`hold`). Every CENSUS_SECONDS one worker of a target
walks the keyspace (`census`), page by page: a tenant's key without an end gets one, a key in a tenant's reach that
`keys.py` does not spell is removed, and of a tenant above its bound the largest keys go first. How long that takes is
up to who adds keys, so it is never on the way of a beat or a lease. Knows keys and sizes, not what they hold.
"""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from typing import Final

from pilotfish.protocol import keys, metrics
from pilotfish.protocol.broker import RedisBytes, live

log = logging.getLogger("pilotfish.bounds")

JOBS_MAXLEN: Final = 4_096  # jobs that wait in one stream
JOBS_MAX_BYTES: Final = 64 << 20  # of one stream, everything counted
CENSUS_SECONDS: Final = 5.0
PAGE: Final = 500  # keys looked at, or removed, by one command

#: trim(KEYS: streams; ARGV: longest, most bytes) -> entries removed. The oldest go: theirs are the stale jobs.
TRIM: Final = """
local cut = 0
for _, stream in ipairs(KEYS) do
  local length = redis.pcall('XLEN', stream)
  if type(length) == 'number' and length > 0 then
    cut = cut + redis.call('XTRIM', stream, 'MAXLEN', ARGV[1])
    local size = redis.call('MEMORY', 'USAGE', stream, 'SAMPLES', 0)
    if size > tonumber(ARGV[2]) then
      local rest = math.floor(redis.call('XLEN', stream) * tonumber(ARGV[2]) / size)
      cut = cut + redis.call('XTRIM', stream, 'MAXLEN', rest)
    end
  end
end
return cut
"""

#: measure(KEYS: any; ARGV: longest life in ms) -> bytes of each; one without an end gets the longest there is
MEASURE: Final = """
local told = {}
for i, key in ipairs(KEYS) do
  told[i] = redis.call('MEMORY', 'USAGE', key, 'SAMPLES', 0) or 0
  if redis.call('PTTL', key) == -1 then redis.call('PEXPIRE', key, ARGV[1]) end
end
return told
"""

_NAME = r"([A-Za-z0-9_.-]{1,64})"
#: every key of a tenant as `keys.py` spells it; one group is the tenant
_OWNED = re.compile(
    f"{keys.PREFIX}:(?:[0-9a-f]{{16}}:jobs:{_NAME}:{_NAME}|(?:rep|a|out):{_NAME}:{_NAME}|(?:prompts|agents):{_NAME})"
)
#: what patterns of an ACL give to tenants (`acl.py`), and so anyone of them may have written
_IN_REACH = re.compile(f"{keys.PREFIX}:(?:.{{16}}:jobs|rep|a|out|prompts|agents):.*", re.DOTALL)


class Bounds:
    """The bounds of every tenant, as one worker holds them. `tenant_bytes` is for all keys of one tenant together."""

    def __init__(self, redis: RedisBytes, target: str, worker: str, tenant_bytes: int) -> None:
        self.redis, self.target, self.worker, self.tenant_bytes = redis, target, worker, tenant_bytes
        self._trim, self._measure = redis.register_script(TRIM), redis.register_script(MEASURE)

    async def hold(self, streams: list[str]) -> None:
        """Once a beat, over those of the streams this worker reads that tenants write."""
        streams = [stream for stream in streams if tenant_of(stream.encode())]
        if streams and (cut := int(await self._trim(keys=streams, args=[JOBS_MAXLEN, JOBS_MAX_BYTES]))):
            metrics.TRIMMED.inc(cut)
            log.warning("%d jobs were dropped unread: their tenant's stream was over its bound", cut)

    async def census_if_first(self) -> None:
        """Every CENSUS_SECONDS; one worker of the target is enough."""
        if self.worker == min(await live(self.redis, keys.workers(self.target)), default=self.worker):
            await self.census()

    async def census(self) -> None:
        """Walk the keyspace once."""
        sizes, doomed, cursor = defaultdict[str, dict[bytes, int]](dict), list[bytes](), None
        while cursor != 0:
            cursor, found = await self.redis.scan(cursor or 0, match=f"{keys.PREFIX}:*", count=PAGE)
            tenants = {key: tenant_of(key) for key in found}
            doomed += [key for key, tenant in tenants.items() if tenant is None]
            owned = [(key, tenant) for key, tenant in tenants.items() if tenant]
            told = await self._measure(keys=[key for key, _ in owned], args=[keys.JOBS_TTL_MS]) if owned else []
            for (key, tenant), size in zip(owned, told, strict=True):
                sizes[tenant][key] = size
        for tenant, of_tenant in sizes.items():
            doomed += self._too_much(tenant, of_tenant)
        for first in range(0, len(doomed), PAGE):
            metrics.EVICTED.inc(await self.redis.unlink(*doomed[first : first + PAGE]))

    def _too_much(self, tenant: str, sizes: dict[bytes, int]) -> list[bytes]:
        """Keys to remove, the largest first, until the tenant is within its bound."""
        total, doomed = sum(sizes.values()), list[bytes]()
        for key, size in sorted(sizes.items(), key=lambda entry: entry[1], reverse=True):
            if total <= self.tenant_bytes:
                break
            doomed.append(key)
            total -= size
        if doomed:
            log.warning("tenant %s is over its %d bytes: %d keys are removed", tenant, self.tenant_bytes, len(doomed))
        return doomed


def tenant_of(key: bytes) -> str | None:
    """Whose key it is: "" for nobody's, None for one that only somebody who breaks the rules can have written."""
    text = key.decode(errors="replace")
    if owned := _OWNED.fullmatch(text):
        return str(next(filter(None, owned.groups())))
    return None if _IN_REACH.fullmatch(text) else ""
