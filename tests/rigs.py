"""Shared by the tests of the broker and its two sides: jobs made by hand, workers, agents, a Redis that restarts."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import redis as sync_redis
from redis.asyncio import Redis

from helpers import wait_until, wait_until_sync
from logins import login
from pilotfish.cli.redis_server import find_program
from pilotfish.cloud_worker.engines.fake import VOCAB, FakeVerifier, fake_target
from pilotfish.cloud_worker.engines.spec import EngineSpec
from pilotfish.cloud_worker.worker_process import WorkerSpec, run
from pilotfish.edge_agent.agent import Agent, Defaults, new_boot
from pilotfish.edge_agent.drafters.fake import FakeDrafter
from pilotfish.edge_agent.generation import Generation
from pilotfish.edge_agent.task import Task
from pilotfish.edge_agent.tokenizer import ByteTokenizer
from pilotfish.protocol import fleet, keys
from pilotfish.protocol.broker import EdgeBroker, connect, read_entry
from pilotfish.protocol.history import History
from pilotfish.protocol.messages import Sampling, ToEdge, VerifyJob

TARGET = fleet.target_id(FakeVerifier().info.fingerprint)
PROMPT = tuple(b"once upon a time")
BOOT = "boot1"


# --- what is right -------------------------------------------------------------------------------------------


def draws(ids: Sequence[int], count: int, sampling: Sampling | None = None) -> list[int]:
    """What the fake target writes after `ids`."""
    out = list(ids)
    while len(out) < len(ids) + count:
        out.append(fake_target(out, len(out), sampling or Sampling(), VOCAB))
    return out[len(ids) :]


def job(ids: Sequence[int] = PROMPT, draft: Sequence[int] = (), /, **changes: Any) -> VerifyJob:
    """A verify job as an honest edge would send it first, but for `changes`."""
    sampling = changes.get("sampling", Sampling())
    fields: dict[str, Any] = {
        "agent": "edge1",
        "boot": BOOT,
        "session": "0" * 32,
        "epoch": 0,
        "round": 0,
        "base": len(ids),
        "digest": History(TARGET, sampling, ids).digest(len(ids)),
        "offset": 0,
        "ids": tuple(ids),
        "draft": tuple(draft),
    }
    return VerifyJob(**{**fields, **changes})


# --- workers and agents --------------------------------------------------------------------------------------


@asynccontextmanager
async def worker(redis_url: str, name: str = "w1", model: str = "", **spec: Any) -> AsyncIterator[asyncio.Task[None]]:
    """A worker with the fake engine in this process (its engine has a process of its own)."""
    started = asyncio.Event()
    wanted = WorkerSpec(login(redis_url, "worker"), EngineSpec("fake", model), name=name, **spec)
    task = asyncio.create_task(run(wanted, ready=lambda *_: started.set()))
    waiting = asyncio.create_task(started.wait())
    await asyncio.wait({task, waiting}, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    if task.done():
        task.result()
    try:
        yield task
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


WORKER_CODE = """
import asyncio, sys
from pilotfish.cloud_worker.engines.spec import EngineSpec
from pilotfish.cloud_worker.worker_process import WorkerSpec, run
url, name, model = sys.argv[1:]
asyncio.run(run(WorkerSpec(url, EngineSpec("fake", model), name=name), ready=lambda *_: print("ready", flush=True)))
"""


@asynccontextmanager
async def worker_process(redis_url: str, name: str, model: str = "") -> AsyncIterator[asyncio.subprocess.Process]:
    """A worker that may be killed."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", WORKER_CODE, login(redis_url, "worker"), name, model, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout
    try:
        assert await asyncio.wait_for(process.stdout.readline(), 60) == b"ready\n", "the worker did not start"
        yield process
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


def children(pid: int) -> list[int]:
    """Process ids of a process' children."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def engine_child() -> int:
    """The process id of the one engine that a worker in this process runs."""
    (pid,) = (pid for pid in children(os.getpid()) if b"engine_child" in Path(f"/proc/{pid}/cmdline").read_bytes())
    return pid


@asynccontextmanager
async def agent(
    redis_url: str,
    name: str = "edge1",
    *,
    alpha: float = 0.7,
    token_ms: float = 0.0,
    prompts: bool = False,
    **defaults: Any,
) -> AsyncIterator[Agent]:
    """An agent of the fake pair."""
    redis = connect(login(redis_url, f"{keys.DEFAULT_TENANT}+agent"))
    broker = EdgeBroker(redis, keys.DEFAULT_TENANT, name, new_boot())
    drafter = FakeDrafter(fake_target, alpha=alpha, token_ms=token_ms)
    target = await fleet.find_target(redis)
    running = Agent(drafter, ByteTokenizer(), (), broker, target, Defaults(**defaults))
    await running.start(take_prompts=prompts)
    try:
        yield running
    finally:
        await running.stop()


async def text_of(running: Agent, task: Task) -> tuple[list[int], Generation]:
    """Run one generation to its end."""
    generation = running.open(task)
    try:
        return [token.id async for tokens in generation.run() for token in tokens], generation
    finally:
        running.close(generation)


# --- looking at Redis ----------------------------------------------------------------------------------------


async def heard(redis: Redis, count: int = 1, name: str = "edge1") -> list[Any]:
    """The first `count` replies to an agent, once they are there."""
    stream = keys.replies(keys.DEFAULT_TENANT, name)

    async def enough() -> list[Any]:
        entries = await redis.xrange(stream)
        return entries if len(entries) >= count else []

    return [read_entry(fields, ToEdge) for _, fields in await wait_until(enough, f"{count} replies")]


async def calls(redis: Redis) -> Counter[str]:
    """How often each command ran since the statistics were reset."""
    stats = await redis.info("commandstats")
    return Counter({name.removeprefix("cmdstat_"): numbers["calls"] for name, numbers in stats.items()})


class RestartingRedis:
    """A Redis of its own on a port that stays, so that it can be killed and come back empty."""

    def __init__(self, port: int) -> None:
        self.port, self.url = port, f"redis://127.0.0.1:{port}/0"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        options = ["--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
        self._process = subprocess.Popen([str(find_program()), *options], stdout=subprocess.DEVNULL)
        with sync_redis.Redis.from_url(self.url) as client:
            wait_until_sync(lambda: _answers(client), "the private Redis to answer")

    def pause(self) -> None:
        """It accepts connections, and says nothing."""
        assert self._process
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        assert self._process
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        if self._process:
            self._process.kill()
            self._process.wait()
        self._process = None


def _answers(client: sync_redis.Redis) -> bool:
    with suppress(sync_redis.RedisError):
        return bool(client.ping())
    return False


@contextmanager
def restarting_redis(port: int) -> Iterator[RestartingRedis]:
    """Started; killed at the end."""
    server = RestartingRedis(port)
    server.start()
    try:
        yield server
    finally:
        server.kill()
