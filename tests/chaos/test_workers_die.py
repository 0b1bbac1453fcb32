"""Workers are killed, one after the other, under generations that must not notice in their text."""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import AsyncExitStack

import pytest
from redis.asyncio import Redis
from rigs import PROMPT, TARGET, agent, draws, text_of, worker_process

from helpers import wait_until
from pilotfish.edge_agent.task import Task
from pilotfish.protocol import keys
from pilotfish.protocol.messages import Mode, Sampling

MODES: tuple[Mode, ...] = ("exact", "cloud_only", "exact", "exact", "cloud_only", "exact")


@pytest.mark.slow
async def test_killing_workers_changes_speed_and_not_text(redis: Redis, redis_url: str) -> None:
    tasks = [
        Task((*PROMPT, n), mode, sampling=Sampling(temperature=1.0, seed=n), max_tokens=200, window=1 + n % 3)
        for n, mode in enumerate(MODES)
    ]
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(worker_process(redis_url, "w1", "step_ms=15"))
        running = await stack.enter_async_context(agent(redis_url, round_timeout_ms=3_000))
        second = await stack.enter_async_context(worker_process(redis_url, "w2", "step_ms=15"))
        writing = [asyncio.create_task(text_of(running, task)) for task in tasks]
        serving = running.generations.values()
        await wait_until(
            lambda: len(serving) == len(tasks) and all(g.outbox.worker for g in serving), "everyone to be served"
        )
        os.kill(first.pid, signal.SIGKILL)
        await wait_until(lambda: all(g.outbox.worker == "w2" for g in serving), "the peer to take over")
        await stack.enter_async_context(worker_process(redis_url, "w3", "step_ms=15"))
        os.kill(second.pid, signal.SIGKILL)
        results = await asyncio.gather(*writing)
        await wait_until(lambda: _buried(redis), "the dead to be buried")
    assert [text for text, _ in results] == [draws(task.prompt, 200, task.sampling) for task in tasks]
    assert not any(generation.summary().degraded for _, generation in results)


async def _buried(redis: Redis) -> bool:
    left = await redis.exists(*(keys.jobs(TARGET, keys.DEFAULT_TENANT, name) for name in ("w1", "w2")))
    return not left
