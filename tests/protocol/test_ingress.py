"""The worker's side of the streams: pick-up, leases, what the dead leave, and answers that are one transaction."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest
import redis.exceptions as rx
from redis.asyncio import Redis
from rigs import TARGET, calls, job

from helpers import wait_until
from pilotfish.protocol import keys
from pilotfish.protocol.broker import EdgeBroker
from pilotfish.protocol.codec import encode
from pilotfish.protocol.delivery import DEAD_LETTER_BYTES, Delivery
from pilotfish.protocol.ingress import Ingress
from pilotfish.protocol.messages import Refusal

TENANT = keys.DEFAULT_TENANT
BEAT = {"state": "serving"}
NO = Refusal(code="bad_request", worker="w1")


@pytest.fixture
def short_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "LEASE_MS", 150)


async def opened(redis: Redis, name: str = "w1") -> Ingress:
    ingress = Ingress(redis, TARGET, name)
    await ingress.open()
    await ingress.beat(BEAT)
    return ingress


async def send(redis: Redis, worker: str = keys.ANY, tenant: str = TENANT, **fields: Any) -> str:
    entry: dict[Any, Any] = {keys.FIELD_AGENT: "edge1", keys.FIELD_MESSAGE: b"job", **fields}
    return str((await redis.xadd(keys.jobs(TARGET, tenant, worker), entry)).decode())


async def taken(ingress: Ingress) -> list[str]:
    return [delivery.entry_id for delivery in await ingress.pick_up(30, 10)]


async def owner(redis: Redis, delivery: Delivery) -> str:
    (pending,) = await redis.xpending_range(delivery.stream, keys.GROUP_WORKERS, "-", "+", 10)
    return str(pending["consumer"].decode())


async def dies(redis: Redis, ingress: Ingress, *peers: Ingress) -> None:
    """The worker's last beat is old, and its peers have noticed."""
    await redis.zadd(keys.workers(TARGET), {ingress.worker: 1})
    for peer in peers:
        await peer.beat(BEAT)


# --- picking up ----------------------------------------------------------------------------------------------


async def test_a_worker_takes_its_own_jobs_and_those_for_any_but_not_its_peers(redis: Redis) -> None:
    first, second = await opened(redis, "w1"), await opened(redis, "w2")
    own, anyones, others = await send(redis, "w1"), await send(redis), await send(redis, "w2")
    assert sorted(await taken(first)) == sorted([own, anyones])
    assert await taken(second) == [others]


async def test_the_tenant_comes_from_the_stream_and_the_agent_from_the_entry(redis: Redis) -> None:
    await redis.sadd(keys.TENANTS, "acme")  # type: ignore[misc]  # redis-py types both its clients at once
    ingress = await opened(redis)
    await send(redis, tenant="acme")
    (delivery,) = await ingress.pick_up(10, 10)
    assert (delivery.tenant, delivery.agent, delivery.payload, delivery.deliveries) == ("acme", "edge1", b"job", 1)


@pytest.mark.parametrize("name", ["", "a:b", "x" * 65, "naïve", "*"])
async def test_a_name_that_could_reach_other_keys_is_no_agent(redis: Redis, name: str) -> None:
    ingress = await opened(redis)
    await send(redis, **{keys.FIELD_AGENT: name})
    (delivery,) = await ingress.pick_up(10, 10)
    assert delivery.agent == ""


async def test_a_worker_with_little_room_leaves_the_rest_to_its_peers(redis: Redis) -> None:
    first, second = await opened(redis, "w1"), await opened(redis, "w2")
    sent = [await send(redis) for _ in range(6)]
    assert await first.pick_up(4, 10)
    assert len(first.held) <= 4
    assert sorted([*(entry for _, entry in first.held), *await taken(second)]) == sorted(sent)


async def test_a_tenant_that_joins_is_served_from_the_next_beat_on(redis: Redis) -> None:
    ingress = await opened(redis)
    await redis.sadd(keys.TENANTS, "late")  # type: ignore[misc]  # redis-py types both its clients at once
    await ingress.beat(BEAT)
    sent = await EdgeBroker(redis, "late", "edge1", "b").publish(TARGET, "", job())
    assert await taken(ingress) == [sent.decode()]


