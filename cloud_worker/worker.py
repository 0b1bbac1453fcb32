"""arq's Worker with its hot path on Redis Streams: start-up, pick-up, sweep, beat, drain, reconnect.

arq keeps what it is good at: the function registry, ctx, start-up and shutdown, time-outs, cron, signals, and its zset
for deferred and admin jobs, which goes on working on the same worker with msgpack instead of pickle. Jobs arrive on
streams (`protocol/ingress.py`) and are answered by `verify.py`. Knows how to keep a worker alive; not what a job means.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any

import msgpack
import redis.exceptions as rx
from arq.connections import ArqRedis
from arq.worker import Worker, func
from redis.asyncio import ConnectionPool

from pilotfish.cloud_worker.engine_process import EngineProcess, EngineSpec
from pilotfish.cloud_worker.verify import Ticket, Verification
from pilotfish.protocol import fleet, keys
from pilotfish.protocol.broker import CONNECT_SECONDS, SOCKET_SECONDS, ping
from pilotfish.protocol.codec import decode
from pilotfish.protocol.errors import InvalidMessage, SettingsError
from pilotfish.protocol.ingress import Delivery, Ingress
from pilotfish.protocol.messages import Message, Refusal, ToWorker, VerifyJob

log = logging.getLogger("pilotfish.worker")

JOB_SECONDS = 600
DRAIN_SECONDS = 20
STOCK_EVERY_SECONDS = 1.0  # arq's own zset: cron, deferred and admin jobs


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """One worker process: where Redis is, what it serves, how many jobs it takes at once."""

    redis_url: str
    engine: EngineSpec
    name: str = ""
    model_name: str = ""
    max_jobs: int = 64


class StreamWorker(Worker):
    """An arq Worker whose jobs come from `Ingress`. `functions` are named after message types ("verify", "cancel", ...)."""

    def __init__(
        self, functions: Any, *, ingress: Ingress, describe: Callable[[], dict[str, str]],
        announce: Callable[[], Awaitable[None]], **kwargs: Any,
    ) -> None:  # fmt: skip
        _refuse_pickle(kwargs)
        super().__init__(
            functions, poll_delay=0, handle_signals=True, job_completion_wait=DRAIN_SECONDS, log_results=False,
            queue_name=f"arq:{keys.PREFIX}:{ingress.target}", **kwargs,
        )  # fmt: skip
        self.ingress, self.describe, self.announce = ingress, describe, announce
        self._sweeper: asyncio.Task[None] | None = None
        self._room = asyncio.Event()

    @property
    def credit(self) -> int:
        """Jobs this worker would take now."""
        return max(0, self.max_jobs - self.job_counter) if self.allow_pick_jobs else 0

    # --- arq's loop calls this over and over -----------------------------------------------------------------

    async def _poll_iteration(self) -> None:
        """Pick up what is there, or wait for it. A lost Redis is waited out, not died of."""
        if self._sweeper is None:
            await self._through(self.ingress.open)
            self._sweeper = asyncio.create_task(self._sweep_for_ever())
        if not self.credit:
            self._room.clear()
            await _first(self._room.wait(), keys.SWEEP_MS / 1000)
            return
        await self._through(self._pick_up)

    async def _pick_up(self) -> None:
        for delivery in await self.ingress.pick_up(self.credit, keys.BLOCK_MS):
            self.begin(delivery)

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

    async def _sweep(self) -> None:
        for delivery in await self.ingress.sweep():
            self.begin(delivery)

    async def _beat(self) -> None:
        state = "serving" if self.allow_pick_jobs else "draining"
        if not await self.ingress.beat({**self.describe(), "state": state, "credit": str(self.credit)}):
            await self.announce()

    async def _through(self, step: Callable[[], Awaitable[None]]) -> None:
        """Run one step; if Redis is away, wait with growing pauses until it is back, then open our streams again."""
        try:
            await step()
            return
        except (rx.ConnectionError, rx.TimeoutError, OSError) as error:
            log.warning("Redis is away (%s): waiting for it", error)
        pause = 0.05
        while True:
            await asyncio.sleep(pause)
            pause = min(1.0, pause * 2)
            try:
                await self.ingress.open()
                log.warning("Redis is back")
                return
            except (rx.RedisError, OSError):
                continue
            except Exception as error:
                log.warning("Redis answers, but: %s", error)

    # --- one job ---------------------------------------------------------------------------------------------

    def begin(self, delivery: Delivery) -> None:
        """Run one delivery as a task of arq's, so that time-outs, drain and counters see it."""
        name = f"{delivery.stream} {delivery.entry_id}"
        self.job_counter += 1
        task = self.loop.create_task(self._run(delivery))
        self.tasks[name] = task
        task.add_done_callback(lambda _: self._ended(name))

    def _ended(self, name: str) -> None:
        self.job_counter -= 1
        self.tasks.pop(name, None)
        self._room.set()

    async def _run(self, delivery: Delivery) -> None:
        """Every job gets a reply; one whose reply cannot be sent keeps its lease until it runs out."""
        try:
            if delivery.deliveries > keys.DELIVERIES_MAX:
                await self._refuse(delivery, "dead_letter", f"given up after {keys.DELIVERIES_MAX} deliveries", dead=True)
                return
            try:
                message: Message = decode(delivery.payload, ToWorker)
            except InvalidMessage as error:
                await self._refuse(delivery, "invalid_message", str(error), dead=True)
                return
            await self._call(delivery, message)
            self.jobs_complete += 1
        except asyncio.CancelledError:
            self.ingress.release(delivery)
            raise
        except (rx.RedisError, OSError) as error:
            self.jobs_retried += 1
            self.ingress.release(delivery)
            log.warning("a reply could not be sent (%s): the job will be delivered again", error)

    async def _call(self, delivery: Delivery, message: Message) -> None:
        function = self.functions[getattr(message, "type")]  # noqa: B009  every ToWorker has one
        try:
            await asyncio.wait_for(
                function.coroutine({**self.ctx, "worker": self, "delivery": delivery}, message),
                function.timeout_s or self.job_timeout_s,
            )
        except (rx.RedisError, OSError, asyncio.CancelledError):
            raise
        except TimeoutError:
            await self._refuse(delivery, "engine_failed", f"no answer within {self.job_timeout_s} s", message=message)
        except Exception as error:
            self.jobs_failed += 1
            log.exception("a %s job raised", type(message).__name__)
            await self._refuse(delivery, "engine_failed", f"{type(error).__name__}: {error}", message=message)

    async def _refuse(
        self, delivery: Delivery, code: Any, sentence: str, *, dead: bool = False, message: Message | None = None
    ) -> None:
        about = _about(delivery, message)
        refusal = Refusal(code=code, sentence=sentence[:500], worker=self.ingress.worker, credit=self.credit, **about)
        self.jobs_failed += 1
        await self.ingress.reply(delivery, refusal, dead=dead)

    # --- the end ---------------------------------------------------------------------------------------------

    async def close(self) -> None:
        """Stop sweeping, hand our own streams to the peers, free the connections. Replaces arq's, which would not survive
        a Redis that is away."""
        sweeping = [self._sweeper] if self._sweeper else []
        for task in sweeping:
            task.cancel()
        await asyncio.gather(*sweeping, *self.tasks.values(), return_exceptions=True)
        try:
            await self.ingress.leave()
            await self.pool.delete(self.health_check_key)
        except (rx.RedisError, OSError) as error:
            log.warning("left without saying so, Redis is away: %s", error)
        if self.on_shutdown:
            await self.on_shutdown(self.ctx)
        await self.pool.aclose(close_connection_pool=True)


