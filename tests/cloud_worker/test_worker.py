"""A worker on a real Redis: what it takes, what it answers, and what happens when it, its engine or Redis goes away."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from typing import Any

import msgpack
import pytest
from arq.worker import func
from redis.asyncio import Redis
from rigs import (
    BOOT,
    PROMPT,
    TARGET,
    calls,
    children,
    draws,
    engine_child,
    heard,
    job,
    restarting_redis,
    worker,
    worker_process,
)

from helpers import wait_until
from pilotfish.cloud_worker import worker_process as process_module
from pilotfish.cloud_worker.arq_pool import arq_pool, unpack_job
from pilotfish.cloud_worker.engines.spec import EngineSpec
from pilotfish.cloud_worker.functions import FUNCTIONS
from pilotfish.cloud_worker.worker import StreamWorker
from pilotfish.cloud_worker.worker_process import WorkerSpec, run
from pilotfish.protocol import fleet, keys, shedding
from pilotfish.protocol.broker import EdgeBroker
from pilotfish.protocol.codec import encode
from pilotfish.protocol.errors import BrokerRefused, BrokerUnreachable, ModelError, NoWorker, SettingsError
from pilotfish.protocol.ingress import Ingress
from pilotfish.protocol.messages import Message, Refusal, Verdict

TENANT = keys.DEFAULT_TENANT
ANYONES = keys.jobs(TARGET, TENANT)
IN_A_ROUND = "xadd xreadgroup xread multi exec pexpire xack xdel xclaim xautoclaim evalsha".split()


def session(number: int) -> str:
    return f"{number:032x}"


async def send(redis: Redis, message: Message | bytes, to: str = keys.ANY, agent: str = "edge1", at: str = "*") -> str:
    payload = message if isinstance(message, bytes) else encode(message)
    entry: dict[Any, Any] = {keys.FIELD_MESSAGE: payload, **({keys.FIELD_AGENT: agent} if agent else {})}
    return str((await redis.xadd(keys.jobs(TARGET, TENANT, to), entry, id=at)).decode())


async def letters(redis: Redis) -> list[str]:
    return [fields[b"why"].decode() for _, fields in await redis.xrange(keys.dead_letters(TARGET))]


async def nothing_left(redis: Redis, *workers: str) -> bool:
    for name in (keys.ANY, *workers):
        if await redis.xlen(keys.jobs(TARGET, TENANT, name)):
            return False
    return True


async def in_the_engine(redis: Redis, stream: str = ANYONES, count: int = 1) -> None:
    """Jobs were picked up and are not answered."""

    async def pending() -> bool:
        return (
            bool(await redis.exists(stream)) and (await redis.xpending(stream, keys.GROUP_WORKERS))["pending"] == count
        )

    await wait_until(pending, f"{count} jobs to be picked up")


# --- a round -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_flight", [1, 16])
async def test_a_round_costs_ten_commands_at_most(redis: Redis, redis_url: str, in_flight: int) -> None:
    edge, rounds = EdgeBroker(redis, TENANT, "edge1", BOOT), 128 // in_flight
    async with worker(redis_url):
        replies = edge.replies()
        await edge.publish(TARGET, "", job())
        await anext(replies)
        await redis.config_resetstat()
        for turn in range(rounds):
            for number in range(in_flight):
                await edge.publish(TARGET, "w1", job(session=session(number), round=turn))
            for _ in range(in_flight):
                assert isinstance(await anext(replies), Verdict)
        counted = await calls(redis)
        await replies.aclose()
    per_round = sum(counted[name] for name in IN_A_ROUND) / (rounds * in_flight)
    print(f"commands per round with {in_flight} in flight: {per_round:.2f}")  # noqa: T201
    assert per_round <= 10.5, counted  # a round takes 9; beats and sweeps are paid by time


async def test_a_full_worker_says_so_and_leaves_the_rest_in_the_queue(
    redis: Redis, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shedding, "PATIENCE_MS", 60_000)  # the last one waits for longer than a second
    in_hand: list[int] = []

    async def served() -> bool:
        in_hand.append((await redis.xpending(ANYONES, keys.GROUP_WORKERS))["pending"])
        return await nothing_left(redis, "w1")

    async def full() -> bool:
        await served()
        return bool(await redis.hget(keys.beat(TARGET, "w1"), "credit") == b"0")  # type: ignore[misc]

    async with worker(redis_url, "w1", "step_ms=20", max_jobs=2):
        for number in range(5):
            await send(redis, job(session=session(number), continue_tokens=30))
        await wait_until(full, "a beat without credit")
        assert await redis.xlen(ANYONES) >= 3
        await wait_until(served, "all five to be answered")
    assert max(in_hand) == 2
    said = [message for message in await heard(redis, 5) if message.last]
    assert sorted(message.session for message in said) == [session(number) for number in range(5)]
    assert all(0 <= message.credit <= 2 for message in said)


async def test_the_worker_says_what_it_serves(redis: Redis, redis_url: str) -> None:
    async with worker(redis_url):
        found = await fleet.find_target(redis)
        assert (found.id, found.draft_max, len(found.vocabulary)) == (TARGET, 16, 256)
        beat = await wait_until(lambda: redis.hgetall(keys.beat(TARGET, "w1")), "a beat")
        assert beat[b"state"] == b"serving"
    with pytest.raises(NoWorker):
        await fleet.find_target(redis)


async def test_entries_of_two_streams_with_one_id_are_two_jobs(redis: Redis, redis_url: str) -> None:
    async with worker(redis_url, model="step_ms=200"):
        entry_id = f"{int(time.time() * 1000)}-7"
        await send(redis, job(session=session(1)), at=entry_id)
        await send(redis, job([9], session=session(2)), "w1", at=entry_id)
        got = {reply.session: reply for reply in await heard(redis, 2)}
    assert {name: reply.draws[0] for name, reply in got.items()} == {
        session(1): draws(PROMPT, 1)[0],
        session(2): draws([9], 1)[0],
    }


# --- always a reply ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("payload", [b"", b"\xc1", b"\x80", b"{}", b"x" * 1_010_000, encode(job())[:-3]])
async def test_what_cannot_be_read_is_refused_kept_and_acknowledged(
    redis: Redis, redis_url: str, payload: bytes
) -> None:
    async with worker(redis_url):
        await send(redis, payload)
        (reply,) = await heard(redis)
        assert (reply.code, reply.worker) == ("invalid_message", "w1")
        assert await letters(redis) == ["invalid_message"]
        assert await nothing_left(redis)


async def test_without_an_agent_field_the_payload_says_whom_to_answer(redis: Redis, redis_url: str) -> None:
    async with worker(redis_url):
        await send(redis, b"\xc1", agent="")
        await send(redis, job(), agent="")
        (reply,) = await heard(redis)
        assert isinstance(reply, Verdict)
        assert await nothing_left(redis), "a job nobody can be told of must not stay"


async def test_an_invented_id_is_refused_and_the_stream_is_honest_again(redis: Redis, redis_url: str) -> None:
    async with worker(redis_url):
        await send(redis, job(), at="9999999999999-0")
        (refusal,) = await heard(redis)
        assert (refusal.code, "ahead of Redis' clock" in refusal.sentence) == ("bad_request", True)
        await wait_until(lambda: _honest(redis), "the stream to start over")
        await send(redis, job(round=1))
        assert isinstance((await heard(redis, 2))[1], Verdict)


async def _honest(redis: Redis) -> bool:
    return not (await redis.xinfo_stream(ANYONES))["last-generated-id"].startswith(b"9999")


async def test_a_job_older_than_its_deadline_is_answered_so(redis: Redis, redis_url: str) -> None:
    async with worker(redis_url):
        await send(redis, job(deadline_ms=1000), at=f"{int(time.time() * 1000) - 5000}-0")
        (refusal,) = await heard(redis)
    assert (refusal.code, refusal.session) == ("expired", session(0))


async def test_after_three_deliveries_a_job_is_a_dead_letter_with_a_reply(redis: Redis, redis_url: str) -> None:
    ingress = Ingress(redis, TARGET, "ghost")
    await ingress.open()
    entry_id = await send(redis, job())
    await ingress.pick_up(1, 10)
    await redis.xclaim(ANYONES, keys.GROUP_WORKERS, "ghost", 0, [entry_id], retrycount=keys.DELIVERIES_MAX)
    async with worker(redis_url):
        (refusal,) = await heard(redis)
        assert (refusal.code, refusal.session, refusal.boot) == ("dead_letter", session(0), BOOT)
        assert await letters(redis) == ["dead_letter"]
        assert await nothing_left(redis)


async def test_a_job_that_takes_too_long_is_answered_so(
    redis: Redis, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process_module, "JOB_SECONDS", 0.3)
    async with worker(redis_url, model="step_ms=100"):
        await send(redis, job(continue_tokens=1000))
        replies = await wait_until(lambda: _ended(redis), "the last reply")
        assert (replies.code, replies.sentence) == ("engine_failed", "no answer within 0.3 s")
        assert await nothing_left(redis)


async def _ended(redis: Redis) -> Any:
    last = (await heard(redis))[-1]
    return last if isinstance(last, Refusal) or last.last else None


async def test_a_function_that_raises_is_an_answer(
    redis: Redis, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pilotfish.cloud_worker.verify.Verification._check", lambda *_: 1 / 0)
    async with worker(redis_url):
        await send(redis, job())
        (refusal,) = await heard(redis)
    assert (refusal.code, refusal.sentence) == ("engine_failed", "ZeroDivisionError: division by zero")


async def test_a_killed_engine_is_an_answer_and_the_next_job_is_served(redis: Redis, redis_url: str) -> None:
    async with worker(redis_url, model="step_ms=300"):
        await send(redis, job())
        await in_the_engine(redis)
        os.kill(engine_child(), signal.SIGKILL)
        (refusal,) = await heard(redis)
        assert (refusal.code, "try again" in refusal.sentence) == ("engine_failed", True)
        await send(redis, job(epoch=1, round=1))
        verdict = (await heard(redis, 2))[1]
    assert verdict.draws == (draws(PROMPT, 1)[0],)


# --- leases --------------------------------------------------------------------------------------------------


@pytest.mark.slow
async def test_a_job_longer_than_its_lease_runs_once(redis: Redis, redis_url: str) -> None:
    slow = f"step_ms={keys.LEASE_MS + 800}"
    async with worker(redis_url, "w1", slow), worker(redis_url, "w2", slow):
        entry_id = await send(redis, job())
        await in_the_engine(redis)
        (pending,) = await redis.xpending_range(ANYONES, keys.GROUP_WORKERS, "-", "+", 10)
        (verdict,) = await heard(redis)
        assert verdict.worker == pending["consumer"].decode()
        assert pending["message_id"].decode() == entry_id
        assert await redis.xlen(keys.replies(TENANT, "edge1")) == 1
        assert await nothing_left(redis)


@pytest.mark.slow
async def test_a_killed_workers_jobs_are_answered_by_a_peer(redis: Redis, redis_url: str) -> None:
    """Picked up from `any` and from its own stream, and one it never saw; then nothing of it is left."""
    own = keys.jobs(TARGET, TENANT, "w1")
    async with worker_process(redis_url, "w1", "step_ms=5000") as victim:
        await send(redis, job(session=session(1)))
        await send(redis, job(session=session(2)), "w1")
        await in_the_engine(redis, ANYONES)
        await in_the_engine(redis, own)
        async with worker(redis_url, "w2"):
            os.kill(victim.pid, signal.SIGKILL)
            await victim.wait()
            killed = time.monotonic()
            await send(redis, job(session=session(3)), "w1")
            replies = await heard(redis, 2)
            recovered = time.monotonic() - killed
            replies = await heard(redis, 3)
            unseen = time.monotonic() - killed
            assert {reply.session for reply in replies} == {session(n) for n in (1, 2, 3)}
            assert {reply.worker for reply in replies} == {"w2"}
            await wait_until(lambda: _buried(redis, own), "its stream to be buried")
            assert await letters(redis) == []
    print(f"kill -9: leased jobs after {recovered:.2f} s, unseen ones after {unseen:.2f} s")  # noqa: T201
    assert recovered < 6, "leases take a second"


async def _buried(redis: Redis, stream: str) -> bool:
    return not await redis.exists(stream) and await redis.zscore(keys.workers(TARGET), "w1") is None


# --- the end -------------------------------------------------------------------------------------------------


@pytest.mark.slow
async def test_on_sigterm_what_runs_is_answered_and_nothing_more_is_taken(redis: Redis, redis_url: str) -> None:
    own = keys.jobs(TARGET, TENANT, "w1")
    async with worker_process(redis_url, "w1", "step_ms=700") as leaving:
        (engine,) = children(leaving.pid)
        await send(redis, job(session=session(1)))
        await in_the_engine(redis)
        leaving.terminate()
        await wait_until(lambda: _draining(redis), "the drain to be told")
        await send(redis, job(session=session(2)), "w1")
        await send(redis, job(session=session(3)))
        assert await asyncio.wait_for(leaving.wait(), 10) == 0
        assert not os.path.exists(f"/proc/{engine}"), "the engine outlived its worker"  # noqa: ASYNC240
        (answered,) = await heard(redis)
        assert (answered.session, answered.worker) == (session(1), "w1")
        assert await redis.xlen(own) == await redis.xlen(ANYONES) == 1, "a draining worker took a job"
        async with worker(redis_url, "w2"):
            rest = (await heard(redis, 3))[1:]
            assert {(reply.session, reply.worker) for reply in rest} == {(session(2), "w2"), (session(3), "w2")}
            await wait_until(lambda: _buried(redis, own), "its stream to be buried")


@pytest.mark.slow
async def test_while_a_worker_drains_peers_answer_what_is_sent_to_it(redis: Redis, redis_url: str) -> None:
    async with worker_process(redis_url, "w1", "step_ms=4000") as leaving:
        await send(redis, job(session=session(1)))
        await in_the_engine(redis)
        async with worker(redis_url, "w2"):
            leaving.terminate()
            await wait_until(lambda: _draining(redis), "the drain to be told")
            await send(redis, job(session=session(2)), "w1")
            replies = await heard(redis, 2)
    assert [(reply.session, reply.worker) for reply in replies] == [(session(2), "w2"), (session(1), "w1")]


async def _draining(redis: Redis) -> bool:
    beat = await redis.hgetall(keys.beat(TARGET, "w1"))  # type: ignore[misc]  # redis-py types both its clients at once
    return bool(beat.get(b"state") == b"draining")


async def test_an_idle_worker_leaves_at_once(redis: Redis, redis_url: str) -> None:
    async with worker_process(redis_url, "w1") as leaving:
        leaving.terminate()
        assert await asyncio.wait_for(leaving.wait(), 10) == 0
        assert not await redis.exists(keys.beat(TARGET, "w1"))


# --- Redis goes away -----------------------------------------------------------------------------------------


async def test_a_worker_outlives_its_redis_and_tells_the_new_one_everything() -> None:
    with restarting_redis(17831) as server:
        async with Redis.from_url(server.url) as redis, worker(server.url) as running:
            await send(redis, job())
            assert await heard(redis)
            server.kill()
            server.start()
            await redis.connection_pool.disconnect()
            await wait_until(lambda: redis.exists(keys.jobs(TARGET, TENANT, "w1"), ANYONES), "its streams")
            await wait_until(lambda: _announced(redis), "the target to be announced again")
            await EdgeBroker(redis, TENANT, "edge1", BOOT).publish(TARGET, "w1", job(round=1))
            (verdict,) = await heard(redis)
            assert verdict.round == 1
            assert not running.done()


async def _announced(redis: Redis) -> bool:
    named = await redis.hexists(keys.TARGETS, TARGET)  # type: ignore[misc]
    return bool(named and await redis.exists(keys.pair(TARGET)))


@pytest.mark.slow
async def test_a_sweep_that_fails_by_a_fault_of_ours_ends_the_worker(
    redis: Redis, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without its sweep a worker would let every lease run out in silence."""

    async def serve_until_it_ends() -> None:
        async with worker(redis_url) as running:
            monkeypatch.setattr(Ingress, "sweep", lambda *_: 1 / 0)
            await asyncio.wait_for(asyncio.shield(running), 10)

    with pytest.raises(ZeroDivisionError):
        await serve_until_it_ends()