async def test_after_redis_lost_everything_streams_are_opened_again_and_the_target_is_missed(redis: Redis) -> None:
    ingress = await opened(redis)
    await redis.set(keys.pair(TARGET), b"vocabulary", px=1000)
    assert await ingress.beat(BEAT)
    await redis.flushall()
    assert await taken(ingress) == []
    sent = await send(redis)
    assert await taken(ingress) == [sent]
    assert not await ingress.beat(BEAT)


async def test_a_worker_buried_alive_while_it_waits_opens_its_streams_again(redis: Redis) -> None:
    ingress = await opened(redis)
    waiting = asyncio.create_task(ingress.pick_up(10, 2000))
    blocked = keys.jobs(TARGET, TENANT, "w1")
    await wait_until(lambda: _blocked(redis), "the worker to wait")
    await redis.delete(blocked)
    assert await waiting == []
    if not await redis.exists(blocked):  # before Redis 7 this wakes nobody: the next pick-up finds out
        assert await ingress.pick_up(10, 10) == []
    assert await redis.exists(blocked)


async def _blocked(redis: Redis) -> bool:
    return bool((await redis.info("clients"))["blocked_clients"])


# --- leases --------------------------------------------------------------------------------------------------


async def test_a_lease_that_is_renewed_is_never_taken_over(redis: Redis, short_lease: None) -> None:
    first, second = await opened(redis, "w1"), await opened(redis, "w2")
    sent = await send(redis)
    (held,) = await first.pick_up(10, 10)
    await second.beat(BEAT)

    async def swept_for_long() -> bool:
        await first.sweep(10)
        assert await second.sweep(10) == []
        return first.now_ms() - int(sent.partition("-")[0]) > 3 * keys.LEASE_MS

    await wait_until(swept_for_long, "three leases to pass")
    assert await owner(redis, held) == "w1"


async def test_a_lease_that_ran_out_goes_to_a_peer_which_counts_the_deliveries(redis: Redis, short_lease: None) -> None:
    first, second = await opened(redis, "w1"), await opened(redis, "w2")
    sent = [await send(redis), await send(redis, "w1")]
    await first.pick_up(10, 10)
    await second.beat(BEAT)
    found: list[Delivery] = []

    async def both() -> bool:
        found.extend(await second.sweep(10))
        return len(found) == 2

    await wait_until(both, "the peer to take both over")
    assert sorted(d.entry_id for d in found) == sorted(sent)
    assert [d.deliveries for d in found] == [2, 2]
    assert {d.payload for d in found} == {b"job"}


async def test_a_stolen_lease_is_not_stolen_back(redis: Redis, short_lease: None) -> None:
    first, second = await opened(redis, "w1"), await opened(redis, "w2")
    await send(redis)
    (held,) = await first.pick_up(10, 10)
    await wait_until(lambda: second.sweep(10), "the peer to take it over")
    await first.sweep(0)
    assert await owner(redis, held) == "w2"


async def test_a_stream_that_vanished_holds_up_no_other_lease(redis: Redis, short_lease: None) -> None:
    first, second = await opened(redis, "w1"), await opened(redis, "w2")
    await send(redis), await send(redis, "w1")
    await first.pick_up(10, 10)
    await redis.delete(keys.jobs(TARGET, TENANT, "w1"))

    async def swept_for_long() -> bool:
        await first.sweep(0)
        assert await second.sweep(10) == []
        return first.age_ms(next(iter(first.held.values()))) > 3 * keys.LEASE_MS

    await wait_until(swept_for_long, "three leases to pass")


async def test_a_worker_without_room_takes_nothing_over(redis: Redis, short_lease: None) -> None:
    first, second = await opened(redis, "w1"), await opened(redis, "w2")
    await send(redis)
    (held,) = await first.pick_up(10, 10)
    await wait_until(lambda: first.age_ms(held) > 2 * keys.LEASE_MS, "the lease to run out")
    assert await second.sweep(0) == []
    assert len(await second.sweep(1)) == 1


