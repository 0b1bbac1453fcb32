"""The worker's side of the broker: five layers, one class.

    roster.py    who there is: tenants, peers, Redis' clock, streams
    leases.py    what is held: renewed, taken over from those that stalled, read for the dead
    answers.py   how a job leaves: reply and acknowledgement in one script, or on to a peer
    pickup.py    how it comes: XREADGROUP over our own and the common streams of every tenant, in fair turns
    ingress.py   the beat, which keeps all of it alive

`delivery.py` is one job of it, `broker.py` the other side. Knows streams; nothing of what a job means.
"""

from __future__ import annotations

from pilotfish.protocol import keys
from pilotfish.protocol.broker import RedisBytes
from pilotfish.protocol.pickup import PickUp


class Ingress(PickUp):
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
        self.shares.keep(self.tenants)
        return bool(renewed)

    async def leave(self) -> None:
        """We pick nothing up any more: peers may read what lies in our own streams at once."""
        pipe = self.redis.pipeline(transaction=False)
        pipe.delete(keys.beat(self.target, self.worker))
        pipe.zadd(keys.workers(self.target), {self.worker: 0})
        pipe.pexpire(keys.workers(self.target), keys.JOBS_TTL_MS)
        await pipe.execute()
