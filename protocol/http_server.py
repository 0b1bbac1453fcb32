"""uvicorn inside a process of ours: our event loop, our signals, our logs. The one owner of uvicorn.

A connection that does not read is paused by uvicorn at 64 KiB, one that is idle is closed, and no more than
CONNECTIONS are served at a time. Knows ASGI; nothing of routes.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from pilotfish.protocol.errors import SettingsError
from pilotfish.protocol.http_guard import App, is_loopback

CONNECTIONS = 512
SILENT_SECONDS = 20
IDLE_SECONDS = 75
GRACE_SECONDS = 2
MESSAGE_BYTES = 1 << 20
HANG_UP = "hang_up"  # in a scope's state: ends the connection at once


@asynccontextmanager
async def serving(app: App, host: str, port: int, key: str | None) -> AsyncIterator[str]:
    """Serve `app` for the block; gives its URL. Port 0 takes a free one. Raises SettingsError if that cannot be."""
    if not key and not is_loopback(host):
        raise SettingsError(
            f"{host} can be reached from other machines, and there is no key: set PILOTFISH_API_KEY, "
            f"or serve on 127.0.0.1"
        )
    listening = _listen(host, port)
    server = _server(app)
    await server.startup(sockets=[listening])
    running = asyncio.create_task(server.main_loop())
    try:
        yield _url(host, listening.getsockname()[1])
    finally:
        server.should_exit = True
        await running
        await server.shutdown(sockets=[listening])


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server((host, port), family=family, backlog=CONNECTIONS)
    except OSError as error:
        raise SettingsError(
            f"cannot serve on {host} port {port} ({error.strerror}): choose another with --serve-port or --metrics-port"
        ) from None


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _server(app: App) -> Any:
    try:
        import uvicorn
    except ImportError:
        raise SettingsError("serving HTTP needs uvicorn: pip install 'pilotfish[edge]', or leave it out") from None
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Http(H11Protocol):
        """Hands the app a way to cut the line: closing it would wait for a client that does not read.

        A connection that has asked for nothing within SILENT_SECONDS is cut too.
        """

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self.app_state = {**self.app_state, HANG_UP: transport.abort}
            self.loop.call_later(SILENT_SECONDS, self._cut_if_silent)

        def _cut_if_silent(self) -> None:
            if self.cycle is None and self.transport.get_protocol() is self:
                self.transport.abort()

    config = uvicorn.Config(
        app, interface="asgi3", loop="none", http=Http, ws="websockets-sansio", lifespan="off", log_config=None,
        access_log=False, server_header=False, proxy_headers=False, limit_concurrency=CONNECTIONS,
        timeout_keep_alive=IDLE_SECONDS, timeout_graceful_shutdown=GRACE_SECONDS, ws_max_size=MESSAGE_BYTES,
    )  # fmt: skip
    config.load()
    server = uvicorn.Server(config)
    server.lifespan = config.lifespan_class(config)
    return server
