"""From settings to a served agent: the API with its page, or metrics and health alone."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

from pilotfish.edge_agent.agent import Agent
from pilotfish.edge_agent.http import profiles
from pilotfish.edge_agent.http.app import OPEN_PATHS, application
from pilotfish.edge_agent.http.operations import agent_operations
from pilotfish.edge_agent.http.profiles import Bearer
from pilotfish.edge_agent.http.service import Service, Wanted
from pilotfish.edge_agent.http.turnstile import Turnstile
from pilotfish.edge_agent.launch import sampling
from pilotfish.protocol.errors import SettingsError
from pilotfish.protocol.http_guard import Guard, access
from pilotfish.protocol.http_operations import operations_app
from pilotfish.protocol.http_server import serving
from pilotfish.protocol.settings import Settings


def service_of(settings: Settings, agent: Agent) -> Service:
    """An agent with the settings as what a request gets where it does not say otherwise."""
    wanted = Wanted(
        mode=settings.mode,
        on_cloud_loss=settings.on_cloud_loss,
        max_tokens=settings.max_tokens,
        sampling=sampling(settings),
        seed=settings.seed,
        deadline_ms=settings.deadline_ms,
    )
    return Service(agent, wanted, Turnstile(settings.serve_requests, settings.serve_waiting))


@asynccontextmanager
async def serve_api(settings: Settings, service: Service, end: Callable[[], None]) -> AsyncIterator[str]:
    """The API for the block; gives its URL. `end` is called by POST /drain. Raises SettingsError."""
    who = replace(access(settings, OPEN_PATHS), bearer=_bearer(settings))
    app = application(service, who, agent_operations(service, end))
    async with serving(app, settings.serve_host, settings.serve_port, who.key) as url:
        yield url


def _bearer(settings: Settings) -> Callable[[Sequence[str]], Bearer | None] | None:
    """Who brings which key of the keys file, if there is one."""
    if settings.keys_file is None:
        return None
    if not settings.api_key:
        raise SettingsError(
            "a keys file alone leaves metrics and drain open: set PILOTFISH_API_KEY too, the key of this device's owner"
        )
    return profiles.read(settings.keys_file).bearer


@asynccontextmanager
async def serve_operations(settings: Settings, service: Service, end: Callable[[], None]) -> AsyncIterator[str]:
    """Metrics, health, ready and drain alone, on `metrics_port`."""
    who = access(settings)
    app = Guard(operations_app(agent_operations(service, end)), who)
    async with serving(app, settings.serve_host, settings.metrics_port or 0, who.key) as url:
        yield url
