"""The routes that OpenAI's clients know: chat completions, completions, models."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from starlette.requests import HTTPConnection, Request
from starlette.responses import Response

from pilotfish.edge_agent.http import bodies, wording
from pilotfish.edge_agent.http.answers import Model, Models
from pilotfish.edge_agent.http.calls import Call
from pilotfish.edge_agent.http.events import Answer, sse, streamed, whole
from pilotfish.edge_agent.http.profiles import Bearer
from pilotfish.edge_agent.http.service import Service
from pilotfish.protocol.errors import DeadlineExceeded, UnknownModel, UsageError

MAX_BYTES = 4 * bodies.MAX_TEXT
BODY_SECONDS = 20.0


class Completions:
    """POST of either kind: `asked` reads the body, `said` words the answer."""

    def __init__(self, service: Service, asked: type[bodies.Asked], said: type[wording.Wording]) -> None:
        self.service, self._asked, self._said = service, asked, said

    async def __call__(self, request: Request) -> Answer:
        """Read the body; the rest happens while the answer is sent."""
        asked = bodies.read(self._asked, await read_body(request))
        if asked.stream_options and not asked.stream:
            raise UsageError("stream_options is for streams: set stream as well", param="stream_options")
        trace = request.headers.get("traceparent", "")
        said = self._said(Call(self.service, asked, client_of(request, asked), trace=trace, bearer=bearer_of(request)))
        if asked.stream:
            return streamed(_events(said))
        return whole(lambda: wording.as_json(said))


async def _events(said: wording.Wording) -> AsyncGenerator[bytes, None]:
    async for chunk in wording.as_chunks(said):
        yield sse(chunk)


async def read_body(request: Request) -> bytes:
    """The whole body. Raises UsageError for one that is no JSON by its type, too big, or too slow to come."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise UsageError(f"the body is {kind[:80] or 'of no type'}: send it as application/json")
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                body += part
                if len(body) > MAX_BYTES:
                    raise UsageError(f"the body exceeds {MAX_BYTES} bytes: send less")
    except TimeoutError:
        raise DeadlineExceeded(f"the body did not come within {BODY_SECONDS:g} s: send it at once") from None
    return bytes(body)


def client_of(line: HTTPConnection, asked: bodies.Asked) -> str:
    """Whose turn it is: the user a body names, else the address it came from."""
    return f"user {asked.user}" if asked.user else line.client.host if line.client else ""


def bearer_of(connection: HTTPConnection) -> Bearer | None:
    """Who brought a key that has a profile, as the guard found."""
    bearer: Bearer | None = getattr(connection.state, "bearer", None)
    return bearer


async def models(request: Request) -> Response:
    """GET /v1/models."""
    service: Service = request.app.state.service
    data = [Model(id=name, created=service.created) for name in service.models]
    return _json(Models(data=data).model_dump_json())


async def model(request: Request) -> Response:
    """GET /v1/models/{id}; ids may hold slashes."""
    service: Service = request.app.state.service
    name = request.path_params["id"]
    if name not in service.models:
        raise UnknownModel(f"{name!r} is not served here, {' and '.join(service.models)} is", param="model")
    return _json(Model(id=name, created=service.created).model_dump_json())


def _json(body: str) -> Response:
    return Response(body, media_type="application/json")
