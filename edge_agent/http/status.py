"""GET /v1/status: what the dashboard shows, one JSON object. Sums since the agent began; rates are the page's business.

A look at Redis costs a few dozen commands, so all who ask within half a second share one. Where Redis has users, an
edge's may not look: then `limited` is true, and all there is to see is who serves.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any, get_args

from starlette.requests import Request
from starlette.responses import Response

from pilotfish.edge_agent.http.operations import rtt_ms
from pilotfish.edge_agent.http.service import Service
from pilotfish.protocol import inspection, metrics
from pilotfish.protocol.broker import EdgeBroker
from pilotfish.protocol.errors import BrokerError, BrokerRefused
from pilotfish.protocol.fleet import Target
from pilotfish.protocol.messages import Mode

FRESH_SECONDS = 0.5
LOOK_SECONDS = 2.0


class Status:
    """The route; one object per application."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self._looking: asyncio.Task[dict[str, Any]] | None = None
        self._looked_at = float("-inf")
        self._limited = False  # learnt at the first refusal, so that Redis' log does not fill with the others

    async def __call__(self, request: Request) -> Response:
        """GET /v1/status."""
        told = {**self._own(), "cloud": await self._cloud()}
        return Response(json.dumps(told), media_type="application/json")

    def _own(self) -> dict[str, Any]:
        service, agent = self.service, self.service.agent
        turnstile = service.turnstile
        return {
            "agent": agent.broker.agent if agent.broker else None,
            "draft": agent.drafter.info.model,
            "target": agent.target.name if agent.target else None,
            "mode": service.wanted.mode if agent.target else "edge_only",
            "modes": list(get_args(Mode)),
            "models": service.models,
            "max_disagreement": agent.defaults.max_disagreement,
            "draining": service.draining,
            "running": len(agent.generations),
            "waiting": turnstile.waiting,
            "places": turnstile.places,
            "sums": {name: int(value) for name, value in metrics.told().items()},
            "metrics": metrics.plain(),
        }

    async def _cloud(self) -> dict[str, Any] | None:
        """Workers and queues as Redis shows them; a reason instead where it does not. None for an agent alone."""
        if self.service.agent.broker is None:
            return None
        clock = asyncio.get_running_loop().time
        if self._looking is None or clock() - self._looked_at > FRESH_SECONDS:
            self._looked_at, self._looking = clock(), asyncio.create_task(self._look())
        return await asyncio.shield(self._looking)

    async def _look(self) -> dict[str, Any]:
        agent = self.service.agent
        assert agent.broker is not None
        try:
            async with asyncio.timeout(LOOK_SECONDS):
                rtt = await rtt_ms(agent)
                found = await self._seen(agent.broker, agent.target)
        except TimeoutError:
            return {"reason": f"Redis did not answer within {LOOK_SECONDS:g} s"}
        except BrokerError as error:
            return {"reason": str(error)}
        return {"rtt_ms": rtt, "limited": self._limited, **found.as_json()}

    async def _seen(self, broker: EdgeBroker, target: Target | None) -> inspection.Queue:
        if not self._limited:
            try:
                return await inspection.look(broker.redis, broker.tenant)
            except BrokerRefused:
                if target is None:
                    raise
                self._limited = True
        assert target is not None
        return await inspection.who_serves(broker.redis, target.id, target.name)
