"""Where a session's first job goes: warm workers, queues, tenants, and what happens when the index is wrong or away."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Sequence
from contextlib import AsyncExitStack
from functools import partial
from typing import Any

import pytest
from redis.asyncio import Redis
from rigs import BOOT, TARGET, agent, draws, engine_child, heard, job, text_of, worker

from helpers import wait_until
from pilotfish.cache.block_hash import block_hashes, short
from pilotfish.cache.prefix_index import PrefixIndex
from pilotfish.edge_agent.task import Task
from pilotfish.protocol import keys
from pilotfish.protocol.codec import encode
from pilotfish.protocol.ingress import Ingress
from pilotfish.protocol.messages import Close, Verdict, VerifyJob

TENANT = keys.DEFAULT_TENANT
BLOCK = 16
CACHING = f"kv_blocks=2000,block_size={BLOCK}"
SYSTEM = [n % 251 for n in range(10 * BLOCK)]


class Edge:
    """Sends first jobs of sessions and hears of them."""

    def __init__(self, redis: Redis, name: str = "edge1", tenant: str = TENANT) -> None:
        self.redis, self.name, self.tenant = redis, name, tenant
        self.sent = 0

    async def send(self, ids: Sequence[int], to: str = keys.ANY, /, **changes: Any) -> VerifyJob:
        self.sent += 1
        fields = {"session": f"{self.sent:032x}", "agent": self.name, "round": self.sent, **changes}
        sent = job(ids, **fields)
        entry: dict[Any, Any] = {keys.FIELD_AGENT: self.name, keys.FIELD_MESSAGE: encode(sent)}
        await self.redis.xadd(keys.jobs(TARGET, self.tenant, to), entry)
        return sent

    async def answer(self, sent: VerifyJob) -> Verdict:
        """Of a job, once it is there."""
        stream = keys.replies(self.tenant, self.name)

        async def find() -> Verdict | None:
            from pilotfish.protocol.broker import read_entry
            from pilotfish.protocol.messages import ToEdge

            said = [read_entry(fields, ToEdge) for _, fields in await self.redis.xrange(stream)]
            return next((m for m in said if (m.session, m.round) == (sent.session, sent.round)), None)

        found = await wait_until(find, f"an answer to round {sent.round}")
        assert isinstance(found, Verdict), found
        assert list(found.draws[:1]) == draws(sent.ids, 1, sent.sampling)
        return found

    async def ask(self, ids: Sequence[int], to: str = keys.ANY, /, **changes: Any) -> Verdict:
        return await self.answer(await self.send(ids, to, **changes))


async def beats(redis: Redis, *names: str) -> dict[str, int]:
    """A counter of the beats, summed."""
    found: dict[str, int] = {}
    for name in names:
        for field, value in (await redis.hgetall(keys.beat(TARGET, name))).items():  # type: ignore[misc]
            if value.isdigit():
                found[field.decode()] = found.get(field.decode(), 0) + int(value)
    return found


async def counted(redis: Redis, field: str, least: int, *names: str) -> dict[str, int]:
    async def enough() -> dict[str, int] | None:
        found = await beats(redis, *names)
        return found if found.get(field, 0) >= least else None

    return dict(await wait_until(enough, f"{field} to reach {least}"))


# --- warm workers ------------------------------------------------------------------------------------------------


async def test_a_session_goes_where_its_prefix_is_and_the_prediction_comes_true(redis: Redis, redis_url: str) -> None:
    async with worker(redis_url, "w1", CACHING), worker(redis_url, "w2", CACHING):
        edge = Edge(redis)
        served = []
        for n in range(12):
            family = n % 3
            verdict = await edge.ask([*SYSTEM, *[family] * 5 * BLOCK, n])
            served.append((family, verdict.worker, verdict.cached))
        found = await counted(redis, "predicted", 12, "w1", "w2")
    home = {family: name for family, name, _ in served}
    assert all(home[family] == name for family, name, _ in served[3:])
    assert all(cached == 15 * BLOCK for _, _, cached in served[3:])
    assert found["predicted_equal"] == found["predicted"] == 12


async def test_another_tenant_gets_neither_hits_nor_affinity(redis: Redis, redis_url: str) -> None:
    """Sent to the worker that is cold, their session stays there; ours goes where it is warm."""
    await redis.sadd(keys.TENANTS, TENANT, "other")  # type: ignore[misc]
    async with worker(redis_url, "w1", CACHING), worker(redis_url, "w2", CACHING):
        ours, theirs = Edge(redis), Edge(redis, "edge2", "other")
        first = await ours.ask([*SYSTEM, 1])
        warm, cold = first.worker, "w2" if first.worker == "w1" else "w1"
        await wait_until(lambda: _holds(PrefixIndex(redis, TARGET), len(SYSTEM) // BLOCK), "its blocks to be told")
        stranger = await theirs.ask([*SYSTEM, 2], cold)
        assert (stranger.worker, stranger.cached) == (cold, 0)
        again = await ours.ask([*SYSTEM, 3], cold)
        assert (again.worker, again.cached) == (warm, len(SYSTEM))
        assert (await theirs.ask([*SYSTEM, 4], warm)).worker == cold


async def test_tenants_salts_do_not_depend_on_who_started_first(redis: Redis, redis_url: str) -> None:
    async with worker(redis_url, "w1", CACHING):
        await Edge(redis).ask([*SYSTEM, 1])
        async with worker(redis_url, "w2", CACHING):
            index = PrefixIndex(redis, TARGET)
            key = await redis.get(keys.SALT)
            assert key
            assert len(key) == 32
            second = await Edge(redis, "edge2").ask([*SYSTEM, 2])
            assert (second.worker, second.cached) == ("w1", len(SYSTEM))
            assert not any(holder.hit for holder in await index.look([short(b) for b in block_hashes(SYSTEM, BLOCK)]))


async def test_later_rounds_stick(redis: Redis, redis_url: str) -> None:
    async with worker(redis_url, "w1", CACHING), worker(redis_url, "w2", CACHING):
        edge = Edge(redis)
        first = await edge.ask([*SYSTEM, 1])
        other = "w2" if first.worker == "w1" else "w1"
        home = await edge.ask([7, 7, 7], other, session="f" * 32)
        assert home.worker == other
        again = await edge.ask([*SYSTEM, 1, *first.draws], other, session="f" * 32)
        assert again.worker == other, "it knows this session, however warm another is"


# --- queues ------------------------------------------------------------------------------------------------------


async def test_what_comes_at_once_is_spread(redis: Redis, redis_url: str) -> None:
    slow = f"{CACHING},row_us=300"
    async with AsyncExitStack() as stack:
        for name in ("w1", "w2", "w3"):
            await stack.enter_async_context(worker(redis_url, name, slow))
        edge = Edge(redis)
        sent = [await edge.send([n] * 200) for n in range(24)]
        served = [(await edge.answer(each)).worker for each in sent]
    counts = [served.count(name) for name in ("w1", "w2", "w3")]
    assert min(counts) >= 5, counts


async def test_an_idle_worker_takes_what_was_passed_on_to_a_busy_one(redis: Redis, redis_url: str) -> None:
    slow = f"{CACHING},row_us=4000"  # a second for a prefix of 250
    async with worker(redis_url, "w1", slow), worker(redis_url, "w2", CACHING):
        edge, front = Edge(redis), Ingress(redis, TARGET, "front")
        assert (await edge.ask([*SYSTEM[:50], 1], "w1")).worker == "w1"  # now its rate is known
        await front.open()
        sent = [await edge.send([n] * 250, "front") for n in range(6)]
        while len(front.held) < len(sent):
            await front.pick_up(30, 10)
        for delivery in list(front.held.values()):
            assert await front.pass_on(delivery, "w1", queued_tokens=250)
        served = [(await edge.answer(each)).worker for each in sent]
        await counted(redis, "stolen", 3, "w2")
    assert served.count("w2") >= 3


# --- what follows a session --------------------------------------------------------------------------------------


async def test_jobs_close_behind_the_first_one_go_where_it_went(redis: Redis, redis_url: str) -> None:
    async with worker(redis_url, "w1", CACHING), worker(redis_url, "w2", CACHING):
        edge = Edge(redis)
        warm = (await edge.ask([*SYSTEM, 1])).worker
        cold = "w2" if warm == "w1" else "w1"
        ids = [*SYSTEM, 2]
        draft = draws(ids, 3)
        first = await edge.send(ids, cold, session="e" * 32, draft=tuple(draft[:2]))
        second = await edge.send([*ids, *draft], cold, session="e" * 32, offset=len(ids) + 2, ids=tuple(draft[2:]))
        assert (await edge.answer(first)).worker == warm
        stream = keys.replies(TENANT, "edge1")

        async def both() -> bool:
            return bool(await redis.xlen(stream) >= 3)

        await wait_until(both, "the second answer")
        replies = await heard(redis, 3)
        assert replies[-1].round == second.round
        assert replies[-1].worker == warm


async def test_a_close_follows_its_session(redis: Redis, redis_url: str) -> None:
    async with worker(redis_url, "w1", CACHING), worker(redis_url, "w2", CACHING):
        edge = Edge(redis)
        for n in range(6):
            sent = await edge.send([*SYSTEM, n], session=f"{n:032x}")
            note = Close(agent="edge1", boot=BOOT, session=sent.session)
            await redis.xadd(keys.jobs(TARGET, TENANT), {keys.FIELD_AGENT: "edge1", keys.FIELD_MESSAGE: encode(note)})
        for name in (keys.ANY, "w1", "w2"):
            stream = keys.jobs(TARGET, TENANT, name) if name == keys.ANY else keys.forwarded(TARGET, name)
            await wait_until(partial(_empty, redis, stream), f"{stream} to be empty")


async def _empty(redis: Redis, stream: str) -> bool:
    return not await redis.xlen(stream)


# --- an index that is wrong, or away -----------------------------------------------------------------------------


async def test_without_an_index_jobs_are_kept_and_answered(
    redis: Redis, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*_: object) -> None:
        raise OSError("the index is away")

    async with worker(redis_url, "w1", CACHING), worker(redis_url, "w2", CACHING):
        monkeypatch.setattr(PrefixIndex, "_run", broken)
        edge = Edge(redis)
        verdicts = [await edge.ask([*SYSTEM, n]) for n in range(6)]
    assert all(verdicts)


async def test_a_flushed_redis_has_the_index_back_with_the_next_beat(redis: Redis, redis_url: str) -> None:
    async with worker(redis_url, "w1", CACHING):
        edge = Edge(redis)
        await edge.ask([*SYSTEM, 1])
        await redis.flushall()
        index = PrefixIndex(redis, TARGET)
        await wait_until(lambda: _holds(index, 10), "the blocks to be back", 3.0)

        async def open_again() -> bool:
            return bool(await redis.exists(keys.jobs(TARGET, TENANT)))

        await wait_until(open_again, "the streams to be back")
        assert (await edge.ask([*SYSTEM, 2])).cached == len(SYSTEM)


async def test_a_dead_engine_takes_its_blocks_out_of_the_index(redis: Redis, redis_url: str) -> None:
    async with worker(redis_url, "w1", CACHING):
        await Edge(redis).ask([*SYSTEM, 1])
        index = PrefixIndex(redis, TARGET)
        await wait_until(lambda: _holds(index, 10), "w1 to tell what it holds")
        os.kill(engine_child(), signal.SIGKILL)
        await wait_until(lambda: _holds(index, 0), "w1 to tell that it holds nothing", 3.0)


async def test_a_job_is_passed_on_twice_at_most(redis: Redis, redis_url: str) -> None:
    """It was passed on twice, and both died: whoever takes it over keeps it, however warm another is."""
    front, gone = Ingress(redis, TARGET, "front"), Ingress(redis, TARGET, "gone")
    for each in (front, gone):
        await each.open()
    async with worker(redis_url, "w1", CACHING):
        edge = Edge(redis)
        await edge.ask([*SYSTEM, 1])
        sent = await edge.send([*SYSTEM, 2], "front")
        (delivery,) = await front.pick_up(30, 10)
        assert await front.pass_on(delivery, "gone")
        (delivery,) = await gone.pick_up(30, 10)
        assert await gone.pass_on(delivery, "front")
        async with worker(redis_url, "w2", CACHING):
            await redis.zadd(keys.workers(TARGET), {"front": 0})
            assert (await edge.answer(sent)).worker in ("w1", "w2")
            found = await counted(redis, "verified", 2, "w1", "w2")
    assert found["passed_on"] == 0


async def _holds(index: PrefixIndex, blocks: int) -> bool:
    return any(holder.blocks == blocks for holder in await index.look())


async def test_a_worker_whose_copy_lies_is_demoted_and_tells_it_again(redis: Redis, redis_url: str) -> None:
    """Somebody else's blocks stand under its name: it is sent jobs for them, notices, and starts over."""
    async with worker(redis_url, "w1", CACHING, cache_key="k"), worker(redis_url, "w2", CACHING, cache_key="k"):
        from pilotfish.cloud_worker.salts import Salts

        edge, index = Edge(redis), PrefixIndex(redis, TARGET)
        salt = Salts(redis, b"k").of(TENANT)
        before = {holder.worker: holder for holder in await index.look()}
        prompts = [[*SYSTEM[n:], *[n] * 40] for n in range(4)]
        for ids in prompts:
            blobs = b"".join(short(name) for name in block_hashes(ids, BLOCK, salt))
            await _forge(redis, before["w2"].epoch, blobs)
        for ids in prompts[:3]:
            assert (await edge.ask(ids)).worker == "w2"

        async def anew() -> bool:
            return any(holder.worker == "w2" and holder.epoch > before["w2"].epoch for holder in await index.look())

        await wait_until(anew, "a new epoch")
        names = [short(name) for name in block_hashes(prompts[3], BLOCK, salt)]
        assert all(holder.hit <= 1 for holder in await index.look(names))


