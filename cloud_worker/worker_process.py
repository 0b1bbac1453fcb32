"""A worker process from its spec: engine, salts, router and HTTP around one StreamWorker, from start-up to the end.

The only place that puts these together; `launch.py` makes the spec of settings.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgpack
from arq.connections import ArqRedis

from pilotfish.cache.prefix_index import PrefixIndex
from pilotfish.cloud_worker.arq_pool import arq_pool, unpack_job
from pilotfish.cloud_worker.block_feed import BlockFeed
from pilotfish.cloud_worker.engine_process import EngineProcess
from pilotfish.cloud_worker.engines.spec import EngineSpec
from pilotfish.cloud_worker.functions import FUNCTIONS
from pilotfish.cloud_worker.operations import HttpSpec, served
from pilotfish.cloud_worker.routing import Router, Routing, Session
from pilotfish.cloud_worker.salts import Salts
from pilotfish.cloud_worker.verify import Verification
from pilotfish.cloud_worker.worker import TENANT_BYTES, StreamWorker
from pilotfish.protocol import fleet, keys
from pilotfish.protocol.bounds import Bounds
from pilotfish.protocol.broker import ping
from pilotfish.protocol.errors import SettingsError
from pilotfish.protocol.ingress import Ingress

log = logging.getLogger("pilotfish.worker")

JOB_SECONDS = 600


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
        FUNCTIONS, ingress=ingress, describe=lambda: _describe(worker, engine, shown), redis_pool=pool,
        max_jobs=spec.max_jobs, router=router, announce=lambda: fleet.announce(pool, target), job_timeout=JOB_SECONDS,
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


def _describe(worker: StreamWorker, engine: EngineProcess, model: str) -> dict[str, str]:
    """The beat, for people: plain text."""
    counts = worker.ctx["verification"].counts
    return {
        "engine": f"{engine.info.engine} {engine.info.version}",
        "model": model,
        "running": str(worker.job_counter),
        "restarts": str(engine.restarts),
        **{name: str(value) for name, value in counts.items()},
        **(worker.router.describe() if worker.router else {}),
    }