# --- the dead ------------------------------------------------------------------------------------------------


async def test_what_lies_undelivered_in_a_dead_workers_stream_is_read_and_the_dead_buried(redis: Redis) -> None:
    dead, peer = await opened(redis, "w1"), await opened(redis, "w2")
    sent = await send(redis, "w1")
    await dies(redis, dead, peer)
    (found,) = await peer.sweep(10)
    assert found.entry_id == sent
    assert await redis.exists(found.stream), "buried with a job in it"
    await peer.reply(found, NO)
    await peer.sweep(10)
    assert not await redis.exists(found.stream)
    assert await redis.zrange(keys.workers(TARGET), 0, -1) == [b"w2"]
    assert await EdgeBroker(redis, TENANT, "edge1", "b").publish(TARGET, "w1", job())
    assert len(await peer.pick_up(10, 10)) == 1, "the edge did not fall back to any"


async def test_a_tenant_the_dead_worker_never_knew_does_not_hide_the_others_jobs(redis: Redis) -> None:
    dead, peer = await opened(redis, "w1"), await opened(redis, "w2")
    sent = await send(redis, "w1")
    await redis.sadd(keys.TENANTS, TENANT, "another")  # type: ignore[misc]  # redis-py types both its clients at once
    await dies(redis, dead, peer)
    assert [found.entry_id for found in await peer.sweep(10)] == [sent]


async def test_a_worker_that_came_back_is_not_buried(redis: Redis) -> None:
    paused, peer = await opened(redis, "w1"), await opened(redis, "w2")
    await dies(redis, paused, peer)
    await paused.beat(BEAT)
    await peer.sweep(10)
    assert await redis.exists(keys.jobs(TARGET, TENANT, "w1"))
    assert await redis.zscore(keys.workers(TARGET), "w1")


async def test_a_draining_worker_counts_as_dead_for_its_own_stream_only(redis: Redis) -> None:
    draining, peer = await opened(redis, "w1"), await opened(redis, "w2")
    await send(redis, "w1")
    (running,) = await draining.pick_up(10, 10)
    later = await send(redis, "w1")
    await draining.beat(BEAT, serving=False)
    await peer.beat(BEAT)
    assert [found.entry_id for found in await peer.sweep(10)] == [later]
    assert await redis.exists(running.stream), "buried while a job of it runs"


# --- answering -----------------------------------------------------------------------------------------------


async def test_reply_and_acknowledgement_are_one_transaction(redis: Redis) -> None:
    ingress = await opened(redis)
    await send(redis)
    (delivery,) = await ingress.pick_up(10, 10)
    await ingress.reply(delivery, NO, last=False)  # Redis learns the script
    await redis.config_resetstat()
    await ingress.reply(delivery, NO)
    counted = await calls(redis)
    in_the_script = {"xadd": 1, "pexpire": 1, "xack": 1, "xdel": 1}
    assert {name: n for name, n in counted.items() if not name.startswith(("config", "info"))} == {
        "evalsha": 1,
        **in_the_script,
    }
    assert await redis.xlen(delivery.stream) == 0
    assert (await redis.xpending(delivery.stream, keys.GROUP_WORKERS))["pending"] == 0
    assert ingress.held == {}


async def test_chunks_keep_the_job_and_the_last_one_ends_it(redis: Redis) -> None:
    ingress = await opened(redis)
    await send(redis)
    (delivery,) = await ingress.pick_up(10, 10)
    await ingress.reply(delivery, NO, last=False)
    assert await redis.xlen(delivery.stream) == 1
    assert ingress.held
    await ingress.reply(delivery, NO)
    assert await redis.xlen(keys.replies(TENANT, "edge1")) == 2
    assert await redis.xlen(delivery.stream) == 0