def _about(delivery: Delivery, message: Message | None) -> dict[str, Any]:
    """Which round a refusal is about, as far as the payload can be read."""
    if message is None:
        try:
            message = decode(delivery.payload, ToWorker)
        except InvalidMessage:
            return {}
    if isinstance(message, VerifyJob):
        return {"boot": message.boot, "session": message.session, "epoch": message.epoch, "round": message.round}
    return {}


def _refuse_pickle(kwargs: dict[str, Any]) -> None:
    """arq's default serializer is pickle: whoever can write to Redis could run code here."""
    pool = kwargs.get("redis_pool")
    for owner in (kwargs, vars(pool) if pool is not None else {"job_serializer": 1, "job_deserializer": 1}):
        if not (owner.get("job_serializer") and owner.get("job_deserializer")):
            raise SettingsError("a worker without job_serializer and job_deserializer would unpickle jobs: pass msgpack's")


async def _first(wait: Awaitable[Any], seconds: float) -> None:
    try:
        await asyncio.wait_for(wait, seconds)
    except TimeoutError:
        return


# --- functions arq knows by name ---------------------------------------------------------------------------------


async def verify(ctx: dict[str, Any], job: VerifyJob) -> None:
    """One verify job: verdicts or a refusal, the last one in the transaction that acknowledges it."""
    delivery: Delivery = ctx["delivery"]
    ingress: Ingress = ctx["worker"].ingress
    ticket = Ticket(delivery.tenant, job, ingress.age_ms(delivery), f"{delivery.entry_id}/{delivery.deliveries}")
    if job.agent != delivery.agent:
        delivery = replace(delivery, agent=job.agent) if not delivery.agent else delivery

    async def answer(message: Message, last: bool) -> None:
        await ingress.reply(delivery, message, last=last)

    await ctx["verification"].handle(ticket, answer)


