"""What an operator asks of an agent or a worker over HTTP, the same on both: /metrics, /health, /ready, /drain.

    GET  /metrics   Prometheus' text                         GET /ready   503 with the reason: send it nothing now
    GET  /health    503 with the reason: restart it          POST /drain  202: finish what runs, take nothing new, end

A check that hangs is a failed one. The one owner of what both sides' servers share; knows no agent and no worker.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pilotfish.protocol import metrics
from pilotfish.protocol.errors import PilotfishError
from pilotfish.protocol.http_guard import App, Receive, Scope, Send

if TYPE_CHECKING:
    from starlette.routing import Route

log = logging.getLogger("pilotfish.http")

CHECK_SECONDS = 2.0
POLLED = frozenset({"/metrics", "/health", "/ready", "/v1/status"})  # asked for every few seconds: no news
Check = Callable[[], Awaitable[dict[str, Any]]]  # what to tell; raises PilotfishError for a no


@dataclass(frozen=True, slots=True)
class Operations:
    """How a process answers; `drain` begins its end and returns at once, with what still runs."""

    health: Check
    ready: Check
    drain: Callable[[], dict[str, Any]]


def routes(operations: Operations) -> list[Route]:
    """The four routes."""
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route

    async def show_metrics(request: Request) -> Response:
        from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

        return Response(generate_latest(metrics.REGISTRY), headers={"content-type": CONTENT_TYPE_LATEST})

    async def health(request: Request) -> Response:
        return _json(*await _checked(operations.health))

    async def ready(request: Request) -> Response:
        return _json(*await _checked(operations.ready))

    async def drain(request: Request) -> Response:
        return _json(202, {"status": "draining", **operations.drain()})

    def _json(status: int, body: dict[str, Any]) -> Response:
        return Response(json.dumps(body), status, media_type="application/json")

    return [
        Route("/metrics", show_metrics),
        Route("/health", health),
        Route("/ready", ready),
        Route("/drain", drain, methods=["POST"]),
    ]


async def _checked(check: Check) -> tuple[int, dict[str, Any]]:
    try:
        async with asyncio.timeout(CHECK_SECONDS):
            return 200, {"status": "ok", **await check()}
    except TimeoutError:
        return 503, {"status": "failing", "reason": f"no answer within {CHECK_SECONDS:g} s"}
    except PilotfishError as error:
        return 503, {"status": "failing", "reason": str(error)}


class Counted:
    """ASGI middleware: counts and logs every request. `known` bounds the label; anything else is "other"."""

    def __init__(self, app: App, known: frozenset[str]) -> None:
        self.app, self.known = app, known

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, and look at the status that comes back."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status, since = 499, time.monotonic()  # 499: the client left before there was an answer

        async def watched(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, watched)
        finally:
            self._note(scope, status, time.monotonic() - since)

    def _note(self, scope: Scope, status: int, seconds: float) -> None:
        route = scope["path"] if scope["path"] in self.known else "other"
        metrics.REQUESTS.labels(route, str(status)).inc()
        about = {"method": scope["method"], "route": route, "status": status, "ms": round(seconds * 1000, 1)}
        level = logging.DEBUG if route in POLLED and status < 400 else logging.INFO
        log.log(level, "%(method)s %(route)s %(status)s %(ms)s ms", about, extra=about)


def operations_app(operations: Operations) -> App:
    """A server's app that has nothing but these routes."""
    from starlette.applications import Starlette

    own = routes(operations)
    return Counted(Starlette(routes=own), frozenset(route.path for route in own))
