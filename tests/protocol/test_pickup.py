"""Fair pick-up: weights, quotas, and more tenants than one command may name streams."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import pytest
from redis.asyncio import Redis
from rigs import TARGET, job

from helpers import wait_until
from pilotfish.protocol import keys
from pilotfish.protocol.delivery import Delivery
from pilotfish.protocol.ingress import Ingress
from pilotfish.protocol.pickup import TENANTS_MAX
from pilotfish.protocol.quota import Quota

MANY = [f"t{number:03}" for number in range(120)]


async def opened(redis: Redis, tenants: list[str], quotas: dict[str, Quota] | None = None) -> Ingress:
    """A worker of these tenants."""
    await redis.sadd(keys.TENANTS, *tenants)  # type: ignore[misc]  # redis-py types both its clients at once
    for tenant, quota in (quotas or {}).items():
        await redis.hset(keys.QUOTAS, tenant, quota.text())  # type: ignore[misc]
    ingress = Ingress(redis, TARGET, "w1")
    await ingress.open()
    await ingress.beat({"state": "serving"})
    return ingress


async def send(redis: Redis, tenant: str, count: int = 1, worker: str = keys.ANY) -> None:
    pipe = redis.pipeline(transaction=False)
    for _ in range(count):
        pipe.xadd(keys.jobs(TARGET, tenant, worker), {keys.FIELD_AGENT: "edge1", keys.FIELD_MESSAGE: b"job"})
    await pipe.execute()


async def served(ingress: Ingress, places: int, jobs: int, rows: int = 8) -> Counter[str]:
    """Jobs of each tenant, of the first so many that a worker with so many places serves."""
    found: Counter[str] = Counter()
    running: list[Delivery] = []
    while found.total() < jobs:
        for delivery in await ingress.pick_up(places - len(running), 100):
            ingress.shares.charge(delivery.tenant, rows)
            found[delivery.tenant] += 1
            running.append(delivery)
        assert len(running) <= places, "more than there is room for"
        if running:
            await ingress.reply(running.pop(0), None)
    return found


async def test_two_who_always_wait_are_served_by_their_weights(redis: Redis) -> None:
    ingress = await opened(redis, ["heavy", "light"], {"heavy": Quota(weight=3)})
    await send(redis, "heavy", 300)
    await send(redis, "light", 300)
    found = await served(ingress, 8, 240)
    assert found["heavy"] == pytest.approx(180, abs=12)


async def test_a_queue_of_one_delays_another_by_no_more_than_a_turn(redis: Redis) -> None:
    ingress = await opened(redis, ["flood", "small"])
    await send(redis, "flood", 500)
    await served(ingress, 4, 100)
    await send(redis, "small", 3)
    assert (await served(ingress, 4, 10))["small"] == 3


async def test_over_its_quota_a_tenant_is_not_read_and_its_jobs_wait(redis: Redis) -> None:
    ingress = await opened(redis, ["metered", "other"], {"metered": Quota(rows_per_second=100)})
    await send(redis, "metered", 2, "w1")
    await send(redis, "other")
    with ingress.under_way("metered", job(continue_tokens=150)):
        assert {delivery.tenant for delivery in await ingress.pick_up(8, 10)} == {"other"}
        assert await redis.xlen(keys.jobs(TARGET, "metered", "w1")) == 2

        async def back() -> list[Delivery]:
            return await ingress.pick_up(8, 10)

        assert {delivery.tenant for delivery in await wait_until(back, "its rows to be earned")} == {"metered"}


async def test_tokens_in_flight_keep_a_tenant_out_until_a_job_ends(redis: Redis) -> None:
    ingress = await opened(redis, ["acme"], {"acme": Quota(tokens_in_flight=50)})
    await send(redis, "acme")
    with ingress.under_way("acme", job(continue_tokens=40)):
        assert await ingress.pick_up(8, 10) == []
    assert len(await ingress.pick_up(8, 10)) == 1


# --- more tenants than streams fit one command -----------------------------------------------------------------


async def streams_named(redis: Redis, reading: Any) -> list[int]:
    """How many streams each XREADGROUP named while `reading` ran, by Redis' own monitor."""
    named: list[int] = []
    done = asyncio.Event()

    async def watch() -> None:
        async with redis.monitor() as monitor:
            ready.set()
            while not done.is_set():
                command = (await monitor.next_command())["command"].split()
                if command[0].upper() == "XREADGROUP":
                    named.append((len(command) - command.index("STREAMS") - 1) // 2)

    ready = asyncio.Event()
    watching = asyncio.create_task(watch())
    await ready.wait()
    await reading
    done.set()
    await redis.ping()
    await watching
    return named


@pytest.mark.parametrize("places", [8, 400])
async def test_of_120_tenants_none_starves_and_no_command_names_more_than_64_streams(redis: Redis, places: int) -> None:
    ingress = await opened(redis, MANY)
    await send(redis, MANY[0], 400)
    for tenant in MANY[1:]:
        await send(redis, tenant, 2)
    found: Counter[str] = Counter()

    async def all_of_them() -> None:
        found.update(await served(ingress, places, 2 * len(MANY) + 40) if places == 8 else await taken(ingress))

    named = await streams_named(redis, all_of_them())
    assert max(named) <= keys.STREAMS_MAX
    assert all(found[tenant] == 2 for tenant in MANY[1:]), "somebody starves behind the flood of the first"
    await asyncio.gather(*ingress.hang_up(), return_exceptions=True)


async def taken(ingress: Ingress) -> Counter[str]:
    found: Counter[str] = Counter()
    while found.total() < 400 + 2 * (len(MANY) - 1):
        found.update(delivery.tenant for delivery in await ingress.pick_up(400, 100))
    return found


async def test_a_quiet_workers_first_job_is_found_at_once_whoever_sends_it(redis: Redis) -> None:
    ingress = await opened(redis, MANY)
    for tenant in (MANY[0], MANY[TENANTS_MAX], MANY[-1], MANY[-1]):
        waiting = asyncio.create_task(ingress.pick_up(64, 2000))
        await wait_until(lambda: blocked(redis, 4), "every group of tenants to be waited for")
        before = asyncio.get_running_loop().time()
        await send(redis, tenant)
        (found,) = await waiting
        assert found.tenant == tenant
        assert asyncio.get_running_loop().time() - before < 0.5
        await ingress.reply(found, None)
    await asyncio.gather(*ingress.hang_up(), return_exceptions=True)


async def blocked(redis: Redis, count: int) -> bool:
    return bool((await redis.info("clients"))["blocked_clients"] >= count)


async def test_what_was_read_when_a_worker_hangs_up_is_released(redis: Redis) -> None:
    ingress = await opened(redis, MANY)
    assert await ingress.pick_up(64, 10) == []
    await wait_until(lambda: blocked(redis, 4), "every group of tenants to be waited for")
    await send(redis, MANY[0])
    await wait_until(lambda: ingress.held, "the job to be read")
    await asyncio.gather(*ingress.hang_up(), return_exceptions=True)
    await wait_until(lambda: not ingress.held, "its lease to be let go")


async def test_a_tenant_that_is_revoked_while_we_ask_for_its_jobs_ends_no_worker(
    redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    ingress = await opened(redis, MANY)
    take = ingress._take_fairly

    async def revoked_meanwhile(*how: Any) -> list[Delivery]:
        found = await take(*how)
        await redis.srem(keys.TENANTS, MANY[0])  # type: ignore[misc]
        await ingress.beat({"state": "serving"})
        return found

    monkeypatch.setattr(ingress, "_take_fairly", revoked_meanwhile)
    assert await ingress.pick_up(8, 10) == []
    await asyncio.gather(*ingress.hang_up(), return_exceptions=True)
