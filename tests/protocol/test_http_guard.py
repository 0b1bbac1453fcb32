"""The guard alone, as plain ASGI; what it lets through reaches `app`, which says 200."""

from __future__ import annotations

import base64
import hmac
import json
from typing import Any

import pytest

from pilotfish.protocol.errors import SettingsError
from pilotfish.protocol.http_guard import KEY_PROTOCOL, Access, Guard, access, is_loopback
from pilotfish.protocol.http_server import serving
from pilotfish.protocol.settings import Settings

ROUTES = [
    "/v1/models",
    "/v1/chat/completions",
    "/v1/stream",
    "/v1/status",
    "/health",
    "/ready",
    "/drain",
    "/openapi.json",
]


async def app(scope: Any, receive: Any, send: Any) -> None:
    kind = "websocket.accept" if scope["type"] == "websocket" else "http.response.start"
    await send({"type": kind, "status": 200, "headers": [(b"content-type", b"text/plain")]})


async def ask(who: Access, path: str = "/v1/models", *, kind: str = "http", **headers: str) -> list[dict[str, Any]]:
    headers = {"host": "localhost:8787", **{name.replace("_", "-"): value for name, value in headers.items()}}
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> dict[str, Any]:
        return {"type": "websocket.connect"}

    await Guard(app, who)({"type": kind, "path": path, "headers": raw}, receive, send)
    return sent


async def status(*args: Any, **headers: Any) -> int:
    return int((await ask(*args, **headers))[0]["status"])


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:8787", "127.0.0.1:1", "[::1]:8787", "192.168.1.4", "box.lan:80", "BOX.lan"]
)
async def test_our_own_names_and_every_address_are_answered(host: str) -> None:
    assert await status(Access(hosts=frozenset({"box.lan"})), host=host) == 200


@pytest.mark.parametrize(
    "host", ["", "evil.example", "localhost.evil.example", "127.0.0.1.evil.example:8787", "[::1", "box"]
)
async def test_a_strangers_name_for_this_machine_is_refused(host: str) -> None:
    first, body = await ask(Access(hosts=frozenset({"box.lan"})), host=host)
    assert first["status"] == 403
    assert json.loads(body["body"])["error"]["code"] == "forbidden_host"


@pytest.mark.parametrize(
    ("origin", "expected"),
    [
        ("http://localhost:8787", 200),
        ("http://localhost:9999", 403),
        ("https://evil.example", 403),
        ("null", 403),
        ("", 403),
        ("http://[::1", 403),
    ],
)
async def test_only_our_own_pages_may_ask(origin: str, expected: int) -> None:
    assert await status(Access(), origin=origin) == expected


async def test_no_cors_header_is_ever_sent() -> None:
    (start,) = await ask(Access(), origin="http://localhost:8787")
    names = {name for name, _ in start["headers"]}
    assert not [name for name in names if name.startswith(b"access-control")]
    assert {b"x-content-type-options", b"content-security-policy", b"content-type"} <= names


@pytest.mark.parametrize("path", [*ROUTES, "/metrics", "/nothing"])
async def test_every_route_asks_for_the_key(path: str) -> None:
    who = Access(key="secret", open_paths=frozenset({"/"}))
    assert await status(who, path) == 401
    assert await status(who, path, authorization="Bearer wrong") == 401
    assert await status(who, path, authorization="Basic secret") == 401
    assert await status(who, path, authorization="Bearer secret") == 200
    assert await status(who, path, authorization="bearer secret") == 200


async def test_a_websocket_brings_its_key_among_its_protocols() -> None:
    who = Access(key="sécret")
    good = KEY_PROTOCOL + base64.urlsafe_b64encode("sécret".encode()).decode().rstrip("=")
    assert (await ask(who, kind="websocket"))[0]["type"] == "websocket.close"
    assert (await ask(who, kind="websocket", sec_websocket_protocol=f"x, {KEY_PROTOCOL}!"))[0][
        "type"
    ] == "websocket.close"
    assert (await ask(who, kind="websocket", sec_websocket_protocol=f"pilotfish.v1, {good}"))[0][
        "type"
    ] == "websocket.accept"


async def test_metrics_may_have_a_key_of_their_own() -> None:
    who = Access(key="secret", metrics_key="other")
    assert await status(who, "/metrics", authorization="Bearer secret") == 401
    assert await status(who, "/metrics", authorization="Bearer other") == 200
    assert await status(who, "/v1/models", authorization="Bearer other") == 401
    assert await status(Access(metrics_key="other"), "/metrics") == 401


async def test_keys_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []

    def compare(given: bytes, wanted: bytes) -> bool:
        compared.append((given, wanted))
        return False

    monkeypatch.setattr(hmac, "compare_digest", compare)
    await ask(Access(key="secret"), authorization="Bearer guess")
    assert compared == [(b"guess", b"secret")]


@pytest.mark.parametrize(
    ("host", "here"), [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("box", False)]
)
def test_which_addresses_are_this_machines_own(host: str, here: bool) -> None:
    assert is_loopback(host) is here


async def test_others_are_not_served_without_a_key() -> None:
    with pytest.raises(SettingsError, match="set PILOTFISH_API_KEY"):
        async with serving(app, "0.0.0.0", 0, None):
            pass


async def test_a_port_that_is_taken_is_told() -> None:
    async with serving(app, "127.0.0.1", 0, None) as url:
        with pytest.raises(SettingsError, match="choose another with --serve-port"):
            async with serving(app, "127.0.0.1", int(url.rpartition(":")[2]), None):
                pass


def test_settings_become_access() -> None:
    who = access(Settings(api_key="k", allowed_hosts="Box, box.lan", serve_host="0.0.0.0"))
    assert (who.key, who.metrics_key) == ("k", None)
    assert who.hosts == {"box", "box.lan", "0.0.0.0"}


def test_keys_are_never_shown() -> None:
    settings = Settings(api_key="k3y", metrics_key="k3y")
    assert "k3y" not in f"{settings!r} {settings.shown()} {settings.model_dump_json()}"
