"""The whole path on the fake engine and a real Redis: agent, stream, worker, engine process, and back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from pilotfish.cloud_worker.engine_process import EngineSpec
from pilotfish.cloud_worker.engines.fake import VOCAB, fake_target
from pilotfish.cloud_worker.worker import WorkerSpec, run
from pilotfish.edge_agent.agent import Agent, new_boot
from pilotfish.edge_agent.drafters.fake import FakeDrafter
from pilotfish.edge_agent.generation import Generation, Task
from pilotfish.edge_agent.tokenizer import ByteTokenizer
from pilotfish.protocol import fleet
from pilotfish.protocol.broker import EdgeBroker, connect
from pilotfish.protocol.messages import Sampling

PROMPT = tuple(b"once upon a time")


@asynccontextmanager
async def worker(redis_url: str, name: str = "w1") -> AsyncIterator[None]:
    started = asyncio.Event()
    spec = WorkerSpec(redis_url, EngineSpec("fake", ""), name=name)
    task = asyncio.create_task(run(spec, ready=lambda *_: started.set()))
    waiting = asyncio.create_task(started.wait())
    await asyncio.wait({task, waiting}, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    if task.done():
        task.result()
    yield
    task.cancel()
    (end,) = await asyncio.gather(task, return_exceptions=True)
    assert end is None or isinstance(end, asyncio.CancelledError), end


@asynccontextmanager
async def agent(redis_url: str, alpha: float = 0.7) -> AsyncIterator[Agent]:
    redis = connect(redis_url)
    target = await fleet.find_target(redis)
    broker = EdgeBroker(redis, "default", "edge1", new_boot())
    running = Agent(FakeDrafter(fake_target, alpha=alpha), ByteTokenizer(), (), broker, target)
    await running.start()
    yield running
    await running.stop()


async def text_of(running: Agent, task: Task) -> tuple[list[int], Generation]:
    generation = running.open(task)
    out = [token.id async for tokens in generation.run() for token in tokens]
    running.close(generation)
    return out, generation


def expected(sampling: Sampling, count: int) -> list[int]:
    ids = list(PROMPT)
    while len(ids) < len(PROMPT) + count:
        ids.append(fake_target(ids, len(ids), sampling, VOCAB))
    return ids[len(PROMPT) :]


@pytest.mark.parametrize("window", [1, 3])
async def test_exact_and_cloud_only_give_the_targets_own_text(redis_url: str, window: int) -> None:
    sampling = Sampling(temperature=1.0, seed=7)
    async with worker(redis_url), agent(redis_url) as running:
        exact, drafted = await text_of(running, Task(PROMPT, "exact", sampling=sampling, max_tokens=60, window=window))
        cloud, continued = await text_of(running, Task(PROMPT, "cloud_only", sampling=sampling, max_tokens=60))
    assert exact == cloud == expected(sampling, 60)
    assert 0 < drafted.summary().rounds < 60
    assert continued.summary().rounds == 1
    assert drafted.summary().accepted > 10
