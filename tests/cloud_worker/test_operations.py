"""A worker's port: metrics, health, ready, and a drain that ends it as SIGTERM does."""

from __future__ import annotations

import os
import signal

import httpx
import pytest
from rigs import engine_child, worker

from helpers import wait_until
from pilotfish.cloud_worker.operations import HttpSpec
from pilotfish.protocol.errors import SettingsError
from pilotfish.protocol.http_guard import Access
from pilotfish.protocol.http_server import serving

URL = "http://127.0.0.1:17841"
HTTP = HttpSpec("127.0.0.1", 17841, Access(key="k"))


async def test_a_worker_tells_how_it_is(redis_url: str) -> None:
    async with worker(redis_url, http=HTTP), httpx.AsyncClient(base_url=URL) as http:
        for method, path in [("GET", "/metrics"), ("GET", "/health"), ("GET", "/ready"), ("POST", "/drain")]:
            assert (await http.request(method, path)).status_code == 401
        http.headers["authorization"] = "Bearer k"
        assert (await http.get("/health")).json() == {"status": "ok", "running": 0, "engine_restarts": 0}
        await wait_until(lambda: _ready(http), "the first beat")
        assert "pilotfish_engine_rows_total" in (await http.get("/metrics")).text
        os.kill(engine_child(), signal.SIGKILL)

        async def unready() -> bool:
            return not await _ready(http)

        await wait_until(unready, "the dead engine to be seen")
        assert "engine process is down" in (await http.get("/ready")).json()["reason"]
        assert (await http.get("/health")).status_code == 200


async def _ready(http: httpx.AsyncClient) -> bool:
    return (await http.get("/ready")).status_code == 200


async def test_drain_is_sigterm(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    killed: list[tuple[int, int]] = []
    async with worker(redis_url, http=HTTP), httpx.AsyncClient(base_url=URL) as http:
        monkeypatch.setattr(os, "kill", lambda *how: killed.append(how))
        answer = await http.post("/drain", headers={"authorization": "Bearer k"})
        monkeypatch.undo()
    assert (answer.status_code, killed) == (202, [(os.getpid(), signal.SIGTERM)])


async def test_a_worker_whose_port_is_taken_does_not_start(redis_url: str) -> None:
    async def app(scope: object, receive: object, send: object) -> None: ...

    async with serving(app, "127.0.0.1", 17841, None):
        with pytest.raises(SettingsError, match="choose another"):
            async with worker(redis_url, http=HTTP):
                await wait_until(lambda: False, "the worker to give up", 5)
