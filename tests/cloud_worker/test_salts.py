"""Tenants' salts: the operator's key, or one that workers share and that a Redis which lost it gets back."""

from __future__ import annotations

import hmac

from redis.asyncio import Redis

from pilotfish.cloud_worker.salts import Salts
from pilotfish.protocol import keys


async def agreed(redis: Redis, key: bytes = b"") -> Salts:
    salts = Salts(redis, key)
    await salts.agree()
    return salts


async def test_workers_of_one_redis_agree_and_tenants_differ(redis: Redis) -> None:
    one, other = await agreed(redis), await agreed(redis)
    assert one.of("a") == other.of("a") != one.of("b")


async def test_the_operators_key_stays_out_of_redis(redis: Redis) -> None:
    salts = await agreed(redis, b"secret")
    await salts.keep()
    assert salts.of("a") == hmac.digest(b"secret", b"a", "sha256").hex()[:32]
    assert await redis.dbsize() == 0


async def test_a_redis_that_lost_the_key_gets_it_back(redis: Redis) -> None:
    one, other = await agreed(redis), await agreed(redis)
    before = one.of("a")
    await redis.flushall()
    for salts in (one, other):
        await salts.keep()
    assert one.of("a") == other.of("a") == before
    assert await redis.pttl(keys.SALT) > 0


async def test_a_worker_that_was_faster_after_the_loss_is_followed(redis: Redis) -> None:
    one = await agreed(redis)
    await redis.flushall()
    newcomer = await agreed(redis)
    await one.keep()
    assert one.of("a") == newcomer.of("a")
