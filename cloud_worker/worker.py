"""arq's Worker with its hot path on Redis Streams: start-up, pick-up, sweep, beat, drain, reconnect.

arq keeps what it is good at: the function registry, ctx, start-up and shutdown, time-outs, cron, signals, and its zset
for deferred and admin jobs, which goes on working on the same worker with msgpack instead of pickle. Jobs arrive on
streams (`protocol/ingress.py`) and are answered by `verify.py`. Knows how to keep a worker alive; not what a job means.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import signal
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any

import msgpack
import redis.exceptions as rx
import stamina
from arq.connections import ArqRedis
from arq.worker import Worker, func
from redis.asyncio import ConnectionPool

from pilotfish.cache.prefix_index import PrefixIndex
from pilotfish.cloud_worker.block_feed import BlockFeed
from pilotfish.cloud_worker.engine_process import EngineProcess
from pilotfish.cloud_worker.engines.spec import EngineSpec
from pilotfish.cloud_worker.operations import HttpSpec, served
from pilotfish.cloud_worker.routing import PassedOn, Router, Routing, Session
from pilotfish.cloud_worker.salts import Salts
from pilotfish.cloud_worker.verify import AHEAD_MS, Ticket, Verification
from pilotfish.protocol import fleet, keys, metrics, tracing
from pilotfish.protocol.bounds import Bounds
from pilotfish.protocol.broker import (
    CONNECT_SECONDS,
    PAUSE_MAX_SECONDS,
    PAUSE_SECONDS,
    SOCKET_SECONDS,
    end_tasks,
    ping,
    readable,
)
from pilotfish.protocol.codec import decode
from pilotfish.protocol.delivery import Delivery
from pilotfish.protocol.errors import BrokerError, InvalidMessage, SettingsError
from pilotfish.protocol.ingress import Ingress
from pilotfish.protocol.messages import Cancel, Close, Message, Refusal, RefusalCode, ScoreJob, ToWorker, VerifyJob
from pilotfish.protocol.shedding import Shedding

log = logging.getLogger("pilotfish.worker")

JOB_SECONDS = 600
DRAIN_SECONDS = 20
TENANT_BYTES = 256 << 20  # of Redis, for all keys of one tenant
PICKS = 4  # at once, by a worker that may soon have enough in hand
BACKLOG_MS = 20  # a worker with enough prefill in hand looks again so soon
STOCK_EVERY_SECONDS = 1.0  # arq's own zset: cron, deferred and admin jobs


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """One worker process: where Redis is, what it serves, how many jobs it takes at once."""

    redis_url: str
    engine: EngineSpec
    name: str = ""
    model_name: str = ""
    max_jobs: int = 64
    routing: Routing = "prefix"
    cache_key: str = ""
    tenant_bytes: int = TENANT_BYTES
    http: HttpSpec | None = None  # where metrics, health, ready and drain are served; None: nowhere


class StreamWorker(Worker):
    """An arq Worker whose jobs come from `Ingress`; `functions` are named after message types ("verify", "cancel")."""

    def __init__(
        self, functions: Any, *, ingress: Ingress, describe: Callable[[], dict[str, str]],
        announce: Callable[[], Awaitable[None]], router: Router | None = None, bounds: Bounds | None = None,
        **kwargs: Any,
    ) -> None:  # fmt: skip
        _refuse_pickle(kwargs)
        super().__init__(
            functions, poll_delay=0, handle_signals=True, job_completion_wait=DRAIN_SECONDS, log_results=False,
            queue_name=f"arq:{keys.PREFIX}:{ingress.target}", **kwargs,
        )  # fmt: skip
        self.ingress, self.describe, self.announce, self.router = ingress, describe, announce, router
        self.beat_at = 0.0  # on the loop's clock
        self.bounds = bounds or Bounds(ingress.redis, ingress.target, ingress.worker, TENANT_BYTES)
        self.shedding = Shedding(ingress)
        self._sweeper: asyncio.Task[None] | None = None
        self._shedder: asyncio.Task[None] | None = None
        self._picking: asyncio.Task[None] | None = None

    @property
    def credit(self) -> int:
        """Jobs this worker would take now."""
        return max(0, self.max_jobs - self.job_counter) if self.allow_pick_jobs else 0

    def credit_of(self, tenant: str) -> int:
        """Jobs it would take now from this tenant."""
        return 0 if self.ingress.usage.over(tenant) else self.credit

    # --- arq's loop calls this over and over -----------------------------------------------------------------

    async def _poll_iteration(self) -> None:
        """Pick up what is there, or wait for it. A lost Redis is waited out, not died of."""
        if self._sweeper is None:
            self._sweeper = asyncio.create_task(self._sweep_for_ever())
            self._shedder = asyncio.create_task(self._shed_for_ever())
        for task in (self._sweeper, self._shedder):
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

    # --- one job ---------------------------------------------------------------------------------------------

    def begin(self, delivery: Delivery) -> None:
        """Run one delivery as a task of arq's, so that time-outs, drain and counters see it."""
        name = f"{delivery.stream} {delivery.entry_id}"
        self.job_counter += 1
        metrics.RUNNING.set(self.job_counter)
        task = self.loop.create_task(self._run(delivery))
        self.tasks[name] = task
        task.add_done_callback(lambda _: self._ended(name))

    def _ended(self, name: str) -> None:
        self.job_counter -= 1
        metrics.RUNNING.set(self.job_counter)
        self.tasks.pop(name, None)

    async def _run(self, delivery: Delivery) -> None:
        """Every job gets a reply; one whose reply cannot be sent keeps its lease until it runs out."""
        try:
            await self._answer(delivery)
        except asyncio.CancelledError:
            self.ingress.release(delivery)
            raise
        except (rx.RedisError, BrokerError) as error:
            self.jobs_retried += 1
            self.ingress.release(delivery)
            log.warning("a reply could not be sent (%s): the job will be delivered again", error)
        except Exception:
            self.jobs_failed += 1
            self.ingress.release(delivery)  # or its lease would be renewed for ever
            log.exception("a job could not be answered: it will be delivered again")

    async def _answer(self, delivery: Delivery) -> None:
        invented = self.ingress.age_ms(delivery) < -AHEAD_MS
        await self._decode_and_answer(delivery)
        if invented:
            await self.ingress.start_over(delivery.stream)

    async def _decode_and_answer(self, delivery: Delivery) -> None:
        try:
            message: ToWorker = decode(delivery.payload, ToWorker)
        except InvalidMessage as error:
            await self._refuse(delivery, None, "invalid_message", str(error), dead=True)
            return
        delivery = replace(delivery, agent=delivery.agent or message.agent)
        if delivery.deliveries > keys.DELIVERIES_MAX:
            sentence = f"given up after {keys.DELIVERIES_MAX} deliveries"
            await self._refuse(delivery, message, "dead_letter", sentence, dead=True)
            return
        await self._call(delivery, message)

    async def _call(self, delivery: Delivery, message: ToWorker) -> None:
        function = self.functions[message.type]
        seconds = function.timeout_s or self.job_timeout_s
        try:
            async with asyncio.timeout(seconds):
                await function.coroutine({**self.ctx, "worker": self, "delivery": delivery}, message)
            self.jobs_complete += 1
        except (rx.RedisError, BrokerError):
            raise
        except TimeoutError:
            await self._refuse(delivery, message, "engine_failed", f"no answer within {seconds:g} s")
        except Exception as error:
            log.exception("a %s job raised", message.type)
            await self._refuse(delivery, message, "engine_failed", f"{type(error).__name__}: {error}")

    async def _refuse(
        self,
        delivery: Delivery,
        message: ToWorker | None,
        code: RefusalCode,
        sentence: str,
        *,
        dead: bool = False,
    ) -> None:
        self.jobs_failed += 1
        about: dict[str, Any] = {}
        if isinstance(message, VerifyJob | ScoreJob):
            about = {name: getattr(message, name) for name in ("boot", "session", "epoch", "round")}
        refusal = Refusal(
            code=code,
            sentence=sentence[:500],
            worker=self.ingress.worker,
            credit=self.credit_of(delivery.tenant),
            **about,
        )
        await self.ingress.reply(delivery, refusal, dead=code if dead else "")

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
        ending = (self._sweeper, self._shedder, self._picking, *self.ingress.hang_up(), *self.tasks.values())
        await end_tasks(task for task in ending if task)
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


