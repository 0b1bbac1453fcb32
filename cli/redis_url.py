"""Which Redis a command talks to: the one that is set, else the private one that runs here; and how to say so."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pilotfish.protocol.errors import BrokerUnreachable

if TYPE_CHECKING:
    from pilotfish.protocol.settings import Settings


def redis_url(settings: Settings) -> str:
    """What to connect to. Raises BrokerUnreachable with the two ways to get a Redis when there is none, and
    SettingsError for one that would be reached in the clear.
    """
    if settings.redis_url:
        from pilotfish.protocol.transport import checked

        return checked(settings.redis_url, ca=settings.tls_ca, allow_plaintext=settings.allow_plaintext)
    from pilotfish.cli import redis_server

    if private := redis_server.find():
        return private.url
    raise BrokerUnreachable(
        "there is no Redis: REDIS_URL is unset and no private one runs here. Start one with `pilotfish up`, "
        "or set REDIS_URL"
    )


def described(settings: Settings) -> str:
    """The Redis in use, in words and without its password."""
    from pilotfish.protocol.settings import redacted

    if settings.redis_url:
        return f"{redacted(settings.redis_url)} ({settings.origins()['redis_url']})"
    from pilotfish.cli import redis_server

    private = redis_server.find()
    return f"private, {private.server}" if private else "none"