async def test_dead_letters_say_why_and_keep_no_megabytes(redis: Redis) -> None:
    ingress = await opened(redis)
    await send(redis, **dict[str, Any]({keys.FIELD_MESSAGE: b"x" * 900_000}))
    (delivery,) = await ingress.pick_up(10, 10)
    await ingress.reply(delivery, NO, dead="invalid_message")
    ((_, letter),) = await redis.xrange(keys.dead_letters(TARGET))
    assert letter[b"why"] == b"invalid_message"
    assert letter[b"stream"] == delivery.stream.encode()
    assert len(letter[keys.FIELD_MESSAGE.encode()]) == DEAD_LETTER_BYTES


async def test_an_invented_id_bricks_a_stream_only_until_it_is_empty(redis: Redis) -> None:
    ingress = await opened(redis)
    stream = keys.jobs(TARGET, TENANT)
    await redis.xadd(stream, {keys.FIELD_AGENT: "evil"}, id="9999999999999-0")
    behind = await send(redis)
    assert behind.startswith("9999999999999-")
    first, second = await ingress.pick_up(10, 10)
    assert ingress.age_ms(first) < -1_000_000
    await ingress.reply(first, None)
    await ingress.start_over(stream)
    assert await redis.xlen(stream) == 1, "a job was thrown away"
    await ingress.reply(second, None)
    await ingress.start_over(stream)
    await send(redis)
    (honest,) = await ingress.pick_up(10, 10)
    assert abs(ingress.age_ms(honest)) < 1_000


