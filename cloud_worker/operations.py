"""A worker's metrics, health, ready and drain over HTTP, if it has a port for them."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pilotfish.cloud_worker.engine_process import EngineProcess
from pilotfish.protocol import keys
from pilotfish.protocol.errors import BrokerUnreachable, Draining, EngineError
from pilotfish.protocol.http_guard import Access, Guard
from pilotfish.protocol.http_operations import Operations, operations_app
from pilotfish.protocol.http_server import serving

if TYPE_CHECKING:
    from pilotfish.cloud_worker.worker import StreamWorker

log = logging.getLogger("pilotfish.worker")


@dataclass(frozen=True, slots=True)
class HttpSpec:
    """Where, and who may."""

    host: str
    port: int
    access: Access


@asynccontextmanager
async def served(spec: HttpSpec | None, worker: StreamWorker, engine: EngineProcess) -> AsyncIterator[None]:
    """Serve for the block. Raises SettingsError if the port is taken."""
    if spec is None:
        yield
        return
    app = Guard(operations_app(worker_operations(worker, engine)), spec.access)
    async with serving(app, spec.host, spec.port, spec.access.key) as url:
        log.info("metrics and health: %s", url)
        yield


def worker_operations(worker: StreamWorker, engine: EngineProcess) -> Operations:
    """A dead engine is restarted by its next job, so it makes a worker unready and not unhealthy."""

    async def health() -> dict[str, Any]:
        return {"running": worker.job_counter, "engine_restarts": engine.restarts}

    async def ready() -> dict[str, Any]:
        if not worker.allow_pick_jobs:
            raise Draining("this worker is ending and takes no more jobs")
        if not engine.alive:
            raise EngineError("the engine process is down: the next job starts it again")
        if worker.loop.time() - worker.beat_at > keys.BEAT_TTL_MS / 1000:
            raise BrokerUnreachable("no beat reached Redis lately: see the worker's log")
        return {"running": worker.job_counter, "credit": worker.credit}

    def drain() -> dict[str, Any]:
        os.kill(os.getpid(), signal.SIGTERM)  # arq's own way to end: what runs is answered first
        return {"running": worker.job_counter}

    return Operations(health, ready, drain)
