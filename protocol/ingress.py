"""The worker's side of the broker: the beat that says it lives, and the pick-up of new jobs. Four layers, one class.

    roster.py    who there is: tenants, peers, Redis' clock, streams
    leases.py    what is held: renewed, taken over from those that stalled, read for the dead
    answers.py   how a job leaves: reply and acknowledgement in one script, or on to a peer
    ingress.py   how it comes: XREADGROUP over our own and the common streams of every tenant

`delivery.py` is one job of it, `broker.py` the other side. Knows streams; nothing of what a job means.
"""

from __future__ import annotations

import asyncio
from typing import Final

import redis.exceptions as rx

from pilotfish.protocol import keys
from pilotfish.protocol.answers import Answers
from pilotfish.protocol.broker import RedisBytes
from pilotfish.protocol.delivery import Delivery
from pilotfish.protocol.leases import is_gone
from pilotfish.protocol.wire import entries

LEFT_OUT_MS: Final = 50  # a wait that leaves tenants out ends so soon


class Ingress(Answers):
    """The job streams of one target as one worker sees them."""

    def __init__(self, redis: RedisBytes, target: str, worker: str) -> None:
        super().__init__(redis, target, worker)
        self.waiting = 0  # jobs passed on to us that are not in our hands, as of the last beat

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

    # --- picking up ------------------------------------------------------------------------------------------

    async def pick_up(self, count: int, block_ms: int, *, passed_on: bool = True) -> list[Delivery]:
        """New jobs from our own streams and from `any`: XREADGROUP, one round trip. They are leased to us.

        COUNT is per stream, so a worker with little room asks each for its share (one at least). One that has enough
        to do leaves what was passed on to it for others to take.
        """
        tenants = self._with_room(count)
        streams = self._streams([self.worker, keys.ANY], tenants)
        if not passed_on:
            streams.remove(self._passed_to_us)
        if len(tenants) < len(self.tenants):
            block_ms = min(block_ms, LEFT_OUT_MS)
        if not streams:
            await asyncio.sleep(block_ms / 1000)
            return []
        share = max(1, count // max(1, len(streams)))
        try:
            options = ("COUNT", share, "BLOCK", block_ms, "STREAMS", *streams, *(">" for _ in streams))
            got = entries(await self._wire.call("XREADGROUP", "GROUP", keys.GROUP_WORKERS, self.worker, *options))
        except rx.ResponseError as error:
            if not is_gone(error):
                raise
            await self.open()  # Redis restarted empty, peers thought us dead, or a tenant broke its own
            return []
        return [self._hold(stream.decode(), *entry) for stream, found in got for entry in found]

    def _with_room(self, count: int) -> list[str]:
        """Tenants to take `count` more jobs from: the last places are for those of whom we hold none.

        So one tenant may fill a worker as long as nobody else asks, and never keeps the others out.
        """
        tenants = self._read_tenants()
        holding = {delivery.tenant for delivery in self.held.values()}
        waiting = sum(tenant not in holding for tenant in tenants)
        enough = not waiting or count > waiting + 1  # a tenant has two streams, and gives one job of each at least
        return [tenant for tenant in tenants if enough or tenant not in holding]
