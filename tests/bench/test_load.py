"""The edges of `bench load` speak the product's language, and its phases count what became of every job."""

from __future__ import annotations

import asyncio

import pytest
from redis.asyncio import Redis
from rigs import draws, worker

from helpers import wait_until
from pilotfish.bench import load_edges, many_edges
from pilotfish.bench.load_edges import ROWS, Tenant
from pilotfish.protocol import keys, quota
from pilotfish.protocol.codec import decode
from pilotfish.protocol.messages import ToWorker


def test_a_job_is_one_that_an_edge_may_send_and_its_draft_is_right() -> None:
    import msgpack

    body = load_edges._body("edge", 3)
    job = decode(msgpack.packb(body), ToWorker)
    assert quota.rows(job) == ROWS
    assert list(job.draft) == draws(job.ids, len(job.draft))


@pytest.mark.slow
async def test_every_job_is_answered_and_counted(redis_url: str, redis: Redis) -> None:
    thinks, floods = Tenant("thinks", 4, 0.01), Tenant("floods", 4)
    await redis.sadd(keys.TENANTS, "thinks", "floods")  # type: ignore[misc]  # typed for both clients at once
    async with worker(redis_url):
        for tenant in (thinks, floods):
            await tenant.open(redis_url)
            tenant.begin()
        await floods.flood(200, 0.3)
        await floods.flood(200, 0.1, deadline_ms=1)
        thinks.stop()
        await wait_until(lambda: not thinks.owed + floods.owed, "an answer to everything")
    for tenant in (thinks, floods):
        assert tenant.seen.codes.total() == tenant.seen.sent
        assert len(tenant.seen.latency) == tenant.seen.codes["verdict"] == tenant.answered["verdict"] > 10
        assert min(tenant.seen.overhead) > 0
        tenant.close()
    await asyncio.sleep(0)  # the connections close


@pytest.mark.parametrize("deaf", [0, 1])
def test_the_targets_are_those_of_the_design(deaf: int) -> None:
    spread = {"n": 5000, "p50_ms": 2.0, "p99_ms": 9.0}
    figures = {
        "calm": {"overhead": spread, "jobs_per_redis_core": 6000, "unanswered": 0},
        "growth": {"1": {"jobs_per_second": 100, "unanswered": 0}, "4": {"jobs_per_second": 390, "unanswered": deaf}},
        "overload": {"starved": 0, "unanswered": 0},
        "flood": {"p95_ratio": 1.2, "blocks": [{}] * 4, "unanswered": 0},
    }
    told = {target.name: target.met for target in many_edges._targets(figures)}
    assert {"p50_ms", "p99_ms", "jobs_per_second"} < told.keys()
    assert [name for name, met in told.items() if not met] == ["unanswered"] * bool(deaf) + ["flood_p95_ratio"]


@pytest.mark.slow
async def test_an_edge_that_can_hear_no_more_is_owed_its_answer(
    redis_url: str, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    thinks = Tenant("thinks", 4, 0.01)
    await redis.sadd(keys.TENANTS, "thinks")  # type: ignore[misc]  # typed for both clients at once
    async with worker(redis_url):
        await thinks.open(redis_url)
        thinks.begin()
        await wait_until(lambda: thinks.answered["verdict"] > 10, "some answers")
        thinks.edges[0]._raw.transport.close()
        await wait_until(lambda: thinks.edges[0]._sent, "a job that it will not hear of")
        monkeypatch.setattr(many_edges, "SETTLED_SECONDS", 1.0)
        assert await many_edges._unanswered([thinks]) == 1
    thinks.close()
    await asyncio.sleep(0)  # the connections close
