"""`health`: ask the worker or agent of this machine how it is, as containers and supervisors do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from pilotfish.cli.options import takes

if TYPE_CHECKING:
    from pilotfish.protocol.settings import Settings

EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "[::1]", "": "127.0.0.1"}  # listened on: asked at
SECONDS = 4.0  # a check may take two


@takes("serve_host", "serve_port", "metrics_port", "api_key")
def health(
    settings: Settings,
    ready: Annotated[
        bool, typer.Option("--ready", help="Ask whether it takes work now, not whether it lives.")
    ] = False,
) -> None:
    """Ask /health (or /ready) on --metrics-port, else on --serve-port. Exit code 1 for a no, 3 if nothing answers."""
    import urllib.error
    import urllib.request
    from http.client import HTTPException

    from pilotfish.protocol.errors import CloudError, PilotfishError

    url = address(settings, "ready" if ready else "health")
    key = settings.api_key.get_secret_value() if settings.api_key else ""
    request = urllib.request.Request(url, headers={"authorization": f"Bearer {key}"} if key else {})
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(request, timeout=SECONDS) as answer:
            print(answer.read().decode())
    except urllib.error.HTTPError as error:
        with error:
            raise PilotfishError(f"{url} says {error.code}: {error.read().decode(errors='replace')}") from None
    except (OSError, HTTPException) as error:
        raise CloudError(f"nothing answers at {url} ({error}): start it with --metrics-port or --serve") from None


def address(settings: Settings, check: str) -> str:
    """Where this machine's process answers."""
    host = EVERYWHERE.get(settings.serve_host, settings.serve_host)
    port = settings.serve_port if settings.metrics_port is None else settings.metrics_port
    return f"http://{host}:{port}/{check}"
