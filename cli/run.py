"""`up`, `worker` and `agent`: the processes that serve, one at a time or all together."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pilotfish.cli.options import ACCESS, BROKER, DRAFT, MACHINE, REQUEST, SERVE, TARGET, TENANTS, TRACE, takes
from pilotfish.cli.talk import say

if TYPE_CHECKING:
    from asyncio import Future
    from contextlib import AsyncExitStack

    from pilotfish.edge_agent.agent import Agent
    from pilotfish.edge_agent.http.service import Service
    from pilotfish.protocol.settings import Settings

WAIT_SECONDS = 10.0  # an agent that starts before its worker is no error yet
DRAIN_SECONDS = 20.0

Serve = Annotated[bool, typer.Option("--serve", help="Serve OpenAI's API and a page to watch, on --serve-port.")]
UntilEof = Annotated[bool, typer.Option("--until-eof", hidden=True, help="End when standard input does.")]


# --- worker --------------------------------------------------------------------------------------------------


@takes(*BROKER, *TARGET, *TENANTS, *MACHINE, *ACCESS, *TRACE)
def worker(
    settings: Settings,
    name: Annotated[str, typer.Option("--name", help="Name of this worker; unset: made up.")] = "",
    until_eof: UntilEof = False,
) -> None:
    """Serve a target model: verify drafts and continue texts for agents. SIGTERM drains, then ends."""
    import asyncio

    from pilotfish.cli.processes import end_with_parent
    from pilotfish.cli.redis_url import redis_url
    from pilotfish.cloud_worker.launch import worker_spec
    from pilotfish.protocol.tracing import exporting

    spec = worker_spec(settings, redis_url(settings), name)
    if until_eof:
        end_with_parent()
    with exporting("pilotfish-worker", settings.otlp_endpoint):
        ended_by = asyncio.run(_worker(settings, spec))
    if ended_by:
        raise typer.Exit(_code(ended_by))


async def _worker(settings: Settings, spec: Any) -> int:
    """Serve until a signal; returns its number. arq takes the signals over once the worker serves."""
    import asyncio

    from pilotfish.cli.processes import either, stop_signals
    from pilotfish.cli.redis_url import described
    from pilotfish.cloud_worker.worker_process import run

    interrupted: list[int] = []

    def drain() -> None:  # Ctrl-C drains as SIGTERM does; only the exit code differs
        interrupted.append(signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)

    def ready(target: Any, engine: Any) -> None:
        if told.done():  # the cancellation may have been lost: wait_for of Python 3.11 swallows one now and then
            raise asyncio.CancelledError
        asyncio.get_running_loop().add_signal_handler(signal.SIGINT, drain)
        say(f"worker ready: {engine.info.engine} {engine.info.version}, model {target.name}, target {target.id}")
        say(f"Redis: {described(settings)}")

    async with stop_signals() as told:
        model = "the fake target" if spec.engine.engine == "fake" else spec.engine.model
        say(f"loading {model} ({spec.engine.engine})")
        serving = asyncio.create_task(run(spec, ready=ready))
        await either(serving, told)
        if told.done():
            serving.cancel()
        (end,) = await asyncio.gather(serving, return_exceptions=True)
        if isinstance(end, Exception):
            raise end
        return told.result() if told.done() else max(interrupted, default=0)


# --- agent ---------------------------------------------------------------------------------------------------


@takes(*BROKER, "target", "agent", *DRAFT, *MACHINE, *REQUEST, *SERVE, *TRACE)
def agent(settings: Settings, serve: Serve = False, until_eof: UntilEof = False) -> None:
    """Take submitted prompts on this device: draft here, have the cloud verify. SIGTERM drains, then ends.

    With --serve it answers OpenAI's clients too; with --serve --mode edge_only it does so alone, without any Redis.
    """
    import asyncio

    from pilotfish.cli.processes import end_with_parent
    from pilotfish.cli.redis_url import redis_url
    from pilotfish.protocol.tracing import exporting

    alone = serve and settings.mode == "edge_only" and not settings.redis_url
    url = None if alone else redis_url(settings)
    if until_eof:
        end_with_parent()
    fetch_draft(settings)
    with exporting("pilotfish-agent", settings.otlp_endpoint):
        ended_by = asyncio.run(_agent(settings, url, serve))
    if ended_by:
        raise typer.Exit(_code(ended_by))


def fetch_draft(settings: Settings) -> None:
    """A draft on a hub comes before the event loop runs, so that Ctrl-C ends a long download."""
    from pilotfish.cache.hub_name import is_hub_name
    from pilotfish.cache.presets import with_preset
    from pilotfish.edge_agent.launch import draft_path

    if is_hub_name(with_preset(settings).draft_model or ""):
        draft_path(settings)


async def _agent(settings: Settings, url: str | None, serve: bool) -> int:
    import asyncio

    from pilotfish.cli.processes import either, stop_signals

    async with stop_signals() as told:
        opening = asyncio.create_task(patient_agent(settings, url))
        await either(opening, told)
        if told.done():
            opening.cancel()
            return told.result()
        running = opening.result()
        try:
            await _serve(settings, running, told, serve)
        finally:
            await running.stop()
        return told.result()


async def _serve(settings: Settings, running: Agent, told: Future[int], serve: bool) -> None:
    """Until the signal, then until what runs is finished or DRAIN_SECONDS are over."""
    import asyncio
    from contextlib import AsyncExitStack

    async with AsyncExitStack() as stack:
        service = await _open_http(stack, settings, running, serve)
        await running.start(take_prompts=True)
        _say_ready(settings, running)
        await told
        finishing = [running.drain(DRAIN_SECONDS), *([service.drained(DRAIN_SECONDS)] if service else [])]
        await asyncio.gather(*finishing)


async def _open_http(stack: AsyncExitStack, settings: Settings, running: Agent, serve: bool) -> Service | None:
    """The API, or metrics and health alone, or nothing; ready before the agent says that it is."""
    if not serve and settings.metrics_port is None:
        return None
    from pilotfish.protocol.errors import SettingsError

    try:
        from pilotfish.edge_agent.http.serve import serve_api, serve_operations, service_of
    except ImportError as error:
        fix = "pip install 'pilotfish[edge]'"
        raise SettingsError(f"--serve and --metrics-port need {error.name}: {fix}, or leave them out") from None
    service = service_of(settings, running)
    open_http = serve_api if serve else serve_operations
    url = await stack.enter_async_context(open_http(settings, service, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    say(f"API: {url}/v1, page: {url}" if serve else f"metrics and health: {url}")
    return service


def _say_ready(settings: Settings, running: Agent) -> None:
    from pilotfish.cli.redis_url import described

    draft = running.drafter.info.model
    if running.broker is None or running.target is None:
        say(f"agent ready: draft {draft}, alone")
        return
    say(f"agent {running.broker.agent} ready: draft {draft}, target {running.target.name}")
    say(f"Redis: {described(settings)}")


async def patient_agent(settings: Settings, url: str | None) -> Agent:
    """An open agent; waits a while for a worker that is still loading. Raises NoWorker when none comes."""
    import asyncio

    from pilotfish.cli.processes import check_cancelled
    from pilotfish.edge_agent.launch import open_agent
    from pilotfish.protocol.errors import NoWorker

    deadline = asyncio.get_running_loop().time() + WAIT_SECONDS
    waiting = False
    while True:
        try:
            return await open_agent(settings, url)
        except NoWorker:
            if asyncio.get_running_loop().time() > deadline:
                raise
        if not waiting:
            say(f"no worker yet: waiting {WAIT_SECONDS:.0f} s for one")
        waiting = True
        check_cancelled()
        await asyncio.sleep(0.25)


def _code(number: int) -> int:
    """SIGINT is the user's Ctrl-C; SIGTERM is how a service is meant to end."""
    return 130 if number == signal.SIGINT else 0


