"""Who there is: the tenants a worker serves, its peers by their beats, Redis' clock, and the streams that follow.

The first layer of `ingress.py`. A tenant that breaks its own streams is set aside, so that it holds up no other. Knows
names and streams, not what lies in them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from typing import Final

from pilotfish.protocol import keys
from pilotfish.protocol.broker import RedisBytes, ensure_group
from pilotfish.protocol.delivery import Delivery
from pilotfish.protocol.errors import WrongType
from pilotfish.protocol.quota import Quota, parse

log = logging.getLogger("pilotfish.ingress")

ASIDE_SECONDS: Final = 5.0  # a tenant that breaks its own streams is not read for so long
REOPENED_MAX: Final = 3  # a stream that vanishes more often within that time was removed on purpose


class Roster:
    """Tenants, peers and streams of one target, as one worker knows them since it last asked."""

    def __init__(self, redis: RedisBytes, target: str, worker: str) -> None:
        self.redis, self.target, self.worker = redis, target, worker
        self.tenants: list[str] = []
        self.places: dict[str, int] = {}  # of a tenant among them
        self.quotas: dict[str, Quota] = {}  # of those that an operator granted one
        self._aside: dict[str, float] = {}  # tenants that are not read -> until when, on our monotonic clock
        self._opened: dict[str, list[float]] = {}  # stream -> when we had to create it, lately
        self._beats: dict[str, float] = {}  # of the peers, in Redis ms; 0 once they have left
        self._clock = (0, 0.0)  # Redis ms, our monotonic seconds at the same moment

    async def open(self) -> None:
        """Create our streams and groups; called at start, for a new tenant, and after Redis lost them."""
        await self._read_clock_and_tenants()
        await self._enlist()
        for stream in self.open_streams:
            await self._open_stream(stream)

    async def _enlist(self) -> None:
        """Stand among the workers before our streams do: who dies before its first beat must be missed by its peers."""
        pipe = self.redis.pipeline(transaction=False)
        pipe.zadd(keys.workers(self.target), {self.worker: self.now_ms()}, nx=True)
        pipe.pexpire(keys.workers(self.target), keys.JOBS_TTL_MS)
        await pipe.execute()

    async def _open_stream(self, stream: str) -> None:
        """One stream and its group. A tenant that broke its own is set aside: it must not hold up the others."""
        try:
            created = await ensure_group(self.redis, stream, keys.GROUP_WORKERS)
        except WrongType as error:
            await self.redis.unlink(stream)
            self._set_aside(stream, str(error))
            return
        now = time.monotonic()
        times = [at for at in self._opened.get(stream, ()) if now - at < ASIDE_SECONDS] + [now] * created
        self._opened[stream] = times
        if len(times) > REOPENED_MAX and len(self.tenants) > 1:
            self._set_aside(stream, f"{stream} is removed again and again")

    def _set_aside(self, stream: str, why: str) -> None:
        _, _, kind, tenant, *_ = stream.split(":")
        if kind != "jobs":
            return  # our own: no tenant can have done it
        self._aside[tenant] = time.monotonic() + ASIDE_SECONDS
        log.warning("%s: tenant %s is not served for %g s", why, tenant, ASIDE_SECONDS)

    # --- tenants and the clock -------------------------------------------------------------------------------

    async def _read_clock_and_tenants(self) -> None:
        pipe = self.redis.pipeline(transaction=False)
        pipe.time()
        pipe.smembers(keys.TENANTS)
        pipe.hgetall(keys.QUOTAS)
        (seconds, micros), tenants, quotas = await pipe.execute()
        self._clock = (seconds * 1000 + micros // 1000, time.monotonic())
        named = (tenant.decode(errors="replace") for tenant in tenants)
        self.tenants = sorted(filter(keys.NAME.fullmatch, named)) or [keys.DEFAULT_TENANT]
        self.places = {tenant: place for place, tenant in enumerate(self.tenants)}
        granted = {tenant.decode(errors="replace"): text.decode(errors="replace") for tenant, text in quotas.items()}
        self.quotas.clear()
        self.quotas.update({tenant: parse(granted[tenant]) for tenant in self.tenants if tenant in granted})

    def _read_tenants(self) -> list[str]:
        now = time.monotonic()
        return [tenant for tenant in self.tenants if self._aside.get(tenant, 0) <= now]

    def now_ms(self) -> int:
        """Redis' clock, carried on by our monotonic one since it was last read."""
        return self._clock[0] + int((time.monotonic() - self._clock[1]) * 1000)

    def age_ms(self, delivery: Delivery) -> int:
        """How long ago a job was published; negative if its id was invented ahead of Redis' clock."""
        return self.now_ms() - delivery.sent_ms

    # --- peers -----------------------------------------------------------------------------------------------

    @property
    def dead(self) -> list[str]:
        """Peers whose beat is too old, by now."""
        return [name for name, beat in self._beats.items() if beat < self._oldest_beat()]

    @property
    def is_first(self) -> bool:
        """Whether we are the one of all live workers that does what only one of them should."""
        return self.worker == min({self.worker, *self._beats}.difference(self.dead))

    def _oldest_beat(self) -> int:
        return self.now_ms() - keys.BEAT_TTL_MS

    # --- streams ---------------------------------------------------------------------------------------------

    @property
    def open_streams(self) -> list[str]:
        """The streams that we pick jobs up from."""
        return self._streams([self.worker, keys.ANY])

    def _streams(self, workers: Iterable[str], tenants: Iterable[str] | None = None) -> list[str]:
        """Of each of these: one stream a tenant (of all that are not set aside), and what peers passed on."""
        named, read = list(workers), self._read_tenants() if tenants is None else tenants
        ingress = [keys.jobs(self.target, tenant, worker) for tenant in read for worker in named]
        return ingress + [keys.forwarded(self.target, worker) for worker in named if worker != keys.ANY]

    @property
    def _passed_to_us(self) -> str:
        return keys.forwarded(self.target, self.worker)

    def is_mine(self, delivery: Delivery) -> bool:
        """Whether a peer passed this job on to us, and nobody had to take it over."""
        return delivery.stream == self._passed_to_us
