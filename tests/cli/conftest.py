"""Running the command as a process, and a worker and an agent on the fake pair for it to talk to."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest

from logins import login
from pilotfish.protocol.settings import Settings

Cli = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(autouse=True)
def bare_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No settings and no private Redis of whoever runs the tests; plain output."""
    for name in [name for name in os.environ if name.startswith("PILOTFISH_")]:
        monkeypatch.delenv(name)
    for name in ("REDIS_URL", "FORCE_COLOR", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def cli() -> Cli:
    """`cli("submit", "hi", env={...}, input="...")` in a process of its own."""

    def run(*args: str, env: dict[str, str] | None = None, input: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "pilotfish.cli.main", *args],
            env={**os.environ, **(env or {})}, input=input, capture_output=True, text=True, timeout=60,
        )  # fmt: skip

    return run


@asynccontextmanager
async def fake_worker(redis_url: str) -> AsyncIterator[None]:
    from pilotfish.cloud_worker.engines.spec import EngineSpec
    from pilotfish.cloud_worker.worker_process import WorkerSpec, run

    started = asyncio.Event()
    spec = WorkerSpec(login(redis_url, "worker"), EngineSpec("fake", ""), name="w1", model_name="fake-target")
    task = asyncio.create_task(run(spec, ready=lambda *_: started.set()))
    await asyncio.wait_for(started.wait(), 30)
    yield
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


@asynccontextmanager
async def fake_agent(redis_url: str) -> AsyncIterator[None]:
    from pilotfish.cloud_worker.engines.fake import fake_target
    from pilotfish.edge_agent.agent import Agent, new_boot
    from pilotfish.edge_agent.drafters.fake import FakeDrafter
    from pilotfish.edge_agent.tokenizer import ByteTokenizer
    from pilotfish.protocol import fleet
    from pilotfish.protocol.broker import EdgeBroker, connect

    redis = connect(login(redis_url, "default+agent"))
    target = await fleet.find_target(redis)
    broker = EdgeBroker(redis, "default", "edge1", new_boot())
    agent = Agent(FakeDrafter(fake_target, alpha=0.7), ByteTokenizer(), (), broker, target)
    await agent.start(take_prompts=True)
    yield
    await agent.stop()


@pytest.fixture
async def rig(redis_url: str) -> AsyncIterator[Settings]:
    """A worker and an agent on the fake pair, and settings that lead to them."""
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(fake_worker(redis_url))
        await stack.enter_async_context(fake_agent(redis_url))
        yield Settings(redis_url=redis_url)