def _refuse_pickle(kwargs: dict[str, Any]) -> None:
    """arq's default serializer is pickle: whoever can write to Redis could run code here."""
    pool = kwargs.get("redis_pool")
    for owner in (kwargs, vars(pool)) if pool is not None else (kwargs,):
        if not (owner.get("job_serializer") and owner.get("job_deserializer")):
            raise SettingsError("without job_serializer and job_deserializer a worker unpickles jobs: pass msgpack's")


# --- functions arq knows by name ---------------------------------------------------------------------------------


async def verify(ctx: dict[str, Any], job: VerifyJob | ScoreJob) -> None:
    """One verify or score job: replies or a refusal, the last one in the transaction that acknowledges it."""
    delivery: Delivery = ctx["delivery"]
    ingress: Ingress = ctx["worker"].ingress
    # an entry's id is unique within its stream only, and the engine knows requests of every stream
    request_id = f"{delivery.stream} {delivery.entry_id}/{delivery.deliveries}"
    age_ms, router = ingress.age_ms(delivery), ctx["worker"].router
    try:
        start = await router.place(delivery, job) if router and age_ms >= -AHEAD_MS else None
    except PassedOn:
        return
    ticket = Ticket(delivery.tenant, job, age_ms, request_id, start)

    outcome = "none"

    async def answer(message: Message, last: bool) -> None:
        nonlocal outcome
        outcome = getattr(message, "code", "verdict")
        await ingress.reply(delivery, message, last=last)

    trace = job.trace if isinstance(job, VerifyJob) else ""
    tracing.past("queue", trace, max(0, ticket.age_ms), deliveries=delivery.deliveries)
    span = tracing.Span("verify", trace, worker=ingress.worker, draft=len(job.draft))
    try:
        with ingress.under_way(delivery.tenant, job):
            await ctx["verification"].handle(replace(ticket, trace=span.context), answer)
    finally:
        span.end(outcome=outcome)
        if start:
            start.close()


