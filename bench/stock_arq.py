"""arq as it comes, the second baseline of `bench broker`: enqueue_job, a worker that polls, Job.result that polls.

    REDIS_URL=... python -m pilotfish.bench.stock_arq POLL_SECONDS

Only its serializer is ours (msgpack); results are kept for a minute, so that the bench leaves nothing behind.
"""

from __future__ import annotations

import asyncio
import os
import sys
from typing import Any

import msgpack
from arq.connections import ArqRedis
from arq.worker import Worker, func

from pilotfish.bench.children import say_ready
from pilotfish.cloud_worker.arq_pool import arq_pool

QUEUE = "arq:bench"
DEFAULT_POLL_SECONDS = 0.5  # arq's own, on both sides


async def echo(ctx: dict[Any, Any], payload: bytes, reply_bytes: int) -> bytes:
    """What the worker does with a job."""
    return b"x" * reply_bytes


class ArqEdge:
    """The edge of stock arq."""

    def __init__(self, redis: ArqRedis, poll_seconds: float) -> None:
        self.redis, self.poll_seconds = redis, poll_seconds

    async def round(self, payload: bytes, reply_bytes: int) -> None:
        """One round trip."""
        job = await self.redis.enqueue_job("echo", payload, reply_bytes)
        assert job
        await job.result(poll_delay=self.poll_seconds)

    async def stop(self) -> None:
        """Close the connections."""
        await self.redis.aclose(close_connection_pool=True)


async def serve(url: str, poll_seconds: float) -> None:
    """A stock worker."""

    async def started(ctx: dict[Any, Any]) -> None:
        say_ready()

    worker = Worker(
        [func(echo, name="echo", keep_result=60)], redis_pool=arq_pool(url, QUEUE), queue_name=QUEUE,
        poll_delay=poll_seconds, job_serializer=msgpack.packb, job_deserializer=msgpack.unpackb, on_startup=started,
        log_results=False,
    )  # fmt: skip
    try:
        await worker.async_run()
    except asyncio.CancelledError:
        pass
    finally:
        await worker.close()


if __name__ == "__main__":
    asyncio.run(serve(os.environ["REDIS_URL"], float(sys.argv[1])))
