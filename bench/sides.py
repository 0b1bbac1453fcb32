"""Worker and agent in one process, for benchmarks that run the whole path, and which cores each side gets."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager

from pilotfish.bench.echo import ended
from pilotfish.cloud_worker.worker_process import WorkerSpec
from pilotfish.cloud_worker.worker_process import run as run_worker
from pilotfish.edge_agent.agent import Agent, new_boot
from pilotfish.edge_agent.drafters.base import Drafter
from pilotfish.edge_agent.tokenizer import Tokenizer
from pilotfish.protocol import cores, fleet, keys
from pilotfish.protocol.broker import EdgeBroker, connect


def engine_cores() -> list[int]:
    """The upper half of the machine, [] (anywhere) if there is one core or no way to bind."""
    usable = cores.available()
    return usable[len(usable) // 2 :] if len(usable) > 1 and hasattr(os, "sched_setaffinity") else []


def edge_cores() -> list[int]:
    """What the engine leaves."""
    return [core for core in cores.available() if core not in engine_cores()]


@contextmanager
def on_cores(chosen: Sequence[int]) -> Iterator[None]:
    """Keep this thread and those it starts on some cores; what it starts cannot leave them, so start engines before."""
    before = cores.available()
    cores.bind(",".join(map(str, chosen)))
    try:
        yield
    finally:
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, before)


@asynccontextmanager
async def worker(spec: WorkerSpec) -> AsyncIterator[None]:
    """A worker in this process, ready to serve. Raises what its start-up raises."""
    ready, user = asyncio.Event(), asyncio.current_task()
    assert user

    def gone(_: object) -> None:
        """It died, or a signal ended it: no answer would ever come."""
        user.cancel()

    running = asyncio.create_task(run_worker(spec, ready=lambda *_: ready.set()))
    waiting = asyncio.create_task(ready.wait())
    try:
        await asyncio.wait({running, waiting}, return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            running.result()
        running.add_done_callback(gone)
        yield
    finally:
        waiting.cancel()
        running.remove_done_callback(gone)
        await ended(running)


@asynccontextmanager
async def agent(
    url: str, drafter: Drafter, tokenizer: Callable[[fleet.Target], Tokenizer], stop_ids: Iterable[int] = ()
) -> AsyncIterator[Agent]:
    """An agent with this drafter for the one target alive; it closes the drafter."""
    redis = connect(url)
    target = await fleet.find_target(redis)
    stops = sorted({*stop_ids, *target.vocabulary.stop_ids})
    broker = EdgeBroker(redis, keys.DEFAULT_TENANT, "bench", new_boot())
    running = Agent(drafter, tokenizer(target), stops, broker, target)
    await running.start()
    try:
        yield running
    finally:
        await running.stop()
