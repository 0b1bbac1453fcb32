"""The application: which path is served by what, and how a refusal looks whichever way it comes about."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, WebSocketRoute

from pilotfish.edge_agent.http import bodies, openapi, page, routes, stream, wording
from pilotfish.edge_agent.http.faults import INVALID, Fault, fault
from pilotfish.edge_agent.http.operations import agent_operations
from pilotfish.edge_agent.http.service import Service
from pilotfish.edge_agent.http.status import Status
from pilotfish.protocol import http_operations
from pilotfish.protocol.errors import PilotfishError
from pilotfish.protocol.http_guard import Access, App, Guard
from pilotfish.protocol.http_operations import Operations

OPEN_PATHS = frozenset({"/"})  # the page's own file, which holds nothing; what it shows asks for the key


def application(service: Service, access: Access, operations: Operations | None = None) -> App:
    """The agent's API behind its guard; `drain` of the operations given begins its end."""
    chat = routes.Completions(service, bodies.ChatBody, wording.Chat)
    text = routes.Completions(service, bodies.CompletionBody, wording.Text)
    app = Starlette(
        routes=[
            Route("/v1/chat/completions", chat.__call__, methods=["POST"]),
            Route("/v1/completions", text.__call__, methods=["POST"]),
            Route("/v1/models", routes.models),
            Route("/v1/models/{id:path}", routes.model),
            Route("/v1/status", Status(service).__call__),
            Route("/openapi.json", openapi.show),
            Route("/", page.page),
            WebSocketRoute("/v1/stream", stream.stream),
            *http_operations.routes(operations or agent_operations(service, lambda: None)),
        ],
        exception_handlers={PilotfishError: _refused, HTTPException: _misdirected, Exception: _refused},
    )
    app.state.service = service
    known = frozenset(route.path for route in app.routes if isinstance(route, Route))
    return http_operations.Counted(Guard(app, access), known)


async def _refused(request: Request, error: Exception) -> Response:
    return _response(fault(error))


async def _misdirected(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = f"{request.method} {request.url.path}"
    sentence = f"{what} is not served here: /openapi.json lists what is"
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "bad_request")
    return _response(Fault(error.status_code, INVALID, code, sentence, None, dict(error.headers or {})))


def _response(told: Fault) -> Response:
    return Response(told.body, told.status, told.headers, "application/json")
