"""The application: which path is served by what, and how a refusal looks whichever way it comes about."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from pilotfish.edge_agent.http import bodies, routes, wording
from pilotfish.edge_agent.http.calls import Service
from pilotfish.edge_agent.http.faults import INVALID, Fault, fault
from pilotfish.protocol.errors import PilotfishError
from pilotfish.protocol.http_guard import Access, App, Guard


def application(service: Service, access: Access) -> App:
    """The agent's API behind its guard."""
    chat = routes.Completions(service, bodies.ChatBody, wording.Chat)
    text = routes.Completions(service, bodies.CompletionBody, wording.Text)
    app = Starlette(
        routes=[
            Route("/v1/chat/completions", chat.__call__, methods=["POST"]),
            Route("/v1/completions", text.__call__, methods=["POST"]),
            Route("/v1/models", routes.models),
            Route("/v1/models/{id:path}", routes.model),
        ],
        exception_handlers={PilotfishError: _refused, HTTPException: _misdirected, Exception: _refused},
    )
    app.state.service = service
    return Guard(app, access)


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
