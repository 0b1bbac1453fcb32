"""Quotas and shares at a real worker: who is over them is told so, may try again, and costs nobody else anything."""

from __future__ import annotations

from collections import Counter

import pytest
from redis.asyncio import Redis
from rigs import TARGET, job, worker

from helpers import wait_until
from pilotfish.protocol import keys
from pilotfish.protocol.codec import decode, encode
from pilotfish.protocol.messages import Refusal, ToEdge, Verdict
from pilotfish.protocol.quota import Quota

pytestmark = pytest.mark.slow
JOBS = 40


async def grant(redis: Redis, **quotas: Quota) -> None:
    await redis.sadd(keys.TENANTS, *quotas)  # type: ignore[misc]  # redis-py types both its clients at once
    for tenant, quota in quotas.items():
        await redis.hset(keys.QUOTAS, tenant, quota.text())  # type: ignore[misc]


async def send(redis: Redis, tenant: str, number: int) -> None:
    wanted = encode(job(session=f"{number:032x}", round=number, deadline_ms=60_000))
    await redis.xadd(keys.jobs(TARGET, tenant), {keys.FIELD_AGENT: "edge1", keys.FIELD_MESSAGE: wanted})


async def said(redis: Redis, tenant: str) -> list[Verdict | Refusal]:
    entries = await redis.xrange(keys.replies(tenant, "edge1"))
    return [decode(fields[b"m"], ToEdge) for _, fields in entries]


async def test_over_its_rate_every_job_is_answered_and_the_refusal_names_the_quota(
    redis_url: str, redis: Redis
) -> None:
    await grant(redis, metered=Quota(rows_per_second=60), other=Quota())
    async with worker(redis_url):
        for number in range(JOBS):
            await send(redis, "metered", number)
        await send(redis, "other", 0)

        async def answered(tenant: str, count: int) -> list[Verdict | Refusal]:
            found = await said(redis, tenant)
            return found if len(found) >= count else []

        (verdict,) = await wait_until(lambda: answered("other", 1), "the other's verdict")
        assert isinstance(verdict, Verdict)
        assert verdict.credit > 0
        found = await wait_until(lambda: answered("metered", JOBS), "an answer to each job", timeout=20)
    codes = Counter(getattr(one, "code", "verdict") for one in found)
    assert set(codes) == {"verdict", "overloaded"}
    assert codes["verdict"] <= JOBS / 2
    assert sorted(one.round for one in found) == list(range(JOBS)), "answered twice, or never"
    refused = [one for one in found if isinstance(one, Refusal)]
    assert any("over its 60 rows a second" in one.sentence for one in refused)
    assert all(one.credit == 0 for one in refused)
