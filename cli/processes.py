"""Workers and agents as child processes: started, waited for, stopped in reverse order. Only what was started here.

A child is ready when its beat is in Redis. It sits in a process group of its own, so that Ctrl-C reaches only the
parent, and reads a pipe that ends with the parent, so that it never outlives one that was killed.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

from pilotfish.protocol import keys
from pilotfish.protocol.broker import RedisBytes, translated
from pilotfish.protocol.errors import Cancelled, PilotfishError
from pilotfish.protocol.inspection import text_hash

T = TypeVar("T")

READY_SECONDS = 330.0  # longer than a worker waits for its engine, so that it is the worker who tells why
STOP_SECONDS = 30.0
POLL_SECONDS = 0.05
AGAIN_SECONDS = 5.0  # longer than a clean end takes


@dataclass(frozen=True, slots=True)
class Child:
    """One `pilotfish worker` or `pilotfish agent`; its log is all it ever said."""

    role: str
    name: str
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def ended(self) -> bool:
        """Whether it is gone, by itself or stopped."""
        return self.process.poll() is not None

    def last_words(self) -> str:
        """Its own sentence if it ended with one, else how it ended and the last line of its log."""
        lines = self.log.read_text(errors="replace").strip().splitlines() or ["nothing was said"]
        if lines[-1].startswith("pilotfish: "):
            return lines[-1].removeprefix("pilotfish: ")[:600]
        code = self.process.poll() or 0
        return f"{f'signal {-code}' if code < 0 else f'exit code {code}'}, after: {lines[-1][:600]}"


class Children:
    """The processes of one `up` or `demo`, in the order of their start."""

    def __init__(self, redis_url: str, logs: Path, secrets: Mapping[str, str] | None = None) -> None:
        self.logs = logs
        self.running: list[Child] = []
        # what holds a password or a key stands in no argument list
        self._environment = {**os.environ, "PILOTFISH_REDIS_URL": redis_url, **(secrets or {})}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.shield(self.stop())

    def start(self, role: str, name: str, arguments: Sequence[str]) -> Child:
        """Start `pilotfish ROLE ARGUMENTS`."""
        log = self.logs / f"{role}.log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                [sys.executable, "-m", "pilotfish.cli.main", role, "--until-eof", *arguments],
                stdin=subprocess.PIPE, stdout=out, stderr=out, env=self._environment, start_new_session=True,
            )  # fmt: skip
        child = Child(role, name, process, log)
        self.running.append(child)
        return child

    async def ready(self, child: Child, beats: Callable[[], Awaitable[str]]) -> str:
        """What `beats` finds once the child beats. If it ends first: raises with its own sentence and exit code."""
        async with asyncio.timeout(READY_SECONDS):
            while not (found := await beats()):
                check_cancelled()
                if child.ended:
                    raise _failed(child)
                await asyncio.sleep(POLL_SECONDS)
        return found

    async def stop(self) -> None:
        """End all, the last started first; one that does not listen is killed by its id."""
        while self.running:
            child = self.running.pop()
            if not child.ended:
                child.process.send_signal(signal.SIGTERM)
            try:
                await asyncio.to_thread(child.process.wait, STOP_SECONDS)
            except subprocess.TimeoutExpired:
                child.process.kill()
                child.process.wait()
            assert child.process.stdin
            child.process.stdin.close()


def _failed(child: Child) -> PilotfishError:
    error = PilotfishError(f"the {child.role} did not start: {child.last_words()} (log: {child.log})")
    code = child.process.returncode
    error.exit_code = code if code in (2, 3) else 1
    return error


async def target_of_worker(redis: RedisBytes, name: str) -> str:
    """Id of the target a worker of this name serves, "" while none beats."""
    with translated():
        for target in await text_hash(redis, keys.TARGETS):
            if "engine" in await text_hash(redis, keys.beat(target, name)):
                return target
    return ""


async def agent_is_alive(redis: RedisBytes, tenant: str, name: str) -> str:
    """The agent's name once it takes prompts."""
    with translated():
        return name if await redis.exists(keys.agent_beat(tenant, name)) else ""


# --- the child's side ------------------------------------------------------------------------------------------


@asynccontextmanager
async def stop_signals() -> AsyncIterator[asyncio.Future[int]]:
    """A future that holds the number of the first SIGTERM or SIGINT."""
    loop = asyncio.get_running_loop()
    told: asyncio.Future[int] = loop.create_future()

    def tell(number: int) -> None:
        if not told.done():
            told.set_result(number)

    heard = [one for one in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(one) != signal.SIG_IGN]
    for number in heard:  # a background job's Ctrl-C is ignored, and stays so
        loop.add_signal_handler(number, tell, number)
    try:
        yield told
    finally:
        for number in heard:
            loop.remove_signal_handler(number)


def run(work: Coroutine[Any, Any, T]) -> T:
    """asyncio.run for work that a signal cancels between two of its steps; raises Cancelled then."""
    return asyncio.run(_until_told(work))


async def _until_told(work: Coroutine[Any, Any, T]) -> T:
    async with stop_signals() as told:
        task = asyncio.ensure_future(work)
        await either(task, told)
        if task.done():
            return task.result()
        while not task.done():
            task.cancel()
            await asyncio.wait({task}, timeout=AGAIN_SECONDS)
        raise Cancelled("stopped")


def check_cancelled() -> None:
    """Raise CancelledError if this task was cancelled and something swallowed it.

    redis-py sends every command through asyncio.wait_for, which on Python 3.11 forgets a cancellation that arrives when
    the command has just been sent. Loops over Redis call this once a turn.
    """
    task = asyncio.current_task()
    if task and task.cancelling():
        raise asyncio.CancelledError


async def either(one: asyncio.Future[Any], other: asyncio.Future[Any]) -> None:
    """Until one of the two is done."""
    await asyncio.wait({one, other}, return_when=asyncio.FIRST_COMPLETED)


def end_with_parent() -> None:
    """Send ourselves a SIGTERM when standard input ends, which is when the parent does."""
    import threading

    def wait() -> None:
        while os.read(0, 1024):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True, name="until-eof").start()
