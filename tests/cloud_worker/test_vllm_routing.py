"""Two workers with vLLM: sessions go where their prefix is cached, and every prediction comes true."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from helpers import wait_until
from pilotfish.bench.routing_trace import Client, Measured, client
from pilotfish.bench.sides import engine_cores, worker
from pilotfish.cloud_worker.engines.spec import EngineSpec
from pilotfish.cloud_worker.worker_process import WorkerSpec
from pilotfish.demo import pair
from pilotfish.protocol import fleet, keys
from pilotfish.protocol.broker import connect

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed"),
]

CONVERSATIONS, TURNS, VOCAB = 12, 8, 300
Fleet = tuple[Client, str]


@pytest.fixture
async def two(redis: Redis, redis_url: str) -> AsyncIterator[Fleet]:
    """w1 and w2, and a client of theirs."""
    async with AsyncExitStack() as stack:
        for name in ("w1", "w2"):
            cores = ",".join(map(str, engine_cores()))
            spec = EngineSpec("vllm", str(Path(pair.TARGET_DIR)), context=1024, draft_max=4, cores=cores)
            await stack.enter_async_context(worker(WorkerSpec(redis_url, spec, name=name)))
        async with connect(redis_url) as other:
            target = (await fleet.find_target(other)).id
        yield await stack.enter_async_context(client(redis_url, target)), target


async def test_session_starts_are_predicted_and_conversations_stay_together(two: Fleet, redis: Redis) -> None:
    one, target = two
    rng, found = random.Random(8), Measured()
    for _ in range(CONVERSATIONS):
        ids = [rng.randrange(VOCAB) for _ in range(200)]
        for _ in range(TURNS):
            ids = [*ids, *await one.ask(ids, found, 3), *(rng.randrange(VOCAB) for _ in range(40))]
    starts = CONVERSATIONS * TURNS
    counts = await wait_until(lambda: _predicted(redis, target, starts), "the last beats")
    assert counts == {"predicted": starts, "predicted_equal": starts}
    homes = [set(found.workers[n * TURNS : (n + 1) * TURNS]) for n in range(CONVERSATIONS)]
    assert all(len(home) == 1 for home in homes)
    assert found.cached_share > 0.7


async def _predicted(redis: Any, target: str, least: int) -> dict[str, int] | None:
    beats = [await redis.hgetall(keys.beat(target, name)) for name in ("w1", "w2")]
    sums = {name: sum(int(beat.get(name.encode(), 0)) for beat in beats) for name in ("predicted", "predicted_equal")}
    return sums if sums["predicted"] >= least else None
