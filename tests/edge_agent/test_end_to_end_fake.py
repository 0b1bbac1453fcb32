"""The whole path on the fake engine and a real Redis: agent, stream, worker, engine process, and back."""

from __future__ import annotations

import asyncio

import pytest
from redis.asyncio import Redis
from rigs import PROMPT, TARGET, agent, draws, restarting_redis, text_of, worker, worker_process

from helpers import wait_until
from pilotfish.edge_agent.task import Task
from pilotfish.protocol import keys
from pilotfish.protocol.messages import Mode, Sampling

WARM = Sampling(temperature=1.0, seed=7)


@pytest.mark.parametrize("window", [1, 3])
async def test_exact_and_cloud_only_give_the_targets_own_text(redis_url: str, window: int) -> None:
    async with worker(redis_url), agent(redis_url) as running:
        task = Task(PROMPT, "exact", sampling=WARM, max_tokens=60, drafting="fixed", window=window)
        exact, drafted = await text_of(running, task)
        cloud, continued = await text_of(running, Task(PROMPT, "cloud_only", sampling=WARM, max_tokens=60))
    assert exact == cloud == draws(PROMPT, 60, WARM)
    assert 0 < drafted.summary().rounds < 60
    assert continued.summary().rounds == 1
    assert drafted.summary().accepted > 10


async def test_generations_at_once_do_not_mix(redis_url: str) -> None:
    modes: tuple[Mode, ...] = ("exact", "cloud_only", "exact", "exact")
    tasks = [
        Task((*PROMPT, n), mode, sampling=Sampling(temperature=1.0, seed=n), max_tokens=40, window=2)
        for n, mode in enumerate(modes)
    ]
    async with worker(redis_url), agent(redis_url) as running:
        got = await asyncio.gather(*(text_of(running, task) for task in tasks))
    assert [text for text, _ in got] == [draws(task.prompt, 40, task.sampling) for task in tasks]


async def test_a_session_goes_on_at_another_worker_when_its_own_drains(redis: Redis, redis_url: str) -> None:
    task = Task(PROMPT, sampling=WARM, max_tokens=200, draft_tokens=2)
    async with worker_process(redis_url, "w1", "step_ms=5") as leaving, agent(redis_url) as running:
        generation = running.open(task)
        text: list[int] = []
        answered: set[str] = set()
        async with worker(redis_url, "w2") as _:
            generation.outbox.worker = "w1"
            async for tokens in generation.run():
                text += [token.id for token in tokens]
                answered.add(generation.outbox.worker)
                if len(text) >= 20 and leaving.returncode is None and "w1" in answered:
                    leaving.terminate()
                    await leaving.wait()
        running.close(generation)
    assert text == draws(PROMPT, 200, WARM)
    assert answered == {"w1", "w2"}
    assert not generation.summary().degraded


@pytest.mark.parametrize("mode", ["exact", "cloud_only"])
async def test_redis_restarts_under_a_generation_and_the_text_is_the_same(mode: Mode) -> None:
    task = Task(PROMPT, mode, sampling=WARM, max_tokens=120, round_timeout_ms=500, window=2)
    with restarting_redis(17832) as server:
        async with worker(server.url, model="step_ms=10"), agent(server.url) as running:
            generation, text = running.open(task), list[int]()
            restarts = 0
            async for tokens in generation.run():
                text += [token.id for token in tokens]
                if len(text) >= 20 and not restarts:
                    restarts += 1
                    server.kill()
                    server.start()
            running.close(generation)
    assert text == draws(PROMPT, 120, WARM)
    assert restarts
    assert not generation.summary().degraded


@pytest.mark.slow
async def test_without_a_worker_local_text_is_flagged_and_verified_again_when_one_appears(
    redis: Redis, redis_url: str
) -> None:
    async with worker_process(redis_url, "w1") as gone, agent(redis_url, token_ms=4.0) as running:
        gone.kill()
        await gone.wait()
        await redis.delete(*[name async for name in redis.scan_iter("pf:*:jobs:*")], keys.workers(TARGET))
        generation = running.open(Task(PROMPT, on_cloud_loss="local", max_tokens=1500))
        origins: list[str] = []

        async def write() -> None:
            async for tokens in generation.run():
                origins.extend(token.origin for token in tokens)
                if "accepted" in origins:
                    break

        writing = asyncio.create_task(write())
        await wait_until(lambda: "local" in origins, "the device to write alone")
        async with worker(redis_url, "w2"):
            await asyncio.wait_for(writing, 12)
        running.close(generation)
    assert generation.summary().degraded
    assert origins[0] == "local"