async def _forge(redis: Redis, epoch: int, blob: bytes) -> None:
    """Blocks in w2's buckets that it never had."""
    buckets = int(await redis.hget(keys.index_worker(TARGET, "w2"), "buckets"))  # type: ignore[misc]
    for at in range(0, len(blob), 8):
        number = int.from_bytes(blob[at : at + 8], "big") & (2**63 - 1)
        bucket = keys.index_bucket(TARGET, epoch, (number >> 32) % buckets, "w2")
        await redis.sadd(bucket, number)  # type: ignore[misc]
        await redis.pexpire(bucket, 60_000)


# --- tenants' tokens ---------------------------------------------------------------------------------------------


async def test_token_ids_lie_where_jobs_and_answers_do_and_not_for_ever(redis: Redis, redis_url: str) -> None:
    """Every key and value is searched for runs of ids, as text, as msgpack and as integers of any width.

    Two workers have routed, an agent has written, and a job that nobody could read is a dead letter.
    """
    marked = [201, 217, 233, 249] * BLOCK
    async with worker(redis_url, "w1", CACHING), worker(redis_url, "w2", CACHING), agent(redis_url, "edge9") as device:
        edge, letters = Edge(redis), keys.dead_letters(TARGET)
        await text_of(device, Task(tuple(marked), "exact", max_tokens=8))
        unreadable: dict[Any, Any] = {keys.FIELD_AGENT: "edge9", keys.FIELD_MESSAGE: encode(job(marked)) + b"?"}
        await redis.xadd(keys.jobs(TARGET, TENANT), unreadable)
        await wait_until(partial(redis.exists, letters), "the dead letter")
        for n in range(4):
            await edge.ask([*marked, n])
        await counted(redis, "predicted", 4, "w1", "w2")
        spelled = _spellings(marked[:4])
        found = {}
        async for key in redis.scan_iter(count=1000):
            content = key + await _content(redis, key)
            if any(each in content for each in spelled):
                found[key.decode()] = await redis.pttl(key)
    allowed = (":jobs:", ":fwd:", letters, "pf:rep:", "pf:prompts:", "pf:out:")
    assert [key for key in found if not any(part in key for part in allowed)] == []
    assert letters in found
    assert min(found.values()) > 0