async def cancel(ctx: dict[str, Any], message: Any) -> None:
    """Stop what runs for a session (cancel), and forget it (close); acknowledged without a reply."""
    delivery: Delivery = ctx["delivery"]
    closing = message.type == "close"
    await ctx["verification"].cancel(delivery.tenant, message.agent, message.session, close=closing)
    await ctx["worker"].ingress.reply(delivery, None)


FUNCTIONS = (
    func(verify, name="verify", max_tries=1),  # type: ignore[arg-type]  arq types ctx only
    func(cancel, name="cancel", max_tries=1),  # type: ignore[arg-type]
    func(cancel, name="close", max_tries=1),  # type: ignore[arg-type]
)


# --- a worker process --------------------------------------------------------------------------------------------


def arq_pool(url: str, queue_name: str) -> ArqRedis:
    """arq's client with msgpack on both sides and explicit time-outs."""
    pool = ConnectionPool.from_url(url, socket_connect_timeout=CONNECT_SECONDS, socket_timeout=SOCKET_SECONDS)
    return ArqRedis(
        connection_pool=pool, default_queue_name=queue_name, job_serializer=msgpack.packb,
        job_deserializer=lambda data: msgpack.unpackb(data, raw=False, strict_map_key=False),
    )  # fmt: skip


async def run(spec: WorkerSpec, ready: Callable[[fleet.Target, EngineProcess], None] | None = None) -> None:
    """Open the engine, announce the target, serve until SIGTERM or SIGINT. Raises what start-up raises."""
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
    target = fleet.Target(
        fleet.target_id(info.fingerprint), spec.model_name or info.model, info.context, info.draft_max, engine.vocabulary
    )
    name = spec.name or f"{info.engine}-{secrets.token_hex(3)}"
    ingress = Ingress(pool, target.id, name)
    worker = StreamWorker(
        FUNCTIONS, ingress=ingress, describe=lambda: _describe(worker, engine), redis_pool=pool, max_jobs=spec.max_jobs,
        announce=lambda: fleet.announce(pool, target), job_timeout=JOB_SECONDS,
        job_serializer=msgpack.packb, job_deserializer=msgpack.unpackb,
    )  # fmt: skip
    worker.ctx["verification"] = Verification(engine, name, lambda: worker.credit)

    async def open_and_beat(_: Any) -> None:
        await worker.announce()
        await ingress.open()
        await ingress.beat({"state": "serving"})
        if ready:
            ready(target, engine)

    worker.on_startup = open_and_beat
    try:
        await worker.async_run()
    except asyncio.CancelledError:
        log.info("stopped")
    finally:
        await worker.close()


def _describe(worker: StreamWorker, engine: EngineProcess) -> dict[str, str]:
    """The beat, for people: plain text."""
    counts = worker.ctx["verification"].counts
    return {
        "engine": f"{engine.info.engine} {engine.info.version}",
        "model": engine.info.model,
        "running": str(worker.job_counter),
        "restarts": str(engine.restarts),
        **{name: str(value) for name, value in counts.items()},
    }