async def cancel(ctx: dict[str, Any], message: Cancel | Close) -> None:
    """Stop what runs for a session (cancel), and forget it (close); acknowledged without a reply."""
    delivery: Delivery = ctx["delivery"]
    if router := ctx["worker"].router:
        try:
            await router.follow(delivery, message)
        except PassedOn:
            return
    closing = isinstance(message, Close)
    await ctx["verification"].cancel(delivery.tenant, message.agent, message.session, close=closing)
    await ctx["worker"].ingress.reply(delivery, None)


FUNCTIONS = (
    func(verify, name="verify", max_tries=1),
    func(verify, name="score", max_tries=1),
    func(cancel, name="cancel", max_tries=1),
    func(cancel, name="close", max_tries=1),
)


# --- a worker process --------------------------------------------------------------------------------------------


def arq_pool(url: str, queue_name: str) -> ArqRedis:
    """arq's client: msgpack on both sides, explicit time-outs. Raises BrokerUnreachable for a URL that is none."""
    with readable(url):
        pool = ConnectionPool.from_url(url, socket_connect_timeout=CONNECT_SECONDS, socket_timeout=SOCKET_SECONDS)
    return ArqRedis(
        connection_pool=pool, default_queue_name=queue_name, job_serializer=msgpack.packb, job_deserializer=unpack_job
    )