def _spellings(ids: list[int]) -> list[bytes]:
    import msgpack

    packed = msgpack.packb(ids)[1:]
    wide = [b"".join(i.to_bytes(size, order) for i in ids) for size in (1, 2, 4, 8) for order in ("little", "big")]
    return [packed, json.dumps(ids)[1:-1].encode(), json.dumps(ids, separators=(",", ":"))[1:-1].encode(), *wide]


async def _content(redis: Any, key: bytes) -> bytes:
    kind = (await redis.type(key)).decode()
    reads = {
        "string": ("GET", key), "hash": ("HGETALL", key), "set": ("SMEMBERS", key),
        "zset": ("ZRANGE", key, 0, -1, "WITHSCORES"), "stream": ("XRANGE", key, "-", "+"),
    }  # fmt: skip
    value = await redis.execute_command(*reads[kind])
    return value if isinstance(value, bytes) else b" ".join(_flat(value))


def _flat(value: Any) -> list[bytes]:
    if isinstance(value, bytes):
        return [value]
    if isinstance(value, dict):
        return [part for pair in value.items() for one in pair for part in _flat(one)]
    if isinstance(value, list | tuple | set):
        return [part for one in value for part in _flat(one)]
    return [str(value).encode()]


def test_the_search_for_token_ids_finds_them() -> None:
    assert any(each in b"\x94\xcc\xc9\xcc\xd9\xcc\xe9\xcc\xf9" for each in _spellings([201, 217, 233, 249]))


async def test_no_kv_cache_means_none(redis: Redis, redis_url: str) -> None:
    """Neither blocks nor a session's own KV are reused, and nobody is in the index."""
    from pilotfish.cloud_worker.engines.spec import EngineSpec
    from pilotfish.cloud_worker.worker_process import WorkerSpec, run

    started = asyncio.Event()
    spec = WorkerSpec(redis_url, EngineSpec("fake", CACHING, resident=False, prefix_cache=False), name="w1")
    running = asyncio.create_task(run(spec, ready=lambda *_: started.set()))
    await asyncio.wait_for(started.wait(), 20)
    edge = Edge(redis)
    first = await edge.ask([*SYSTEM, 1], session="d" * 32)
    second = await edge.ask([*SYSTEM, 1, *first.draws], session="d" * 32)
    assert (second.cached, second.rows) == (0, len(SYSTEM) + 2)
    assert not [key async for key in redis.scan_iter("pf:*:kv*")]
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
