"""How long each kind of failure may be felt: a worker, Redis, a drain, an agent. Real processes, real time."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import sys
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from itertools import pairwise

import pytest
from redis.asyncio import Redis
from rigs import PROMPT, TARGET, agent, draws, heard, job, restarting_redis, text_of, worker, worker_process

from helpers import wait_until
from pilotfish.bench.chaos_process import Process
from pilotfish.cli.requests import Answer
from pilotfish.edge_agent.task import Task
from pilotfish.protocol import keys
from pilotfish.protocol.broker import EdgeBroker
from pilotfish.protocol.errors import PilotfishError
from pilotfish.protocol.messages import Prompt, Sampling
from pilotfish.protocol.shell import ShellBroker

pytestmark = pytest.mark.slow

TAKEN_OVER_SECONDS = 2.0
LEFT_BEHIND_SECONDS = 3.5  # a job the dead worker never picked up: its beat must run out first
ALONE_SECONDS = 0.3
VERIFIED_AGAIN_SECONDS = 2.0
DRAIN_SECONDS = 30.0


async def pending(redis: Redis, stream: str) -> int:
    return int((await redis.xpending(stream, keys.GROUP_WORKERS))["pending"])


async def test_a_killed_workers_round_is_answered_elsewhere_within_two_seconds(redis: Redis, redis_url: str) -> None:
    edge, stream = EdgeBroker(redis, keys.DEFAULT_TENANT, "edge1", "boot1"), keys.jobs(TARGET, "default", "w1")
    async with worker_process(redis_url, "w1", "step_ms=60000") as dying, worker(redis_url, "w2"):
        await edge.publish(TARGET, "w1", job())
        await wait_until(lambda: pending(redis, stream), "the job to be picked up")
        dying.send_signal(signal.SIGKILL)
        killed = time.monotonic()
        (answer,) = await heard(redis)
        seconds = time.monotonic() - killed
    assert (answer.worker, list(answer.draws)) == ("w2", draws(PROMPT, 1))
    assert seconds <= TAKEN_OVER_SECONDS


async def test_what_a_killed_worker_never_picked_up_waits_for_its_beat(redis: Redis, redis_url: str) -> None:
    edge = EdgeBroker(redis, keys.DEFAULT_TENANT, "edge1", "boot1")
    async with worker_process(redis_url, "w1") as dying, worker(redis_url, "w2"):
        dying.send_signal(signal.SIGKILL)
        await dying.wait()
        killed = time.monotonic()
        await edge.publish(TARGET, "w1", job())
        (answer,) = await heard(redis)
    assert answer.worker == "w2"
    assert time.monotonic() - killed <= LEFT_BEHIND_SECONDS


@pytest.mark.parametrize("paused_seconds", [1.0, 6.5])  # shorter and longer than a socket's time-out
async def test_a_pause_of_redis_is_hardly_felt_where_the_device_may_go_on_alone(paused_seconds: float) -> None:
    said: list[tuple[float, str]] = []

    async def next_origin(wanted: Callable[[str], bool], since: float) -> float:
        """Seconds from `since` to the next token of such an origin."""
        found = lambda: next((at for at, origin in said if at > since and wanted(origin)), None)  # noqa: E731
        return float(await wait_until(found, "a token", timeout=15)) - since

    with restarting_redis(17841) as server:
        async with (
            worker_process(server.url, "w1", "step_ms=5") as _,
            agent(server.url, token_ms=10.0) as running,
        ):
            generation = running.open(Task(PROMPT, on_cloud_loss="local", max_tokens=3_000))

            async def write() -> None:
                async for tokens in generation.run():
                    said.extend((time.monotonic(), token.origin) for token in tokens)

            writing = asyncio.create_task(write())
            await wait_until(lambda: len(said) > 30, "verified text")
            assert {origin for _, origin in said} <= {"accepted", "corrected", "continued"}
            server.pause()
            stopped = time.monotonic()
            longest = await next_origin(lambda _: True, stopped)
            await next_origin(lambda origin: origin == "local", stopped)
            await wait_until(lambda: time.monotonic() - stopped > paused_seconds, "the pause to end")
            while_away = [at for at, origin in said if at > stopped and origin == "local"]
            longest = max(longest, *(b - a for a, b in pairwise(while_away)))
            server.resume()
            back = await next_origin(lambda origin: origin == "accepted", time.monotonic())
            writing.cancel()
            await asyncio.gather(writing, return_exceptions=True)
            running.close(generation)
    assert generation.summary().degraded
    assert longest <= ALONE_SECONDS
    assert back <= VERIFIED_AGAIN_SECONDS


async def test_a_drained_worker_answers_what_runs_hands_over_the_rest_and_ends_with_0(
    redis: Redis, redis_url: str
) -> None:
    long = Task(PROMPT, "cloud_only", sampling=Sampling(temperature=1.0, seed=3), max_tokens=400, window=1)
    arguments = ["worker", "--engine", "fake", "--target-model", "step_ms=100", "--redis-url", redis_url]
    async with AsyncExitStack() as stack:
        leaving = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "pilotfish.cli.main", *arguments, stderr=asyncio.subprocess.DEVNULL,
            env={**os.environ, "PILOTFISH_CONTEXT": "4096"},
        )  # fmt: skip
        stack.callback(end, leaving)
        await wait_until(lambda: redis.exists(keys.workers(TARGET)), "the worker", timeout=20)
        running = await stack.enter_async_context(agent(redis_url, round_timeout_ms=3_000))
        handed_over = asyncio.create_task(text_of(running, long))
        finished = asyncio.create_task(text_of(running, Task((*PROMPT, 1), max_tokens=8)))
        serving = running.generations.values()
        await wait_until(lambda: len(serving) == 2 and all(g.outbox.worker for g in serving), "both to be served")
        await stack.enter_async_context(worker(redis_url, "w2"))
        leaving.terminate()
        told = time.monotonic()
        code = await asyncio.wait_for(leaving.wait(), DRAIN_SECONDS)
        text, generation = await handed_over
        short, _ = await finished
    assert code == 0
    assert time.monotonic() - told <= DRAIN_SECONDS
    assert short == draws((*PROMPT, 1), 8)
    assert text == draws(PROMPT, 400, long.sampling)
    assert not generation.summary().degraded


async def test_what_a_killed_agent_was_writing_is_written_by_the_next(redis: Redis, redis_url: str) -> None:
    shell = ShellBroker(redis, keys.DEFAULT_TENANT)
    prompt = Prompt(request=secrets.token_hex(16), text="once upon a time", raw=True, max_tokens=150)
    first = Process("a0", ["chaos_child", "agent", redis_url, "a0"])
    again = Process("a0", ["chaos_child", "agent", redis_url, "a0"])
    async with worker_process(redis_url, "w1", "step_ms=15"):
        try:
            await first.start()
            await shell.submit(prompt)
            await wait_until(lambda: said(shell, prompt), "the first words")
            await first.kill()
            await again.start()
            answer = Answer(prompt.request)
            async with asyncio.timeout(20):
                async for message in shell.output(prompt.request, follow=True):
                    answer.add(message)
            code = await again.end()
        finally:
            await first.kill()
            await again.kill()
    assert answer.ids == draws(tuple(prompt.text.encode()), 150)
    assert code == 0


def end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.kill()


async def said(shell: ShellBroker, prompt: Prompt) -> bool:
    answer = Answer(prompt.request)
    async for message in shell.output(prompt.request, follow=False):
        answer.add(message)
    return len(answer.ids) > 10


async def test_what_redis_lost_fails_by_name(redis: Redis, redis_url: str) -> None:
    shell = ShellBroker(redis, keys.DEFAULT_TENANT)
    prompt = Prompt(request=secrets.token_hex(16), text="once", raw=True, max_tokens=10)
    async with worker(redis_url), agent(redis_url, prompts=True) as running:
        await redis.flushall()
        await wait_until(lambda: redis.exists(keys.agents("default")), "the agent to beat again")
        started = time.monotonic()
        with pytest.raises(PilotfishError) as told:
            async for _ in shell.output(prompt.request, follow=True):
                pass
        assert running.broker
    assert told.value.code == "answer_lost"
    assert time.monotonic() - started < 2