# --- up ------------------------------------------------------------------------------------------------------


@takes(*BROKER, *TARGET, *DRAFT, *MACHINE, *REQUEST, *SERVE, *TRACE)
def up(settings: Settings, serve: Serve = False) -> None:
    """Start all of it here: a private Redis unless REDIS_URL is set, a worker and an agent. Ctrl-C ends all."""
    import asyncio

    if settings.preset or settings.draft_model or settings.target_model:
        _fetch_both(settings)
    ended_by = asyncio.run(_up(settings, serve))
    raise typer.Exit(_code(ended_by))


def _fetch_both(settings: Settings) -> None:
    """Before anything is started that would wait for a download."""
    from pilotfish.cloud_worker.launch import choose_engine, target_path

    fetch_draft(settings)
    target_path(settings, choose_engine(settings.engine))


async def _up(settings: Settings, serve: bool) -> int:
    import asyncio
    import shutil

    from pilotfish.cli.pair import Pair, logs_folder, some_redis
    from pilotfish.cli.processes import either, stop_signals

    logs = logs_folder()
    async with stop_signals() as told:
        with some_redis(settings) as (url, words):
            say(f"Redis: {words}")
            async with Pair(settings, url, logs, serve=serve) as pair:
                starting = asyncio.create_task(pair.start(say))
                await either(starting, told)
                if not told.done():
                    starting.result()
                    if serve:
                        say(pair.served())
                    say("ready: try `pilotfish submit 'What is 12 plus 30?'` in another shell; Ctrl-C ends all")
                    await pair.until_one_ends(told)
                starting.cancel()
                await asyncio.gather(starting, return_exceptions=True)
                say("stopping: agent, worker" + (", Redis" if words.startswith("private") else ""))
        shutil.rmtree(logs, ignore_errors=True)  # kept only when something went wrong
        return told.result()
