"""arq's Worker with its hot path on Redis Streams: pick-up, sweep, beat, shedding, drain, reconnect.

arq keeps what it is good at: the function registry, ctx, start-up and shutdown, time-outs, cron, signals, and its zset
for deferred and admin jobs, which goes on working on the same worker with msgpack instead of pickle. Jobs arrive on
streams (`protocol/ingress.py`), become tasks in `job_tasks.py` and are answered by `verify.py`. Knows how to keep a
worker alive; not what a job means, nor how a worker is put together (`worker_process.py`).
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Awaitable, Callable
from typing import Any

import redis.exceptions as rx
import stamina

from pilotfish.cloud_worker.job_tasks import JobTasks
from pilotfish.cloud_worker.routing import Router
from pilotfish.protocol import keys
from pilotfish.protocol.bounds import CENSUS_SECONDS, Bounds
from pilotfish.protocol.broker import PAUSE_MAX_SECONDS, PAUSE_SECONDS
from pilotfish.protocol.errors import BrokerError
from pilotfish.protocol.ingress import Ingress
from pilotfish.protocol.shedding import Shedding
from pilotfish.protocol.tasks import end_tasks

log = logging.getLogger("pilotfish.worker")

DRAIN_SECONDS = 20
TENANT_BYTES = 256 << 20  # of Redis, for all keys of one tenant
PICKS = 4  # at once, by a worker that may soon have enough in hand
BACKLOG_MS = 20  # a worker with enough prefill in hand looks again so soon
STOCK_EVERY_SECONDS = 1.0  # arq's own zset: cron, deferred and admin jobs


class StreamWorker(JobTasks):
    """An arq Worker whose jobs come from `Ingress`; `functions` are named after message types ("verify", "cancel")."""

    def __init__(
        self, functions: Any, *, ingress: Ingress, describe: Callable[[], dict[str, str]],
        announce: Callable[[], Awaitable[None]], router: Router | None = None, bounds: Bounds | None = None,
        **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(
            functions, ingress=ingress, poll_delay=0, handle_signals=True, job_completion_wait=DRAIN_SECONDS,
            log_results=False, **kwargs,
        )  # fmt: skip
        self.describe, self.announce, self.router = describe, announce, router
        self.beat_at = 0.0  # on the loop's clock
        self.bounds = bounds or Bounds(ingress.redis, ingress.target, ingress.worker, TENANT_BYTES)
        self.shedding = Shedding(ingress)
        self._sweeper: asyncio.Task[None] | None = None
        self._shedder: asyncio.Task[None] | None = None
        self._counter: asyncio.Task[None] | None = None
        self._picking: asyncio.Task[None] | None = None

    # --- arq's loop calls this over and over -----------------------------------------------------------------

    async def _poll_iteration(self) -> None:
        """Pick up what is there, or wait for it. A lost Redis is waited out, not died of."""
        if self._sweeper is None:
            self._sweeper = asyncio.create_task(self._sweep_for_ever())
            self._shedder = asyncio.create_task(self._shed_for_ever())
            self._counter = asyncio.create_task(self._count_for_ever())
        for task in (self._sweeper, self._shedder, self._counter):
            if task and task.done():
                task.result()  # without a sweep every lease would run out in silence
        if self.credit:
            await self._wait_for_jobs()
        else:
            await self._wait_for_room()

    async def _wait_for_room(self) -> None:
        """Until a job ends. A worker that drains ends with its last one."""
        running = [task for task in self.tasks.values() if not task.done()]
        if running:
            await asyncio.wait(running, timeout=keys.SWEEP_MS / 1000, return_when=asyncio.FIRST_COMPLETED)
        elif self.allow_pick_jobs:
            await asyncio.sleep(PAUSE_SECONDS)  # arq counts a job of its own queue before it has a task
        else:
            raise asyncio.CancelledError("drained")

    async def _wait_for_jobs(self) -> None:
        """Pick-ups in a task of their own, so that a drain can call them off; one task for many, for speed."""
        self._picking = asyncio.create_task(self._pick_up_while_there_is_room())
        try:
            await asyncio.wait({self._picking})
        finally:
            self._picking.cancel()
        if not self._picking.cancelled():
            self._picking.result()

    async def _pick_up_while_there_is_room(self) -> None:
        while self.credit and self._sweeper and not self._sweeper.done():
            await self._through(self._pick_up)

    async def _pick_up(self) -> None:
        more = self.router is None or self.router.takes_more
        count, wait_ms = self.credit, keys.BLOCK_MS if more else BACKLOG_MS
        if self.router:
            count = min(count, PICKS)
        for delivery in await self.ingress.pick_up(count, wait_ms, passed_on=more):
            self.begin(delivery)
        await asyncio.sleep(0)  # the jobs begin first, then the next pick-up is sent

    async def _sweep_for_ever(self) -> None:
        """Leases every SWEEP_MS, the beat every BEAT_EVERY_MS, arq's own queue every second."""
        loop = asyncio.get_running_loop()
        beat = stock = 0.0
        while True:
            if loop.time() >= beat:
                beat = loop.time() + keys.BEAT_EVERY_MS / 1000
                await self._through(self._beat)
            if loop.time() >= stock:
                stock = loop.time() + STOCK_EVERY_SECONDS
                await self._through(super()._poll_iteration)
            await self._through(self._sweep)
            await asyncio.sleep(keys.SWEEP_MS / 1000)

    async def _shed_for_ever(self) -> None:
        """Beside the sweep: refusals take their time, leases do not."""
        while True:
            if self.allow_pick_jobs:
                await self._through(self._shed)
            await asyncio.sleep(keys.SWEEP_MS / 1000)

    async def _count_for_ever(self) -> None:
        """Beside the sweep too: who adds many keys must not keep us from renewing leases."""
        while True:
            await self._through(self.bounds.census_if_first)
            await asyncio.sleep(CENSUS_SECONDS)

    async def _shed(self) -> None:
        await self.shedding.shed(full=not self.credit)

    async def _sweep(self) -> None:
        await self.ingress.settle()
        for delivery in await self.ingress.sweep(self.credit):
            self.begin(delivery)
        if self.router and self.allow_pick_jobs and not self.job_counter:
            for delivery in await self.ingress.steal(1):
                self.begin(delivery)

    async def _beat(self) -> None:
        serving = self.allow_pick_jobs
        state = {"state": "serving" if serving else "draining", "credit": str(self.credit)}
        served = set(self.ingress.tenants)
        if not await self.ingress.beat({**self.describe(), **state}, serving=serving):
            await self.announce()
        if served - set(self.ingress.tenants):
            await self.ctx["verification"].keep(self.ingress.tenants)
        await self.bounds.hold(self.ingress.open_streams)
        if self.router:
            await self.router.beat(serving=serving)
        self.beat_at = self.loop.time()

    async def _through(self, step: Callable[[], Awaitable[None]]) -> None:
        """Run one step; if Redis is away, wait with growing pauses until it is back, then open our streams again."""
        try:
            await step()
            return
        except (rx.RedisError, BrokerError) as error:
            log.warning("Redis is away or unwell (%s): waiting for it", error)
        await asyncio.sleep(PAUSE_SECONDS)  # no hot loop, should Redis open our streams and refuse the step
        pauses = {"wait_initial": PAUSE_SECONDS, "wait_max": PAUSE_MAX_SECONDS}
        async for attempt in stamina.retry_context((rx.RedisError, BrokerError), attempts=None, timeout=None, **pauses):
            with attempt:
                await self.ingress.open()
        log.warning("Redis is back")

    # --- the end ---------------------------------------------------------------------------------------------

    def handle_sig_wait_for_completion(self, signum: signal.Signals) -> None:
        """Drain: what runs is answered, nothing more is taken, and with the next beat peers read our own streams."""
        super().handle_sig_wait_for_completion(signum)
        if self._picking:
            self._picking.cancel()
        self.ingress.hang_up()

    async def close(self) -> None:
        """End what still runs (leases bring it to a peer), hand over our own streams, free the connections.

        Replaces arq's, which would not survive a Redis that is away.
        """
        self.allow_pick_jobs = False
        loops = (self._sweeper, self._shedder, self._counter, self._picking)
        await end_tasks([*filter(None, loops), *self.ingress.hang_up(), *self.tasks.values()])
        if self.router:
            await self.router.feed.stop()
        try:
            await self.ingress.leave()
            await self.pool.delete(self.health_check_key)
        except rx.RedisError as error:
            log.warning("left without saying so, Redis is away: %s", error)
        if self.on_shutdown:
            await self.on_shutdown(self.ctx)
        await self.pool.aclose(close_connection_pool=True)
