"""Who may speak to one of our HTTP servers: the key, the Host, the Origin, and the size of what is sent. Plain ASGI.

A stranger's page reaches a server on this machine in two ways: from its own origin (no CORS headers are sent, and a
foreign Origin is refused), or by pointing its own name at 127.0.0.1 (DNS rebinding: a Host that is a name must be one
of ours; an address cannot be re-pointed). Keys are compared in constant time, on every route but the page's own file,
which holds nothing. Knows no routes' meaning.
"""

from __future__ import annotations

import base64
import hmac
import ipaddress
import json
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from pilotfish.protocol.settings import Settings

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

LOOPBACK_NAMES = frozenset({"localhost"})
API_PATHS = "/v1/"
KEY_PROTOCOL = "pilotfish.key."  # + base64url of the key: a browser's WebSocket can send no other header
HEADERS = {
    b"x-content-type-options": b"nosniff",
    b"x-frame-options": b"DENY",
    b"referrer-policy": b"no-referrer",
    b"cross-origin-resource-policy": b"same-origin",
    b"cache-control": b"no-store",
    b"content-security-policy": b"default-src 'none'; frame-ancestors 'none'",
}


@dataclass(frozen=True, slots=True)
class Access:
    """`hosts` are the names this server answers to besides localhost; `open_paths` need no key.

    `bearer` says who brings one of these keys, where others than `key` are known: for the API alone, never for what
    is an operator's. What it says is `state["bearer"]` of the scope.
    """

    key: str | None = None
    metrics_key: str | None = None
    hosts: frozenset[str] = frozenset()
    open_paths: frozenset[str] = frozenset()
    bearer: Callable[[Sequence[str]], object | None] | None = None

    def wanted(self, path: str) -> str | None:
        """The key a path asks for."""
        if path in self.open_paths:
            return None
        return self.metrics_key or self.key if path == "/metrics" else self.key


def access(settings: Settings, open_paths: frozenset[str] = frozenset()) -> Access:
    """As the settings say."""
    key, metrics_key = settings.api_key, settings.metrics_key
    named = {name.strip().lower() for name in (settings.allowed_hosts or "").split(",")}
    return Access(
        key=key.get_secret_value() if key else None,
        metrics_key=metrics_key.get_secret_value() if metrics_key else None,
        hosts=frozenset(named | {settings.serve_host.lower()}) - {""},
        open_paths=open_paths,
    )


class Guard:
    """ASGI middleware; see the module docstring."""

    def __init__(self, app: App, access: Access) -> None:
        self.app, self.access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, or refuse with a sentence."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
        elif told := self._refusal(scope):
            await _refuse(scope, receive, send, *told)
        else:
            await self.app(scope, receive, _with_headers(send))

    def _refusal(self, scope: Scope) -> tuple[int, str, str] | None:
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        host = headers.get("host", "")
        if not self._ours(_name(host)):
            fix = "name it in --allowed-hosts if it is this server's"
            return 403, "forbidden_host", f"this server does not answer to the name {host[:80]!r}: {fix}"
        if (origin := headers.get("origin")) is not None and _netloc(origin) != host:
            return 403, "forbidden_origin", f"pages of {origin[:80]!r} may not use this server"
        wanted = self.access.wanted(scope["path"])
        if wanted is not None and not self._lets_in(scope, wanted, _keys(headers)):
            fix = "send `Authorization: Bearer KEY` with the key this server was started with"
            return 401, "invalid_api_key", f"the key is missing or wrong: {fix}"
        return None

    def _lets_in(self, scope: Scope, wanted: str, given: list[str]) -> bool:
        if any(_equal(key, wanted) for key in given):
            return True
        who = self.access.bearer(given) if self.access.bearer and scope["path"].startswith(API_PATHS) else None
        if who is not None:
            scope.setdefault("state", {})["bearer"] = who
        return who is not None

    def _ours(self, name: str) -> bool:
        return name in LOOPBACK_NAMES or name in self.access.hosts or _is_address(name)


def is_loopback(host: str) -> bool:
    """Whether what is bound there can be reached from this machine only."""
    return host in LOOPBACK_NAMES or (_is_address(host) and ipaddress.ip_address(host).is_loopback)


def _name(host: str) -> str:
    """A Host header without its port."""
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return ""


def _netloc(origin: str) -> str:
    """An Origin header's host and port."""
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return ""


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _keys(headers: dict[str, str]) -> list[str]:
    """Keys a request brings: a bearer token, or one among the protocols of a WebSocket."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    bearer = token.strip().encode("latin-1").decode("utf-8", "replace")
    given = [bearer] if scheme.lower() == "bearer" else []
    protocols = [protocol.strip() for protocol in headers.get("sec-websocket-protocol", "").split(",")]
    return given + [_decoded(p.removeprefix(KEY_PROTOCOL)) for p in protocols if p.startswith(KEY_PROTOCOL)]


def _decoded(text: str) -> str:
    try:
        return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)).decode()
    except ValueError:
        return ""


def _equal(given: str, wanted: str) -> bool:
    return hmac.compare_digest(given.encode(), wanted.encode())


async def _refuse(scope: Scope, receive: Receive, send: Send, status: int, code: str, sentence: str) -> None:
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.close", "code": 1008, "reason": sentence[:120]})
        return
    about = {"message": sentence, "type": "invalid_request_error", "param": None, "code": code}
    headers = [(b"content-type", b"application/json"), *([(b"www-authenticate", b"Bearer")] if status == 401 else [])]
    send = _with_headers(send)
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps({"error": about}).encode()})


def _with_headers(send: Send) -> Send:
    """Headers that every answer carries, where it does not set them itself."""

    async def with_headers(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            own = {name.lower() for name, _ in message.get("headers", ())}
            more = [(name, value) for name, value in HEADERS.items() if name not in own]
            message = {**message, "headers": [*message.get("headers", ()), *more]}
        await send(message)

    return with_headers
