"""A worker process with everything real but the engine: it agrees with every draft at once. For `bench broker`.

    REDIS_URL=... python -m pilotfish.bench.noop_worker NAME

Its beat also tells the processor time it has used, which is how the bench knows what an idle worker costs.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import sys
import time
from collections.abc import AsyncGenerator
from typing import Any

import msgpack

from pilotfish.bench.children import say_ready
from pilotfish.cloud_worker.arq_pool import arq_pool
from pilotfish.cloud_worker.engines.base import EngineInfo, VerifyEvent, VerifyRequest
from pilotfish.cloud_worker.functions import FUNCTIONS
from pilotfish.cloud_worker.verify import Verification
from pilotfish.cloud_worker.worker import StreamWorker
from pilotfish.protocol import fleet
from pilotfish.protocol.ingress import Ingress

FINGERPRINT = hashlib.sha256(b"pilotfish bench: no engine").hexdigest()
TARGET = fleet.target_id(FINGERPRINT)
VOCAB = 32_000
CPU_SECONDS, AT_SECONDS = "cpu_seconds", "at_seconds"  # fields of the beat: used, and when


class NoopEngine:
    """`verify.Engine` without a model: accepts the whole draft and adds one token."""

    info = EngineInfo("noop", "1", FINGERPRINT, VOCAB, 4096, 16, "noop")

    async def stream(self, request: VerifyRequest) -> AsyncGenerator[VerifyEvent, None]:
        """One event, at once."""
        drafted = len(request.draft)
        yield VerifyEvent(request.request_id, [*request.draft, 7], drafted, drafted + 1, 1, len(request.prefix))

    async def cancel(self, request_id: str) -> None:
        """Nothing runs."""

    async def forget(self, session: str) -> None:
        """Nothing is kept."""


def clocks() -> dict[str, str]:
    """For the beat: this process's CPU time, and the clock it is divided by."""
    return {CPU_SECONDS: f"{time.process_time():.6f}", AT_SECONDS: f"{time.monotonic():.6f}"}


async def serve(url: str, name: str) -> None:
    """As `worker_process.run` does, without the engine's child process."""
    pool = arq_pool(url, "arq:noop")
    target = fleet.Target(TARGET, "noop", 4096, 16, fleet.Vocabulary((b"token",)))
    ingress = Ingress(pool, TARGET, name)
    worker = StreamWorker(
        FUNCTIONS, ingress=ingress, describe=clocks, redis_pool=pool, max_jobs=64, job_timeout=60,
        announce=lambda: fleet.announce(pool, target), job_serializer=msgpack.packb, job_deserializer=msgpack.unpackb,
    )  # fmt: skip
    worker.ctx["verification"] = Verification(NoopEngine(), name, worker.credit_of)

    async def start(ctx: dict[Any, Any]) -> None:
        await worker.announce()
        await ingress.open()
        await ingress.beat(clocks())
        say_ready(TARGET)

    worker.on_startup = start
    try:
        await worker.async_run()
    except asyncio.CancelledError:
        pass
    finally:
        await worker.close()


if __name__ == "__main__":
    asyncio.run(serve(os.environ["REDIS_URL"], sys.argv[1]))
