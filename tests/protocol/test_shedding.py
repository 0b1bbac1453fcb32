"""What is refused under overload: stale and expired jobs, then the newest of the largest tenant; each is answered."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis.asyncio import Redis
from rigs import TARGET, job

from helpers import wait_until
from pilotfish.protocol import keys, shedding
from pilotfish.protocol.codec import decode, encode
from pilotfish.protocol.ingress import Ingress
from pilotfish.protocol.messages import Close, Refusal, ToEdge
from pilotfish.protocol.shedding import Depth, Shedding, whom

DEPTHS = st.dictionaries(
    st.sampled_from("abcdef"), st.builds(Depth, st.integers(1, 400), st.integers(0, 10_000)), min_size=1
)


@given(DEPTHS, st.integers(1, 300))
def test_no_more_go_than_should_and_none_of_who_is_served_in_time(depths: dict[str, Depth], most: int) -> None:
    going = whom(depths, lambda _: 1.0, most)
    assert sum(going.values()) == min(most, sum(depth.surplus for depth in depths.values()))
    assert all(count <= depths[tenant].surplus for tenant, count in going.items())
    assert not any(depths[tenant].oldest_ms <= shedding.PATIENCE_MS for tenant in going)


def test_the_largest_loses_until_it_is_no_longer_the_largest() -> None:
    depths = {"flood": Depth(300, 10_000), "small": Depth(40, 10_000)}
    assert whom(depths, lambda _: 1.0, 100) == {"flood": 100}
    assert whom(depths, {"flood": 30.0, "small": 1.0}.__getitem__, 10) == {"small": 10}, "largest for its weight"


async def overloaded(redis: Redis, *tenants: str) -> tuple[Ingress, Shedding]:
    """A worker that reads nothing, and looks at everyone."""
    await redis.sadd(keys.TENANTS, *tenants)  # type: ignore[misc]  # redis-py types both its clients at once
    ingress = Ingress(redis, TARGET, "w1")
    await ingress.open()
    await ingress.beat({"state": "serving"})
    return ingress, Shedding(ingress)


async def send(redis: Redis, tenant: str, number: int, to: str = keys.ANY, at: str = "*", **changes: object) -> None:
    wanted = job(**{"session": f"{number:032x}", "round": number, "deadline_ms": 60_000, **changes})
    entry = {keys.FIELD_AGENT: "edge1", keys.FIELD_MESSAGE: encode(wanted)}
    await redis.xadd(keys.jobs(TARGET, tenant, to), entry, id=at)  # type: ignore[arg-type]


async def refusals(redis: Redis, tenant: str) -> dict[int, str]:
    """Round -> code, of everything said to the tenant's edge."""
    said = [decode(fields[b"m"], ToEdge) for _, fields in await redis.xrange(keys.replies(tenant, "edge1"))]
    return {one.round: one.code for one in said if isinstance(one, Refusal)}


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shedding, "PATIENCE_MS", 100)


@pytest.mark.usefixtures("impatient")
async def test_the_newest_of_the_largest_go_and_each_is_told(redis: Redis) -> None:
    ingress, desk = await overloaded(redis, "flood", "small")
    await send(redis, "small", 0)
    for number in range(40):
        await send(redis, "flood", number)

    async def shed() -> int:
        return await desk.shed(full=True)

    await wait_until(shed, "the oldest to have waited too long")
    told = await refusals(redis, "flood")
    left = await redis.xlen(keys.jobs(TARGET, "flood"))
    assert len(told) + left == 40, "a job went without a word"
    assert sorted(told) == list(range(left, 40)), "not the newest"
    assert set(told.values()) == {"overloaded"}
    assert not await refusals(redis, "small")
    (delivery, *_) = await ingress.pick_up(1, 10)
    assert await desk.shed(full=True) >= 0
    assert await redis.xlen(delivery.stream), "what somebody holds is not shed"


@pytest.mark.usefixtures("impatient")
async def test_stale_and_expired_ones_go_first(redis: Redis) -> None:
    _, desk = await overloaded(redis, "acme")
    await send(redis, "acme", 0, deadline_ms=50)
    await send(redis, "acme", 1, session="a" * 32, epoch=0)
    await send(redis, "acme", 2, session="a" * 32, epoch=1)
    for number in range(3, 6):
        await send(redis, "acme", number)
    async with desk.ingress.redis.client() as client:
        oldest = (await client.xrange(keys.jobs(TARGET, "acme"), count=1))[0][0]
    sent_ms = int(oldest.partition(b"-")[0])
    await wait_until(lambda: desk.ingress.now_ms() - sent_ms > 120, "the queue to be a little too old")
    await desk.shed(full=True)
    told = await refusals(redis, "acme")
    assert (told[0], told[1]) == ("expired", "stale")
    assert 2 not in told


@pytest.mark.usefixtures("impatient")
async def test_an_expired_job_does_not_hide_the_one_with_its_id_in_another_stream(redis: Redis) -> None:
    """An entry's id is unique within its stream only: what goes besides the expired one is the newest, not the rest."""
    ingress, desk = await overloaded(redis, "acme")
    sent_ms = ingress.now_ms() - 1_000
    await send(redis, "acme", 0, at=f"{sent_ms}-0")
    await send(redis, "acme", 1, at=f"{sent_ms}-1", deadline_ms=50)
    await send(redis, "acme", 2, to="w1", at=f"{sent_ms}-1")
    assert await desk.shed(full=True) == 2
    assert await refusals(redis, "acme") == {1: "expired", 2: "overloaded"}


@pytest.mark.usefixtures("impatient")
async def test_what_is_no_job_stays_where_it_is(redis: Redis) -> None:
    _, desk = await overloaded(redis, "acme")
    stream = keys.jobs(TARGET, "acme")
    await redis.xadd(stream, {"m": b"nothing of ours"})
    await redis.xadd(stream, {"m": encode(Close(agent="edge1", boot="b", session="0" * 32))})
    depth = (await desk.depths(["acme"]))["acme"]
    assert depth.waiting == 2
    await wait_until(lambda: desk.ingress.now_ms() - int(depth.since[stream].partition("-")[0]) > 500, "half a second")
    assert await desk.shed(full=True) == 0
    assert await redis.xlen(stream) == 2


async def test_a_job_that_somebody_took_meanwhile_is_not_refused(redis: Redis) -> None:
    ingress, desk = await overloaded(redis, "acme")
    await send(redis, "acme", 1)
    depth = (await desk.depths(["acme"]))["acme"]
    ((delivery, wanted),) = await desk._jobs(depth, 1)
    (held,) = await ingress.pick_up(1, 10)
    assert await desk._refuse_all([(delivery, wanted, "overloaded")], "no") == 0
    await ingress.reply(held, None)
    assert await desk._refuse_all([(delivery, wanted, "overloaded")], "no") == 0
    assert not await refusals(redis, "acme")


async def test_only_the_first_of_the_peers_looks_after_the_common_stream(redis: Redis) -> None:
    _, first = await overloaded(redis, "acme")
    peer = Ingress(redis, TARGET, "w2")
    await peer.open()
    await peer.beat({"state": "serving"})
    await send(redis, "acme", 1)
    assert await first.depths(["acme"])
    assert not await Shedding(peer).depths(["acme"])


async def test_a_calm_worker_asks_redis_nothing(redis: Redis) -> None:
    _, desk = await overloaded(redis, "acme")
    await redis.config_resetstat()
    assert await desk.shed(full=False) == 0
    assert set(await redis.info("commandstats")) <= {"cmdstat_config|resetstat", "cmdstat_info", "cmdstat_config"}
