"""Redis keys that would stay for ever: what a test or a soak must not leave behind."""

from __future__ import annotations

import redis

from pilotfish.protocol import keys

FOR_EVER = {keys.TENANTS, keys.QUOTAS, keys.TARGETS}


def ownerless(client: redis.Redis) -> list[str]:
    """Names of the keys that live for ever and are not meant to."""
    names = (name.decode(errors="replace") for name in client.scan_iter(count=1000) if client.ttl(name) == -1)
    return sorted(name for name in names if name not in FOR_EVER and not name.startswith("arq:"))
