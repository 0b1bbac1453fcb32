"""Token buckets on Redis' time and tokens in flight, counted by several workers together."""

from __future__ import annotations

import asyncio

import pytest
from redis.asyncio import Redis
from rigs import TARGET

from helpers import wait_until
from pilotfish.protocol import keys
from pilotfish.protocol.quota import Quota
from pilotfish.protocol.usage import Usage


async def workers(redis: Redis, quota: Quota, *names: str) -> list[Usage]:
    """Live workers of a tenant with this quota."""
    await redis.zadd(keys.workers(TARGET), dict.fromkeys(names, 1000))
    await redis.pexpire(keys.workers(TARGET), 60_000)
    return [Usage(redis, TARGET, name, {"acme": quota}) for name in names]


async def test_who_has_no_quota_is_never_over_it_and_costs_no_command(redis: Redis) -> None:
    (usage,) = await workers(redis, Quota(weight=3), "w1")
    usage.begin("acme", 10**9, 10**9)
    await redis.config_resetstat()
    await usage.settle(0)
    assert not usage.over("acme")
    assert "cmdstat_evalsha" not in await redis.info("commandstats")


async def test_who_is_revoked_while_many_are_settled_ends_no_worker(redis: Redis) -> None:
    granted = {f"t{number:03}": Quota(rows_per_second=1000) for number in range(keys.STREAMS_MAX + 1)}
    usage = Usage(redis, TARGET, "w1", granted)
    settling = asyncio.create_task(usage.settle(0))
    await asyncio.sleep(0)  # the first of them are on their way
    granted.clear()
    await settling


async def test_a_rate_is_that_of_all_workers_together_and_debts_are_paid(redis: Redis) -> None:
    first, second = await workers(redis, Quota(rows_per_second=1000), "w1", "w2")
    first.begin("acme", 700, 1)
    second.begin("acme", 600, 1)
    assert not first.over("acme"), "it knows of its own 700 only"
    await first.settle(0)
    await second.settle(0)
    assert second.over("acme") == "over its 1000 rows a second"
    await first.settle(0)
    assert first.over("acme"), "the debt is everybody's"
    await wait_until(lambda: not second.over("acme"), "300 rows to be earned, at 1000 a second")
    await second.settle(0)
    assert not second.over("acme"), "our clock and Redis' say the same"


async def test_silence_saves_up_a_second_and_no_more(redis: Redis) -> None:
    (usage,) = await workers(redis, Quota(rows_per_second=200), "w1")
    await usage.settle(0)
    await redis.hset(keys.use(TARGET, "acme"), ":at", "1")  # type: ignore[misc]  # an hour ago, and more
    await usage.settle(0)
    usage.begin("acme", 300, 1)
    assert usage.over("acme")


async def test_tokens_in_flight_are_those_of_all_live_workers(redis: Redis) -> None:
    first, second = await workers(redis, Quota(tokens_in_flight=1000), "w1", "w2")
    first.begin("acme", 1, 1000)
    await first.settle(0)
    await second.settle(0)
    assert second.over("acme") == "at its 1000 tokens in flight"
    first.end("acme", 1000)
    assert not first.over("acme")
    await first.settle(0)
    await second.settle(0)
    assert not second.over("acme")


async def test_what_a_dead_worker_held_is_nobodys(redis: Redis) -> None:
    first, second = await workers(redis, Quota(tokens_in_flight=1000), "w1", "w2")
    first.begin("acme", 1, 1000)
    await first.settle(0)
    await redis.zadd(keys.workers(TARGET), {"w1": 1})
    await second.settle(500)
    assert not second.over("acme")
    assert not await redis.hexists(keys.use(TARGET, "acme"), "w1")  # type: ignore[misc]


async def test_what_could_not_be_told_is_told_later(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    (usage,) = await workers(redis, Quota(rows_per_second=100), "w1")
    usage.begin("acme", 500, 1)
    with monkeypatch.context() as patch:
        patch.setattr(usage, "_settle", None)
        with pytest.raises(TypeError):
            await usage.settle(0)
    await usage.settle(0)
    assert float(await redis.hget(keys.use(TARGET, "acme"), ":rows")) < -300  # type: ignore[misc]