@pytest.mark.parametrize(
    ("url", "engine", "kind", "sentence"),
    [
        ("redis://127.0.0.1:1/0", "fake", BrokerUnreachable, "pilotfish up.*REDIS_URL"),
        ("not a url", "fake", BrokerUnreachable, "use redis://"),
        ("redis://:wrong@{at}", "fake", BrokerRefused, "Check the password"),
        ("{url}", "none", ModelError, "choose vllm, llamacpp or fake"),
    ],
)
async def test_what_keeps_a_worker_from_starting_is_one_sentence(
    redis: Redis, redis_url: str, url: str, engine: str, kind: type[Exception], sentence: str
) -> None:
    url = url.format(url=redis_url, at=redis_url.rpartition("@")[2])
    with pytest.raises(kind, match=sentence):
        await run(WorkerSpec(url, EngineSpec(engine, "")))


# --- arq's own queue -----------------------------------------------------------------------------------------


async def test_deferred_jobs_of_arqs_own_queue_run_on_the_same_worker_without_pickle(
    redis_url: str, redis: Redis
) -> None:
    async def add(ctx: dict[str, Any], a: int, b: int) -> int:
        return a + b

    pool = arq_pool(redis_url, f"arq:{keys.PREFIX}:{TARGET}")
    stream_worker = StreamWorker(
        (*FUNCTIONS, func(add, name="add")),
        ingress=Ingress(pool, TARGET, "w1"), describe=lambda: {"engine": "none"}, announce=_nothing, redis_pool=pool,
        job_serializer=msgpack.packb, job_deserializer=unpack_job,
    )  # fmt: skip
    running = asyncio.create_task(stream_worker.async_run())
    queued = await pool.enqueue_job("add", 2, 3, _defer_by=0.05)
    assert queued
    stored = await redis.get(f"arq:job:{queued.job_id}")
    assert msgpack.unpackb(stored)["a"] == [2, 3]
    assert await queued.result(timeout=10, poll_delay=0.05) == 5
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await stream_worker.close()


