"""A worker or an agent of the fake pair in a process that may be killed, with a wrong clock and an older wire if asked.

    python -m pilotfish.bench.chaos_child worker URL NAME SWITCHES
    python -m pilotfish.bench.chaos_child agent  URL NAME

CHAOS_SKEW_SECONDS moves this process's wall clock, as on a device whose battery was out. CHAOS_WIRE=0 makes it write
an older form of every message (a field has another name), as a process that was not upgraded yet; everyone here reads
both. SIGUSR1 makes it tell how many metric series it has. CHAOS_FULL=N makes a stream full at N jobs, and a worker
say so each time it cuts one.

An agent takes submitted prompts, and runs the wishes that come by its standard input, one JSON line each; what becomes
of them goes to standard output.
"""

from __future__ import annotations

import os
import time

SKEW_SECONDS = float(os.environ.get("CHAOS_SKEW_SECONDS", "0"))
if SKEW_SECONDS:  # before anyone says `from time import time`
    _true, _true_ns = time.time, time.time_ns
    time.time = lambda: _true() + SKEW_SECONDS
    time.time_ns = lambda: _true_ns() + int(SKEW_SECONDS * 1e9)

import asyncio  # noqa: E402
import json  # noqa: E402
import signal  # noqa: E402
import sys  # noqa: E402
from collections.abc import Awaitable  # noqa: E402
from typing import Any  # noqa: E402

from pilotfish.bench.chaos_wire import read_both, write_older  # noqa: E402
from pilotfish.bench.children import say_ready  # noqa: E402

TOKEN_MS = 1.0
ALPHA = 0.75
ROUND_TIMEOUT_MS = 400
DRAIN_SECONDS = 20.0


async def work(url: str, name: str, switches: str) -> None:
    """A worker with the fake engine; a hung engine is found out within two seconds."""
    from pilotfish.cloud_worker.engines.spec import EngineSpec
    from pilotfish.cloud_worker.worker_process import WorkerSpec, run

    engine = EngineSpec("fake", switches, silence_seconds=2.0)
    await run(WorkerSpec(url, engine, name=name), ready=lambda *_: say_ready())


def full_at(jobs: int) -> None:
    """See CHAOS_FULL."""
    from pilotfish.bench.chaos_plan import FULL_STREAM
    from pilotfish.protocol import bounds, metrics

    bounds.JOBS_MAXLEN = jobs  # type: ignore[misc]
    metrics.TRIMMED.inc = lambda cut: print(FULL_STREAM, flush=True)  # type: ignore[method-assign, assignment, misc]


async def draft(url: str, name: str) -> None:
    """An agent, until SIGTERM; then it ends what it has begun for others."""
    from pilotfish.cloud_worker.engines.fake import fake_target
    from pilotfish.edge_agent.agent import Agent, Defaults, new_boot
    from pilotfish.edge_agent.drafters.fake import FakeDrafter
    from pilotfish.edge_agent.tokenizer import ByteTokenizer
    from pilotfish.protocol import fleet, keys
    from pilotfish.protocol.broker import EdgeBroker, connect

    redis = connect(url)
    target = await fleet.find_target(redis)
    broker = EdgeBroker(redis, keys.DEFAULT_TENANT, name, new_boot())
    drafter = FakeDrafter(fake_target, alpha=ALPHA, token_ms=TOKEN_MS)
    defaults = Defaults(round_timeout_ms=ROUND_TIMEOUT_MS, window=2)
    agent = Agent(drafter, ByteTokenizer(), (), broker, target, defaults)
    asked_to_end = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, asked_to_end.set)
    try:
        await agent.start(take_prompts=True)
        say_ready()
        serving = asyncio.create_task(_serve_wishes(agent))
        await asked_to_end.wait()
        await agent.drain(DRAIN_SECONDS)
        serving.cancel()
    finally:
        await agent.stop()


async def _serve_wishes(agent: Any) -> None:
    reader = asyncio.StreamReader(limit=1 << 20)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    running = set[asyncio.Task[None]]()
    while line := await reader.readline():
        task = asyncio.create_task(_serve_wish(agent, json.loads(line)))
        running.add(task)
        task.add_done_callback(running.discard)


async def _serve_wish(agent: Any, asked: dict[str, Any]) -> None:
    """Run it, and tell every token as it is committed."""
    from pilotfish.edge_agent.task import Task
    from pilotfish.protocol.errors import PilotfishError
    from pilotfish.protocol.messages import Sampling

    number, sampling = asked.pop("number"), Sampling(**asked.pop("sampling"))
    generation = agent.open(
        Task(tuple(asked.pop("prompt")), sampling=sampling, round_timeout_ms=ROUND_TIMEOUT_MS, **asked)
    )
    try:
        async for tokens in generation.run():
            _tell(number, ids=[token.id for token in tokens], origins=[token.origin for token in tokens])
        end = generation.finish
    except PilotfishError as error:
        end = f"{error.code}: {error}"
    finally:
        agent.close(generation)
    summary = generation.summary()
    _tell(number, end=end, rounds=summary.rounds, degraded=summary.degraded, local=summary.local)


def _tell(number: int, **what: Any) -> None:
    print(json.dumps({"number": number, **what}), flush=True)


def _tell_series() -> None:
    """How many metric series this process has."""
    from pilotfish.protocol.metrics import REGISTRY

    print(json.dumps({"series": sum(len(metric.samples) for metric in REGISTRY.collect())}), flush=True)


async def _telling_series(side: Awaitable[None]) -> None:
    """At SIGUSR1, by the loop: a handler of Python's own would interrupt a line that is being printed."""
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, _tell_series)
    await side


def main() -> None:
    """Entry point."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # until there is a loop
    read_both()
    if os.environ.get("CHAOS_WIRE") == "0":
        write_older()
    if full := os.environ.get("CHAOS_FULL"):
        full_at(int(full))
    side, *arguments = sys.argv[1:]
    asyncio.run(_telling_series(work(*arguments) if side == "worker" else draft(*arguments)))


if __name__ == "__main__":
    main()
