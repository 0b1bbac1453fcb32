"""What `up` and `demo` start: a worker and an agent of this machine, off each other's cores, and a Redis for them."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

from pilotfish.cli import redis_server
from pilotfish.cli.options import BROKER, DRAFT, MACHINE, REQUEST, SERVE, TARGET, TRACE, written
from pilotfish.cli.processes import Child, Children, agent_is_alive, target_of_worker
from pilotfish.cli.redis_url import described, redis_url
from pilotfish.cloud_worker.launch import choose_engine, vllm_version
from pilotfish.protocol import cores, keys
from pilotfish.protocol.broker import connect, ping
from pilotfish.protocol.errors import PilotfishError
from pilotfish.protocol.inspection import text_hash
from pilotfish.protocol.settings import ENV_PREFIX, Settings

SECRETS = (
    "api_key",
    "metrics_key",
    "cache_key",
)  # told through the environment: argument lists can be read by everyone
WORKER_OPTIONS = (*BROKER[1:], *TARGET, *MACHINE, *TRACE)
AGENT_OPTIONS = (*BROKER[1:], *DRAFT, *MACHINE, *REQUEST, *SERVE, *TRACE)


@contextlib.contextmanager
def some_redis(settings: Settings, *, own: bool = False) -> Iterator[tuple[str, str]]:
    """(URL, words) of the Redis that is set, else of the private one that runs, else of one started for this block.

    With `own` a private one is started in any case but a set REDIS_URL; it does not take the other's runtime file.
    """
    if settings.redis_url:
        yield redis_url(settings), described(settings)
        return
    found = redis_server.find()
    if found and not own:
        yield found.url, f"the private one that already runs, {found.server}"
        return
    with contextlib.ExitStack() as stack:
        file = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "redis.json" if found else None
        started = stack.enter_context(redis_server.private_redis(file))
        yield started.url, f"private, {started.server}"


def logs_folder() -> Path:
    """A fresh folder for the children's logs."""
    return Path(tempfile.mkdtemp(prefix="pilotfish-logs-"))


def split_cores(allowed: list[int]) -> tuple[str, str]:
    """(worker's, agent's) cores: the agent drafts on the last one; a single core is shared.

    Two engines on one core slow each other down about twentyfold, so they never share by accident.
    """
    if len(allowed) == 1:
        return str(allowed[0]), str(allowed[0])
    return ",".join(map(str, allowed[:-1])), str(allowed[-1])


def allowed_cores(settings: Settings) -> list[int]:
    """The cores that are set, else those this process may use."""
    return cores.parse(settings.cores) or cores.available()


def arguments(settings: Settings, names: tuple[str, ...], **more: str) -> list[str]:
    """What a child is told: the command line's settings it takes (it reads environment and file itself), and `more`."""
    origins = settings.origins()
    given = {name: getattr(settings, name) for name in names if origins[name] == "cli" and name not in SECRETS}
    return [word for name, value in {**given, **more}.items() for word in written(name, value)]


class Pair:
    """One worker and one agent as child processes. After `start`: the target's id and what the two are called."""

    def __init__(self, settings: Settings, url: str, logs: Path, *, serve: bool = False) -> None:
        self.settings, self.url, self.serve = settings, url, serve
        self.children = Children(url, logs, secrets_of(settings))
        self.redis = connect(url)
        tail = secrets.token_hex(2)
        self.worker_name, self.agent_name = f"up-worker-{tail}", settings.agent or f"up-agent-{tail}"
        self.target = ""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.shield(self.children.stop())
        await self.redis.aclose()

    async def start(self, say: Callable[[str], None]) -> None:
        """Worker, then agent, each until it beats. Raises with the sentence of the one that could not start."""
        await ping(self.redis, self.url)
        for_worker, for_agent = split_cores(allowed_cores(self.settings))
        say(f"logs: {self.children.logs}")
        await self._start_worker(for_worker, say)
        await self._start_agent(for_agent, say)
        if for_worker == for_agent:
            say(f"note: worker and agent share core {for_worker}, the only one there is: figures will be poor")

    async def _start_worker(self, cores: str, say: Callable[[str], None]) -> None:
        slow = " (half a minute the first time)" if choose_engine(self.settings.engine) == "vllm" else ""
        say(f"starting a worker, which loads the target{slow}, then an agent")
        told = arguments(self.settings, WORKER_OPTIONS, cores=cores, name=self.worker_name)
        child = self.children.start("worker", self.worker_name, told)
        self.target = await self.children.ready(child, lambda: target_of_worker(self.redis, self.worker_name))
        say(f"worker: {await self._engine()} on core {cores}, process {child.process.pid}")

    async def _start_agent(self, cores: str, say: Callable[[str], None]) -> None:
        told = arguments(self.settings, AGENT_OPTIONS, cores=cores, agent=self.agent_name, target=self.target)
        child = self.children.start("agent", self.agent_name, [*told, *(["--serve"] if self.serve else [])])
        tenant = self.settings.tenant
        await self.children.ready(child, lambda: agent_is_alive(self.redis, tenant, self.agent_name))
        say(f"agent: llama.cpp draft on core {cores}, process {child.process.pid}")

    def served(self) -> str:
        """The agent's own line that says where its API and page are."""
        lines = self.children.running[-1].log.read_text(errors="replace").splitlines()
        return next((line for line in lines if line.startswith("API: ")), "API: see the agent's log")

    async def _engine(self) -> str:
        beat = await text_hash(self.redis, keys.beat(self.target, self.worker_name))
        why = " (vLLM is not installed)" if self.settings.engine == "auto" and not vllm_version() else ""
        return f"{beat.get('engine', '')}{why}, model {beat.get('model', '')},"

    async def until_one_ends(self, told: asyncio.Future[int]) -> None:
        """Return at the signal. Raises when a child ends that was not asked to."""
        while not told.done():
            if gone := next((child for child in self.children.running if child.ended), None):
                raise _gone(gone)
            await asyncio.wait({told}, timeout=0.2)


def secrets_of(settings: Settings) -> dict[str, str]:
    """Keys as environment variables."""
    held = {name: getattr(settings, name) for name in SECRETS}
    return {f"{ENV_PREFIX}{name.upper()}": key.get_secret_value() for name, key in held.items() if key}


def _gone(child: Child) -> PilotfishError:
    return PilotfishError(f"the {child.role} ended: {child.last_words()} (log: {child.log})")