async def _nothing() -> None:
    """This worker serves no target."""


@pytest.mark.parametrize("missing", ["job_serializer", "job_deserializer"])
async def test_a_worker_that_would_unpickle_does_not_start(redis_url: str, missing: str) -> None:
    pool = arq_pool(redis_url, "arq:q")
    both: dict[str, Any] = {"job_serializer": msgpack.packb, "job_deserializer": unpack_job}
    rest: dict[str, Any] = {
        "ingress": Ingress(pool, TARGET, "w1"), "describe": dict, "announce": _nothing, "redis_pool": pool,
    }  # fmt: skip
    with pytest.raises(SettingsError, match="unpickles"):
        StreamWorker(FUNCTIONS, **rest, **{**both, missing: None})
    setattr(pool, missing, None)
    with pytest.raises(SettingsError, match="unpickles"):
        StreamWorker(FUNCTIONS, **rest, **both)
    await pool.aclose()


@pytest.mark.parametrize("name", ["gpu 1", "a:b", keys.ANY, "x" * 65])
async def test_a_name_that_cannot_be_part_of_a_key_is_refused_at_start(redis_url: str, name: str) -> None:
    with pytest.raises(SettingsError, match="cannot name a worker: take letters"):
        await run(WorkerSpec(redis_url, EngineSpec("fake", ""), name=name))
