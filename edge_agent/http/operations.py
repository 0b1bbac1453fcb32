"""What an agent answers to an operator: is it well, may it be sent requests, begin its end."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from pilotfish.edge_agent.agent import Agent
from pilotfish.edge_agent.http.service import Service
from pilotfish.protocol import metrics
from pilotfish.protocol.broker import translated
from pilotfish.protocol.errors import Draining, NoWorker
from pilotfish.protocol.http_operations import Operations


def agent_operations(service: Service, end: Callable[[], None]) -> Operations:
    """`end` begins the end of the process, as SIGTERM does; what runs is finished first."""

    async def health() -> dict[str, Any]:
        return {"running": len(service.agent.generations)}

    async def ready() -> dict[str, Any]:
        if service.draining:
            raise Draining("this agent is ending and takes nothing new")
        wanted = service.wanted.mode != "edge_only"
        return {"workers": await live_workers(service.agent) if wanted else 0, "rtt_ms": await rtt_ms(service.agent)}

    def drain() -> dict[str, Any]:
        service.draining = True
        end()
        return {"running": len(service.agent.generations)}

    return Operations(health, ready, drain)


async def live_workers(agent: Agent) -> int:
    """Workers of its target. Raises NoWorker or BrokerError; an agent that works alone needs none."""
    if agent.broker is None or agent.target is None:
        return 0
    count = await agent.broker.live_workers(agent.target.id)
    if not count:
        raise NoWorker(f"no worker serves {agent.target.name}: start one with `pilotfish worker`")
    return count


async def rtt_ms(agent: Agent) -> float | None:
    """A PING to Redis and back; None without one. Raises BrokerError."""
    if agent.broker is None:
        return None
    since = time.perf_counter()
    with translated():
        await agent.broker.redis.ping()
    seconds = time.perf_counter() - since
    metrics.RTT_SECONDS.set(seconds)
    return round(seconds * 1000, 3)