def unpack_job(data: bytes) -> Any:
    """arq's own jobs and results: maps with keys of any kind."""
    return msgpack.unpackb(data, raw=False, strict_map_key=False)


async def run(spec: WorkerSpec, ready: Callable[[fleet.Target, EngineProcess], None] | None = None) -> None:
    """Open the engine, announce the target, serve until SIGTERM or SIGINT. Raises what start-up raises."""
    if spec.name and (not keys.NAME.fullmatch(spec.name) or spec.name == keys.ANY):
        raise SettingsError(
            f"{spec.name!r} cannot name a worker: take letters, digits, _ . - (64 at most), and not {keys.ANY!r}"
        )
    pool = arq_pool(spec.redis_url, f"arq:{keys.PREFIX}")
    engine = EngineProcess(spec.engine)
    try:
        await ping(pool, spec.redis_url)
        await engine.start()
        await _serve(spec, pool, engine, ready)
    finally:
        await engine.stop()
        await pool.aclose(close_connection_pool=True)


async def _serve(
    spec: WorkerSpec, pool: ArqRedis, engine: EngineProcess, ready: Callable[[fleet.Target, EngineProcess], None] | None
) -> None:
    info = engine.info
    shown = spec.model_name or info.model
    target = fleet.Target(fleet.target_id(info.fingerprint), shown, info.context, info.draft_max, engine.vocabulary)
    name = spec.name or f"{info.engine}-{secrets.token_hex(3)}"
    ingress = Ingress(pool, target.id, name)
    salts = Salts(pool, spec.cache_key.encode())
    await salts.agree()
    router = _router(spec, ingress, engine, salts, lambda session: verification.knows(session))
    worker = StreamWorker(
        FUNCTIONS, ingress=ingress, describe=lambda: _describe(worker, engine), redis_pool=pool, max_jobs=spec.max_jobs,
        router=router, announce=lambda: fleet.announce(pool, target), job_timeout=JOB_SECONDS,
        bounds=Bounds(pool, target.id, name, spec.tenant_bytes),
        job_serializer=msgpack.packb, job_deserializer=unpack_job,
    )  # fmt: skip
    verification = Verification(engine, name, worker.credit_of, salts.of)
    worker.ctx["verification"] = verification

    async def open_and_beat(ctx: dict[Any, Any]) -> None:
        await worker.announce()
        await ingress.open()
        await ingress.beat({"state": "serving"})
        if router:
            await router.feed.start()
        if ready:
            ready(target, engine)

    worker.on_startup = open_and_beat
    logging.getLogger("arq.worker").setLevel(logging.WARNING)  # its INFO holds the arguments of every job
    try:
        async with served(spec.http, worker, engine):
            await worker.async_run()
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task and task.cancelling():
            raise  # not a signal: whoever called us wants out
        log.info("drained")
    finally:
        await worker.close()


def _router(
    spec: WorkerSpec, ingress: Ingress, engine: EngineProcess, salts: Salts, knows: Callable[[Session], bool]
) -> Router | None:
    """None for an engine without a prefix cache, and where it is switched off: first come, first served."""
    info = engine.info
    if spec.routing == "off" or not info.kv_blocks:
        return None
    feed = BlockFeed(PrefixIndex(ingress.redis, ingress.target), ingress.worker, info.kv_blocks)
    engine.on_kv = feed.heard
    return Router(ingress, feed, info.block_size, salts, knows, spec.routing)


def _describe(worker: StreamWorker, engine: EngineProcess) -> dict[str, str]:
    """The beat, for people: plain text."""
    counts = worker.ctx["verification"].counts
    return {
        "engine": f"{engine.info.engine} {engine.info.version}",
        "model": engine.info.model,
        "running": str(worker.job_counter),
        "restarts": str(engine.restarts),
        **{name: str(value) for name, value in counts.items()},
        **(worker.router.describe() if worker.router else {}),
    }
