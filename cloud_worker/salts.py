"""What keeps tenants' caches apart: a salt per tenant, made on the trusted side, part of every name of a block.

The key is the operator's (setting `cache_key`), else a random one that the workers of one Redis share. Whoever does not
know it can neither name another tenant's blocks nor learn from timing whether they are cached.
"""

from __future__ import annotations

import hmac
import logging
import secrets

import redis.exceptions as rx

from pilotfish.protocol import keys
from pilotfish.protocol.broker import RedisBytes, translated
from pilotfish.protocol.errors import BrokerError

log = logging.getLogger("pilotfish.salts")


class Salts:
    """HMAC(key, tenant)."""

    def __init__(self, redis: RedisBytes, key: bytes = b"") -> None:
        self.redis, self._own, self._key = redis, bool(key), key or secrets.token_bytes(32)

    def of(self, tenant: str) -> str:
        """Of one tenant, 32 hex digits; nobody without the key can tell another tenant's."""
        return hmac.digest(self._key, tenant.encode(), "sha256").hex()[:32]

    async def agree(self) -> None:
        """Take the key the workers of this Redis share, or give them ours. Raises BrokerError."""
        if self._own:
            return
        with translated():
            await self.redis.set(keys.SALT, self._key, nx=True, px=keys.JOBS_TTL_MS)
            self._key = await self.redis.get(keys.SALT) or self._key

    async def keep(self) -> None:
        """Renew the shared key. A Redis that lost it is given it again, unless a peer was faster: then we take that."""
        if self._own:
            return
        try:
            found = await self.redis.getex(keys.SALT, px=keys.JOBS_TTL_MS)
            if found is None:
                await self.agree()
            elif found != self._key:
                self._key = found
        except (rx.RedisError, OSError, BrokerError) as error:
            log.warning("the salts' key was not renewed: %s", error)
