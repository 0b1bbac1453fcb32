"""Workers are killed, restarted in place, and Redis loses everything, while sessions are being routed."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial

import pytest
from redis.asyncio import Redis
from rigs import PROMPT, TARGET, agent, draws, job, text_of, worker, worker_process

from helpers import wait_until
from nightly import NIGHTLY
from pilotfish.cache.block_hash import block_hashes, short
from pilotfish.cache.prefix_index import PrefixIndex, buckets_for
from pilotfish.cloud_worker.salts import Salts
from pilotfish.edge_agent.task import Task
from pilotfish.protocol import keys
from pilotfish.protocol.broker import EdgeBroker, connect
from pilotfish.protocol.messages import Sampling

BLOCK = 16
CACHING = f"kv_blocks=2000,block_size={BLOCK}"
PREFIX = [n % 251 for n in range(10 * BLOCK)]
KILLS = 200 if NIGHTLY else 20
BATCH = 5


async def names(redis: Redis, prefix: Sequence[int] = PREFIX) -> list[bytes]:
    salts = Salts(redis)
    await salts.agree()
    return [short(name) for name in block_hashes(prefix, BLOCK, salts.of(keys.DEFAULT_TENANT))]


async def send(redis: Redis, worker: str, session: int, prefix: Sequence[int] = PREFIX) -> None:
    edge = EdgeBroker(redis, keys.DEFAULT_TENANT, "edge1", "boot1")
    await edge.publish(TARGET, worker, job([*prefix, session % 250], session=f"{session:032x}"))


# --- SIGKILL -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
async def test_nobody_is_routed_to_a_killed_worker_past_its_lease(redis: Redis, redis_url: str) -> None:
    """Each is the only warm one for a prefix when it dies; from the end of its lease on, no route leads to it."""
    stale = killed = 0
    for batch in range(-(-KILLS // BATCH)):
        async with AsyncExitStack() as stack:
            crew = [f"w{batch}-{n}" for n in range(BATCH)]
            pids: dict[str, int] = {}
            for name in crew:  # one after the other: whatever fails, the stack ends those that run
                process = await stack.enter_async_context(worker_process(redis_url, name, CACHING))
                pids[name] = process.pid
            stale += await _kill_warm(redis, batch, pids)
            killed += len(crew)
    assert killed >= KILLS
    assert stale == 0


async def _kill_warm(redis: Redis, batch: int, crew: dict[str, int]) -> int:
    """Warm each with a prefix of its own, kill all; how many of the routes asked for past the lease lead anywhere."""
    index, stale = PrefixIndex(redis, TARGET), 0
    prefixes = {name: [n] * 10 * BLOCK for n, name in enumerate(crew)}
    blocks = {name: await names(redis, prefix) for name, prefix in prefixes.items()}
    for n, (name, prefix) in enumerate(prefixes.items()):
        await send(redis, name, batch * BATCH + n, prefix)
    for name in crew:
        await wait_until(partial(_routed, index, blocks[name]), f"somebody to be warm for the prefix of {name}")
    for pid in crew.values():
        os.kill(pid, signal.SIGKILL)
    died = time.monotonic()
    while (past := time.monotonic() - died - keys.BEAT_TTL_MS / 1000) < 0.5:
        for names_of in blocks.values():
            leads = await index.route("survivor", len(names_of) * BLOCK + 1, BLOCK, names_of)
            stale += leads is not None and past > 0  # nobody but the dead is there to lead to
        await asyncio.sleep(0.02)
    return stale


async def _routed(index: PrefixIndex, blocks: list[bytes]) -> bool:
    route = await index.route("survivor", len(blocks) * BLOCK + 1, BLOCK, blocks)
    return route is not None and route.blocks == len(blocks)


async def _any_warm(index: PrefixIndex, blocks: list[bytes]) -> bool:
    return any(holder.hit == len(blocks) for holder in await index.look(blocks))


@pytest.mark.slow
async def test_a_job_passed_on_to_a_worker_that_is_killed_is_answered_by_a_peer(redis: Redis, redis_url: str) -> None:
    async with worker_process(redis_url, "w1", f"{CACHING},row_us=2000") as first:
        index, blocks = PrefixIndex(redis, TARGET), await names(redis)
        await send(redis, "w1", 1)
        await wait_until(lambda: _any_warm(index, blocks), "w1 to be warm")
        async with worker(redis_url, "w2", CACHING):
            os.kill(first.pid, signal.SIGSTOP)  # or it might answer before anyone has looked
            await send(redis, "w2", 2)  # goes to w1, which is warm
            await wait_until(lambda: redis.xlen(keys.forwarded(TARGET, "w1")), "the job to be passed on")
            os.kill(first.pid, signal.SIGKILL)
            died = time.monotonic()
            replies = keys.replies(keys.DEFAULT_TENANT, "edge1")

            async def answered() -> bool:
                return bool(await redis.xlen(replies) >= 2)

            await wait_until(answered, "w2 to answer it after all")
            assert time.monotonic() - died < (keys.BEAT_TTL_MS + keys.BEAT_EVERY_MS + keys.SWEEP_MS) / 1000 + 1


@pytest.mark.slow
async def test_a_restart_in_place_leaves_no_stale_route(redis: Redis, redis_url: str) -> None:
    index, blocks = PrefixIndex(redis, TARGET), await names(redis)
    async with worker_process(redis_url, "w1", CACHING) as first:
        await send(redis, "w1", 1)
        await wait_until(lambda: _any_warm(index, blocks), "w1 to be warm")
        os.kill(first.pid, signal.SIGKILL)
        async with worker_process(redis_url, "w1", CACHING):
            assert [(holder.worker, holder.hit) for holder in await index.look(blocks)] == [("w1", 0)]


# --- a Redis that loses everything -------------------------------------------------------------------------------


@pytest.mark.slow
async def test_redis_is_flushed_under_load_and_no_session_fails(redis: Redis, redis_url: str) -> None:
    tasks = [Task((*PROMPT, *PREFIX, n), "exact", sampling=Sampling(), max_tokens=120) for n in range(6)]
    async with AsyncExitStack() as stack:
        for name in ("w1", "w2"):
            await stack.enter_async_context(worker(redis_url, name, f"{CACHING},step_ms=8"))
        running = await stack.enter_async_context(agent(redis_url, round_timeout_ms=800, resends=5))
        writing = [asyncio.create_task(text_of(running, task)) for task in tasks]
        serving = running.generations.values()
        await wait_until(
            lambda: len(serving) == len(tasks) and all(g.outbox.worker for g in serving), "everyone to be served"
        )
        await redis.flushall()
        results = await asyncio.gather(*writing)
        index = PrefixIndex(redis, TARGET)
        await wait_until(lambda: _everyone_tells(index), "both workers' blocks to be back")
    assert [text for text, _ in results] == [draws(task.prompt, 120, task.sampling) for task in tasks]


async def _everyone_tells(index: PrefixIndex) -> bool:
    return [holder.blocks > 0 for holder in await index.look()] == [True, True]


@asynccontextmanager
async def feed_of(redis_url: str, blocks: int) -> AsyncIterator[tuple[PrefixIndex, object]]:
    """A worker's feed with so many blocks in its mirror, told."""
    from pilotfish.cloud_worker.block_feed import BlockFeed
    from pilotfish.cloud_worker.engines.base import KvChange

    async with connect(redis_url) as client:
        index = PrefixIndex(client, TARGET)
        feed = BlockFeed(index, "w1", buckets_for(blocks) * 256)
        feed.heard(KvChange("stored", tuple(n.to_bytes(8, "big") for n in range(0, blocks << 40, 1 << 40))))
        await feed.start()
        try:
            yield index, feed
        finally:
            await feed.stop()


@pytest.mark.slow
async def test_a_hundred_thousand_blocks_are_back_in_a_second(redis: Redis, redis_url: str) -> None:
    async with feed_of(redis_url, 100_000) as (index, feed):
        await redis.flushall()
        started = time.monotonic()
        await feed.beat(-1)  # type: ignore[attr-defined]

        async def back() -> bool:
            return [holder.blocks for holder in await index.look()] == [100_000]

        await wait_until(back, "the index to be back")
        assert time.monotonic() - started < 1.0
