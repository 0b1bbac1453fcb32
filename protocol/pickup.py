"""How a job comes into a worker's hands: XREADGROUP over our own and the common streams of every tenant, in fair turns.

The fourth layer of `ingress.py`. With room for all, one blocking read takes what comes. With little room a script takes
exactly that many, tenant by tenant as `fair_share.py` says. No command names more than STREAMS_MAX streams: beyond
that, several reads wait at once, one for each group of tenants, so that nobody's first job waits for another group's
turn; the script looks at those known to have more, and at the others in rotation. Who is over its quota is left out.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import redis.exceptions as rx

from pilotfish.protocol import keys, quota
from pilotfish.protocol.answers import Answers
from pilotfish.protocol.broker import RedisBytes
from pilotfish.protocol.delivery import Delivery
from pilotfish.protocol.fair_share import FairShare, reserved
from pilotfish.protocol.leases import is_gone
from pilotfish.protocol.messages import ScoreJob, VerifyJob
from pilotfish.protocol.usage import Usage
from pilotfish.protocol.wire import by_name, entries

TENANTS_MAX: Final = (keys.STREAMS_MAX - 1) // 2  # of one read: two streams each, and what peers passed on
AT_ONCE: Final = 16  # jobs of one pick-up, where there are several tenants: what one has sent holds up no other
LEFT_OUT_MS: Final = 50  # a wait that leaves tenants out ends so soon

#: take(KEYS: what was passed on, if ARGV[4] is 1, then two streams a tenant; ARGV: group, consumer, how many, 1 or 0,
#: then whose turns they are, tenants counted from 1) -> entries as (stream, id, fields), 1 if a stream is gone, and
#: of the tenants asked those that may have more (negative: that have not). What the turns leave free goes round.
TAKE: Final = """
local found, dry, seen, gone, left = {}, {}, {}, 0, tonumber(ARGV[3])
local first = tonumber(ARGV[4])
local function read(stream, count)
  local got = redis.pcall('XREADGROUP', 'GROUP', ARGV[1], ARGV[2], 'COUNT', count, 'STREAMS', stream, '>')
  if not got then return 0 end
  if got.err then gone = 1 return 0 end
  for _, entry in ipairs(got[1][2]) do found[#found + 1] = {stream, entry[1], entry[2]} end
  left = left - #got[1][2]
  return #got[1][2]
end
local function turn(i)
  local at = first + 2 * i - 1
  seen[i] = true
  if read(KEYS[at], 1) == 0 and read(KEYS[at + 1], 1) == 0 then dry[i] = true end
end
if first == 1 then read(KEYS[1], left) end
for at = 5, #ARGV do
  local i = tonumber(ARGV[at])
  if left > 0 and not dry[i] then turn(i) end
end
local wet = true
while left > 0 and wet do
  wet = false
  for i = 1, (#KEYS - first) / 2 do
    if left > 0 and not dry[i] then turn(i) wet = wet or not dry[i] end
  end
end
local more = {}
for i = 1, (#KEYS - first) / 2 do
  if seen[i] and not dry[i] then more[#more + 1] = i elseif dry[i] then more[#more + 1] = -i end
end
return {found, gone, more}
"""


class PickUp(Answers):
    """New jobs for one worker, and what each tenant has had of it."""

    def __init__(self, redis: RedisBytes, target: str, worker: str) -> None:
        super().__init__(redis, target, worker)
        self.usage = Usage(redis, target, worker, self.quotas)
        self.shares = FairShare(lambda tenant: self.usage.quota(tenant).weight)
        self.busy: set[str] = set()  # tenants that had more than we took
        self._readers: dict[int, asyncio.Task[list[Delivery]]] = {}  # by group of tenants
        self._take = redis.register_script(TAKE)
        self._turn = 0  # where the rotation through tenants that are not known to wait goes on

    async def pick_up(self, count: int, block_ms: int, *, passed_on: bool = True) -> list[Delivery]:
        """Up to about `count` new jobs; waits up to `block_ms` for the first. They are leased to us.

        A worker that has enough to do (not `passed_on`) leaves what was passed on to it for others to take.
        """
        if found := self._found():
            return found
        tenants, count = self._with_room(count)
        if len(self.tenants) > 1:
            count = min(count, AT_ONCE)
        if len(tenants) < len(self.tenants):
            block_ms = min(block_ms, LEFT_OUT_MS)
        if not tenants and not passed_on:
            await asyncio.sleep(block_ms / 1000)
            return []
        idle = [tenant for tenant in tenants if self._group_of(tenant) not in self._readers]
        if count < 2 * len(idle) and (found := await self._take_fairly(idle, count, passed_on)):
            return found
        return await self._wait(tenants, count, block_ms, passed_on)

    def hang_up(self) -> list[asyncio.Task[list[Delivery]]]:
        """Read nothing more. What was read and not handed out yet is released: leases bring it to a peer."""
        ending = list(self._readers.values())
        self._readers.clear()
        for task in ending:
            task.cancel()
            task.add_done_callback(self._drop)
        return ending

    def _drop(self, task: asyncio.Task[list[Delivery]]) -> None:
        if not task.cancelled() and not task.exception():
            for delivery in task.result():
                self.release(delivery)

    @contextmanager
    def under_way(self, tenant: str, job: VerifyJob | ScoreJob) -> Iterator[None]:
        """A job of this tenant runs here for the block: it counts against its share and its quota."""
        rows, tokens = quota.rows(job), quota.tokens(job)
        self.shares.charge(tenant, rows)
        self.usage.begin(tenant, rows, tokens)
        try:
            yield
        finally:
            self.usage.end(tenant, tokens)

    async def settle(self) -> None:
        """Tell Redis what tenants with a quota have used here, and learn what they have left."""
        await self.usage.settle(self._oldest_beat())

    # --- whom to ask -----------------------------------------------------------------------------------------

    def _with_room(self, count: int) -> tuple[list[str], int]:
        """Tenants within their quota to take more jobs from, and how many; the last places are for those without any.

        So one tenant may fill a worker as long as nobody else asks, and never keeps the others out.
        """
        tenants = [tenant for tenant in self._read_tenants() if not self.usage.over(tenant)]
        holding = {delivery.tenant for delivery in self.held.values()}
        others = sum(tenant not in holding for tenant in tenants)
        kept = reserved(len(self.held) + count, others)
        if count > kept:
            return tenants, count - kept
        return [tenant for tenant in tenants if tenant not in holding], count

    def _group_of(self, tenant: str) -> int:
        """Tenants of one group are read together; one that was revoked while we asked is in the first."""
        return self.places.get(tenant, 0) // TENANTS_MAX

    # --- little room: exactly so many, in fair turns -----------------------------------------------------------

    async def _take_fairly(self, tenants: list[str], count: int, passed_on: bool) -> list[Delivery]:
        """Those known to wait in the order of their counters, beside others in rotation, until something is found."""
        waiting = self.shares.order(self.busy.intersection(tenants))[: TENANTS_MAX // 2]
        others = [tenant for tenant in tenants if tenant not in waiting]
        start = self._turn % max(1, len(others))
        others = others[start:] + others[:start]
        while True:
            beside = TENANTS_MAX - len(waiting)
            asked, others, waiting = [*waiting, *others[:beside]], others[beside:], []
            self._turn += beside
            if (found := await self._take_some(asked, count, passed_on)) or not others:
                return found

    async def _take_some(self, tenants: list[str], count: int, passed_on: bool) -> list[Delivery]:
        active = {delivery.tenant for delivery in self.held.values()} | self.busy
        for tenant in tenants:
            if tenant not in active:
                self.shares.lift(tenant, active)
        ordered = self.shares.order(tenants)
        places = {tenant: place for place, tenant in enumerate(ordered, 1)}
        streams = [self._passed_to_us] * passed_on
        streams += [keys.jobs(self.target, tenant, worker) for tenant in ordered for worker in (self.worker, keys.ANY)]
        turns = (places[tenant] for tenant in self.shares.turns(ordered, count))
        found, gone, more = await self._run(
            self._take, streams, (keys.GROUP_WORKERS, self.worker, count, int(passed_on), *turns)
        )
        for place in more:
            (self.busy.add if place > 0 else self.busy.discard)(ordered[abs(place) - 1])
        taken = [self._hold(stream.decode(), entry_id, by_name(fields)) for stream, entry_id, fields in found]
        if gone:
            await self._reopen(taken)
        return taken

    async def _reopen(self, taken: list[Delivery]) -> None:
        """Redis restarted empty, peers thought us dead, or a tenant broke its own."""
        try:
            await self.open()
        except BaseException:
            for delivery in taken:
                self.release(delivery)  # nobody will begin them
            raise

    # --- room for all: what comes ------------------------------------------------------------------------------

    async def _wait(self, tenants: list[str], count: int, block_ms: int, passed_on: bool) -> list[Delivery]:
        """One read, or where the streams are too many for one, as many as it takes; the first to find something."""
        metered = any(self.usage.quota(tenant).limited for tenant in tenants)  # one by one, or they would run up debts
        share = 1 if metered else max(1, count // (2 * len(tenants) + 1))
        if len(self.tenants) <= TENANTS_MAX and not self._readers:
            return await self._read(tenants, share, block_ms, passed_on)
        groups: dict[int, list[str]] = {0: []} if passed_on else {}
        for tenant in tenants:
            groups.setdefault(self._group_of(tenant), []).append(tenant)
        for group, members in groups.items():
            if group not in self._readers:
                read = self._read(members, share, keys.BLOCK_MS, passed_on and group == 0)
                self._readers[group] = asyncio.create_task(read)
        await asyncio.wait(self._readers.values(), timeout=block_ms / 1000, return_when=asyncio.FIRST_COMPLETED)
        return self._found()

    def _found(self) -> list[Delivery]:
        """What reads that went on waiting have brought. Raises what they raise, unless others found something."""
        found: list[Delivery] = []
        errors: list[BaseException] = []
        for group in [group for group, task in self._readers.items() if task.done()]:
            task = self._readers.pop(group)
            if error := task.exception():
                errors.append(error)
            else:
                found += task.result()
        if errors and not found:
            raise errors[0]
        return found

    async def _read(self, tenants: list[str], share: int, block_ms: int, passed_on: bool) -> list[Delivery]:
        """XREADGROUP, one round trip; COUNT is per stream."""
        streams = [keys.jobs(self.target, tenant, worker) for tenant in tenants for worker in (self.worker, keys.ANY)]
        streams += [self._passed_to_us] * passed_on
        options = ("COUNT", share, "BLOCK", block_ms, "STREAMS", *streams, *(">" for _ in streams))
        try:
            got = entries(await self._wire.call("XREADGROUP", "GROUP", keys.GROUP_WORKERS, self.worker, *options))
        except rx.ResponseError as error:
            if not is_gone(error):
                raise
            await self.open()
            return []
        taken = [self._hold(stream.decode(), *entry) for stream, found in got for entry in found]
        self.busy.difference_update(tenants if not taken else {delivery.tenant for delivery in taken})
        full = {stream.decode() for stream, found in got if len(found) >= share}
        self.busy.update(delivery.tenant for delivery in taken if delivery.stream in full)
        return taken
