"""Gated mode and privacy through a real Redis and a worker with the fake engine."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import pytest
from redis.asyncio import Redis
from rigs import PROMPT, agent, draws, text_of, worker

from helpers import wait_until
from pilotfish.cloud_worker.engines.fake import fake_target
from pilotfish.edge_agent.agent import Agent
from pilotfish.edge_agent.drafters.fake import FakeDrafter
from pilotfish.edge_agent.generation import Generation
from pilotfish.edge_agent.session import Committed
from pilotfish.edge_agent.task import Task
from pilotfish.protocol.messages import Sampling

BUDGET = 0.1


def task(number: int, **changes: object) -> Task:
    fields = {"mode": "gated", "on_cloud_loss": "local", "max_tokens": 40, "max_disagreement": BUDGET, **changes}
    return Task((*PROMPT, number % 256, number // 256), **fields)  # type: ignore[arg-type]


def unsteady(running: Agent, alpha: float = 0.8) -> None:
    """Confidence that varies between sure and not."""
    running.drafter = FakeDrafter(fake_target, alpha=alpha, spread=1.0)


async def tokens_of(running: Agent, task: Task) -> tuple[list[Committed], Generation]:
    """Run one generation to its end."""
    generation = running.open(task)
    try:
        return [token async for tokens in generation.run() for token in tokens], generation
    finally:
        running.close(generation)


@pytest.mark.slow
async def test_the_gate_opens_keeps_its_budget_and_is_audited(redis_url: str) -> None:
    wrong = emitted = local = audited = 0
    async with worker(redis_url), agent(redis_url, audit_share=0.5) as running:
        unsteady(running)
        gate = running.learner.of(Sampling()).gate(BUDGET)
        taught = 0
        while not gate.open:
            await text_of(running, task(taught))
            taught += 1
            assert taught < 100, "the gate never opens"
        for number in range(1000, 1060):
            tokens, generation = await tokens_of(running, task(number, logprobs=True))
            text = [token.id for token in tokens]
            assert all((token.logprob is None) == (token.origin == "local") for token in tokens)
            whole = [*generation.task.prompt, *text]
            at = [p for p, one in generation.ledger.proposals.items() if one.local]
            wrong += sum(fake_target(whole[:p], p, Sampling()) != whole[p] for p in at)
            summary = generation.summary()
            emitted, local, audited = emitted + len(text), local + len(at), audited + summary.audited
            assert summary.unverified == len(at)
            assert summary.audited in (0, len(at))
    assert wrong / emitted <= BUDGET
    assert local / emitted > 0.2
    assert 0.2 < audited / local < 0.8


async def test_other_modes_teach_the_gate(redis_url: str) -> None:
    async with worker(redis_url), agent(redis_url) as running:
        unsteady(running)
        got, _ = await text_of(running, task(1, mode="exact"))
        assert got == draws(task(1).prompt, 40)
        assert running.learner.of(Sampling()).evidence.tokens > 20
        await text_of(running, task(2, mode="cloud_only"))
        assert running.learner.of(Sampling()).evidence.requests[0] == 1


async def test_nothing_of_a_local_only_request_is_written_to_redis(redis: Redis, redis_url: str) -> None:
    """MONITOR shows every command with every argument. Ids below 128 are one byte of msgpack, so texts stand in it."""
    said: list[str] = []

    async def listen() -> None:
        async with redis.monitor() as monitor:
            async for command in monitor.listen():
                said.append(command["command"])  # noqa: PERF401  it never ends

    secret, shared = tuple(b"my diary of that summer"), tuple(b"the weather of tomorrow")
    async with worker(redis_url), agent(redis_url, audit_share=1.0) as running:
        listening = asyncio.create_task(listen())
        await wait_until(lambda: said, "MONITOR to begin")
        sizes = {"max_tokens": 40, "mode": "gated", "on_cloud_loss": "local"}
        hidden, generation = await text_of(running, Task(secret, privacy="local_only", **sizes))  # type: ignore[arg-type]
        assert len(hidden) == 40
        assert generation.summary().never_sent == 40
        assert not [command for command in said if "edge1" in command and command.startswith("XADD")]
        open_text, _ = await text_of(running, Task(shared, **sizes))  # type: ignore[arg-type]
        assert open_text == draws(shared, 40)
        await wait_until(lambda: any("the weather of tomorrow" in command for command in said), "the shared prompt")
        assert not any("my diary" in command or generation.session.id in command for command in said)
        listening.cancel()
        with suppress(asyncio.CancelledError):
            await listening
