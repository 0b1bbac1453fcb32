"""The same with a real engine: two llama.cpp workers, one of which is killed, and then the other's engine."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path

import pytest
from contracts.tiny_gguf import write_tiny_gguf
from redis.asyncio import Redis
from rigs import children

from helpers import wait_until
from pilotfish.cli.requests import Answer
from pilotfish.protocol import keys
from pilotfish.protocol.messages import Prompt, Sampling
from pilotfish.protocol.shell import ShellBroker

pytestmark = [pytest.mark.llamacpp, pytest.mark.slow]
WARM = Sampling(temperature=1.0, seed=5)


@asynccontextmanager
async def started(*arguments: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """A command of ours, once it is ready."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "pilotfish.cli.main", *arguments, stderr=asyncio.subprocess.PIPE
    )
    assert process.stderr
    try:
        async with asyncio.timeout(60):
            while b"ready" not in (line := await process.stderr.readline()):
                assert line, f"pilotfish {' '.join(arguments)} ended before it was ready"
        yield process
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.communicate()


async def answered(shell: ShellBroker, prompt: Prompt) -> list[int]:
    answer = Answer(prompt.request)
    async with asyncio.timeout(60):
        async for message in shell.output(prompt.request, follow=True):
            answer.add(message)
    answer.check()
    return answer.ids


def asked() -> Prompt:
    return Prompt(request=secrets.token_hex(16), text="hello", raw=True, max_tokens=400, sampling=WARM)


async def test_killing_workers_and_engines_leaves_the_text_as_it_was(
    redis: Redis, redis_url: str, tmp_path: Path
) -> None:
    target, draft = (str(write_tiny_gguf(tmp_path / f"{name}.gguf", seed=seed)) for name, seed in (("t", 7), ("d", 8)))
    common = ("--redis-url", redis_url, "--context", "1000")
    shell = ShellBroker(redis, keys.DEFAULT_TENANT)
    serve = ("worker", "--engine", "llamacpp", "--target-model", target, *common)
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(started(*serve))
        drafting = ("--drafting", "always", "--round-timeout-ms", "2000")  # left alone it cedes to a target this fast
        await stack.enter_async_context(started("agent", "--draft-model", draft, *drafting, *common))
        await shell.submit(calm := asked())
        expected = await answered(shell, calm)
        second = await stack.enter_async_context(started(*serve))
        await shell.submit(hurt := asked())
        answering = asyncio.create_task(answered(shell, hurt))
        output = keys.output(keys.DEFAULT_TENANT, hurt.request)
        await wait_until(lambda: long(redis, output, 20), "some text")
        first.send_signal(signal.SIGKILL)
        heard = await redis.xlen(output)
        await wait_until(lambda: answering.done() or long(redis, output, heard + 20), "more text", timeout=30)
        for engine in children(second.pid):
            os.kill(engine, signal.SIGKILL)
        got = await answering
    assert len(expected) > 20
    assert got == expected


async def long(redis: Redis, stream: str, length: int) -> bool:
    return int(await redis.xlen(stream)) >= length