@pytest.mark.usefixtures("short_lease")
async def test_a_sweep_that_fails_half_way_gives_back_what_it_took(
    redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = await opened(redis, "w1"), await opened(redis, "w2")
    await send(redis)
    await first.pick_up(10, 10)
    first.held.clear()  # w1 is gone
    await wait_until(lambda: expired(redis), "the lease to run out")
    second._beats = {"w1": 0}

    async def lost(dead: list[str], count: int) -> list[Any]:
        raise rx.ConnectionError("lost")

    monkeypatch.setattr(second, "_left_behind", lost)
    with pytest.raises(rx.ConnectionError):
        await second.sweep(10)
    assert second.held == {}, "or its lease would be renewed for ever"


@pytest.mark.usefixtures("short_lease")
async def test_an_expired_job_behind_many_renewed_ones_is_found(redis: Redis) -> None:
    peer, ours = await opened(redis, "w1"), await opened(redis, "w2")
    for _ in range(31):
        await send(redis)
    taken = await peer.pick_up(100, 10)
    peer.release(taken[-1])  # of the last one the worker died
    await wait_until(lambda: expired(redis), "the leases to run out")
    await peer.sweep(0)
    for _ in range(6):
        if found := await ours.sweep(1):
            break
    assert [delivery.entry_id for delivery in found] == [taken[-1].entry_id]


async def expired(redis: Redis) -> bool:
    """Whether the entries of the `any` stream were leased longer ago than a lease lasts."""
    pending = await redis.xpending_range(
        keys.jobs(TARGET, TENANT), keys.GROUP_WORKERS, "-", "+", 1, idle=keys.LEASE_MS + 50
    )
    return bool(pending)


# --- passing on --------------------------------------------------------------------------------------------------


async def passed_on(redis: Redis, first: Ingress, to: str = "w2") -> Delivery:
    """A job that w1 took and passed on."""
    await send(redis)
    (delivery,) = await first.pick_up(30, 10)
    assert await first.pass_on(delivery, to, cached_tokens=64, queued_tokens=7)
    return delivery


async def test_a_job_passed_on_keeps_its_tenant_its_agent_its_age_and_what_was_said(redis: Redis) -> None:
    first, second = await opened(redis, "w1"), await opened(redis, "w2")
    before = await passed_on(redis, first)
    (after,) = await second.pick_up(30, 10)
    assert (after.tenant, after.agent, after.payload) == (before.tenant, before.agent, before.payload)
    assert (after.sent_ms, after.deliveries, after.hops) == (before.sent_ms, 1, 1)
    assert (after.cached_tokens, after.queued_tokens, after.stolen) == (64, 7, False)
    assert second.is_mine(after)
    assert not first.held
    assert not await redis.xlen(before.stream)


async def test_a_job_passed_on_twice_counts_its_hops_and_every_delivery(redis: Redis) -> None:
    first, second, third = [await opened(redis, name) for name in ("w1", "w2", "w3")]
    before = await passed_on(redis, first)
    (again,) = await second.pick_up(30, 10)
    assert await second.pass_on(replace(again, deliveries=2), "w3")
    (last,) = await third.pick_up(30, 10)
    assert (last.sent_ms, last.deliveries, last.hops, last.cached_tokens) == (before.sent_ms, 2, 2, -1)


async def test_an_entry_with_many_messages_is_one_job_when_it_is_passed_on_too(redis: Redis) -> None:
    """Else an edge would make a thousand jobs of one, in a stream that no share and no bound looks at."""
    first, second = await opened(redis, "w1"), await opened(redis, "w2")
    stream, messages = keys.jobs(TARGET, keys.DEFAULT_TENANT), [encode(job(round=number)) for number in range(50)]
    fields = [part for message in messages for part in (keys.FIELD_MESSAGE, message)]
    await redis.execute_command("XADD", stream, "*", keys.FIELD_AGENT, "edge1", *fields)  # type: ignore[no-untyped-call]
    (delivery,) = await first.pick_up(30, 10)
    assert await first.pass_on(delivery, "w2")
    (after,) = await second.pick_up(300, 10)
    assert after.payload == delivery.payload == messages[-1]


async def test_nothing_is_passed_to_who_has_no_stream_nor_what_is_no_longer_ours(redis: Redis) -> None:
    first, second = await opened(redis, "w1"), await opened(redis, "w2")
    await send(redis)
    (delivery,) = await first.pick_up(30, 10)
    assert not await first.pass_on(delivery, "nobody")
    await redis.xclaim(delivery.stream, keys.GROUP_WORKERS, "w2", 0, [delivery.entry_id])
    assert not await first.pass_on(delivery, "w2")
    assert await redis.xlen(delivery.stream) == 1
    assert await taken(second) == []


async def test_a_reply_to_a_job_passed_on_reaches_the_agent_and_removes_it(redis: Redis) -> None:
    first, second = await opened(redis, "w1"), await opened(redis, "w2")
    await passed_on(redis, first)
    (delivery,) = await second.pick_up(30, 10)
    await second.reply(delivery, Refusal(code="stale", worker="w2"))
    assert await redis.xlen(keys.replies(TENANT, delivery.agent)) == 1
    assert await redis.xlen(delivery.stream) == 0


async def test_a_busy_worker_leaves_what_was_passed_on_and_an_idle_one_takes_it(redis: Redis) -> None:
    first, second, third = [await opened(redis, name) for name in ("w1", "w2", "w3")]
    await passed_on(redis, first)
    assert await second.pick_up(30, 10, passed_on=False) == []
    for each in (second, third):
        await each.beat(BEAT)
    await third.beat(BEAT)
    (stolen,) = await third.steal(1)
    assert (stolen.stolen, stolen.queued_tokens, third.is_mine(stolen)) == (True, 7, False)
    assert await taken(second) == []
    assert second.waiting == 1, "as of its beat"


@pytest.mark.usefixtures("short_lease")
async def test_what_was_passed_to_a_worker_that_died_is_taken_over(
    redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, third = [await opened(redis, name) for name in ("w1", "w2", "w3")]
    await passed_on(redis, first)  # w2 never takes this one
    await passed_on(redis, first, "w3")
    (in_hand,) = await third.pick_up(30, 10)  # w3 dies with this one in its hands
    for each in (second, third):
        await each.beat(BEAT)
    monkeypatch.setattr(keys, "BEAT_TTL_MS", 1)
    await first.beat(BEAT)
    found: list[Delivery] = []

    async def both() -> bool:
        found.extend(await first.sweep(10))
        return len(found) == 2

    await wait_until(both, "both jobs to be taken over")
    assert {each.hops for each in found} == {1}
    assert {each.stream: each.deliveries for each in found}[in_hand.stream] == 2
    assert not any(each.stolen for each in found)
