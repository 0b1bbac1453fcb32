"""A rogue tenant, with every right its users have, beside an honest one: what it tries, and what that one notices.

The rogue speaks plain Redis as `rogue+agent` and `rogue+shell`; where a test gives it more than that (SET, DEL), it is
what a Redis without ACLs would have let through, and the damage still stays with the rogue.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator

import pytest
import redis.exceptions as rx
from redis.asyncio import Redis
from rigs import PROMPT, TARGET, agent, draws, job, text_of, worker

from helpers import wait_until
from logins import login, redis_with_acl
from pilotfish.edge_agent.task import Task
from pilotfish.protocol import bounds, keys
from pilotfish.protocol.bounds import Bounds, tenant_of
from pilotfish.protocol.codec import encode
from pilotfish.protocol.ingress import Ingress

pytestmark = pytest.mark.slow
MEGABYTE = b"x" * 1_000_000
ROGUE, HONEST = keys.jobs(TARGET, "rogue"), keys.jobs(TARGET, keys.DEFAULT_TENANT)


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with redis_with_acl(tmp_path_factory.mktemp("users")) as url:
        yield url


@pytest.fixture
async def rogue(redis_url: str, redis: Redis) -> AsyncIterator[Redis]:
    await redis.sadd(keys.TENANTS, keys.DEFAULT_TENANT, "rogue")  # type: ignore[misc]  # typed as sync or async
    async with Redis.from_url(login(redis_url, "rogue+agent")) as client:
        yield client


async def honest_is_served(redis_url: str, tokens: int = 16) -> float:
    """Seconds that a generation of the honest tenant took; its text is right."""
    since = time.monotonic()
    async with agent(redis_url, round_timeout_ms=1000) as running:
        text, _ = await text_of(running, Task(PROMPT, max_tokens=tokens, deadline_ms=20_000))
    assert text == draws(PROMPT, tokens)
    return time.monotonic() - since


@contextlib.asynccontextmanager
async def over_and_over(client: Redis, *commands: tuple[object, ...]) -> AsyncIterator[None]:
    """A client that sends these for as long as the block runs, whatever comes back."""

    async def send() -> None:
        while True:
            for command in commands:
                with contextlib.suppress(rx.ResponseError):
                    await client.execute_command(*command)  # type: ignore[no-untyped-call]

    task = asyncio.create_task(send())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


# --- stopping a worker -----------------------------------------------------------------------------------------


async def test_nothing_a_tenant_may_write_stops_a_worker(redis_url: str, rogue: Redis) -> None:
    whole = encode(job())
    entries: list[dict[str, bytes]] = [
        {"m": b""}, {"x": b"y"}, {"a": b"\xff\x00", "m": b"\xc1"}, {"a": b"a:b", "m": whole}, {"m": whole[:-9]},
        {"a": b"e" * 5000, "m": MEGABYTE[:-1]}, {"": b""}, {"m": encode(job(draft=(255,) * 200))},
        {"a": b"edge1", "m": encode(job(digest=b"?" * 16))}, {f"f{i}": b"" for i in range(2000)},
    ]  # fmt: skip
    async with worker(redis_url) as running:
        for entry in entries:
            await rogue.xadd(ROGUE, entry)  # type: ignore[arg-type]
        await honest_is_served(redis_url)
        assert not running.done()
        async with Redis.from_url(redis_url) as looks:
            await wait_until(lambda: _empty(looks, ROGUE), "every one of them to be dealt with")


async def _empty(redis: Redis, stream: str) -> bool:
    return not await redis.xlen(stream)


@pytest.mark.parametrize("kind", ["string", "list", "hash"])
async def test_a_key_of_another_type_in_a_streams_place_is_its_tenants_trouble_alone(
    redis_url: str, redis: Redis, rogue: Redis, kind: str
) -> None:
    commands = {"string": ("SET", ROGUE, "x"), "list": ("LPUSH", ROGUE, "x"), "hash": ("HSET", ROGUE, "a", "b")}
    async with worker(redis_url) as running:
        await redis.delete(ROGUE)
        await redis.execute_command(*commands[kind])  # type: ignore[no-untyped-call]
        await redis.pexpire(ROGUE, keys.JOBS_TTL_MS)
        await honest_is_served(redis_url)
        assert not running.done()


async def test_a_stream_broken_over_and_over_holds_up_nobody_else(redis_url: str, redis: Redis, rogue: Redis) -> None:
    async with (
        worker(redis_url),
        over_and_over(redis, ("DEL", ROGUE), ("SET", ROGUE, "x", "PX", 60_000), ("DEL", ROGUE)),
    ):
        assert await honest_is_served(redis_url) < 10
        assert await honest_is_served(redis_url) < 10


async def test_a_broken_stream_is_mended_and_its_tenant_served_again(
    redis: Redis, rogue: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pilotfish.protocol.roster.ASIDE_SECONDS", 0.2)
    ingress = Ingress(redis, TARGET, "w1")
    await redis.set(ROGUE, "x", px=60_000)
    await ingress.open()

    async def served() -> bool:
        if await redis.type(ROGUE) == b"stream" and not await redis.xlen(ROGUE):
            await rogue.xadd(ROGUE, {"a": b"edge1", "m": encode(job())})
        return any(delivery.tenant == "rogue" for delivery in await ingress.pick_up(8, 10))

    await wait_until(served, "the tenant's job")


async def test_a_reply_stream_that_cannot_be_written_begins_again(redis_url: str, redis: Redis, rogue: Redis) -> None:
    """A shell may add to its tenant's reply streams, and so give one the last id there is."""
    replies = keys.replies("rogue", "edge1")
    async with worker(redis_url), Redis.from_url(login(redis_url, "rogue+shell")) as shell:
        await shell.xadd(replies, {"m": b"x"}, id=f"{2**64 - 1}-{2**64 - 1}")
        await rogue.xadd(ROGUE, {"a": b"edge1", "m": encode(job())})
        await wait_until(lambda: _answered(redis, replies), "the reply")
        await wait_until(lambda: _empty(redis, ROGUE), "the job to be acknowledged")


async def _answered(redis: Redis, replies: str) -> bool:
    entries = await redis.xrange(replies)
    return len(entries) == 1 and entries[0][1][b"m"] != b"x"


# --- inventing ids ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("payload", [encode(job()), b"no message", b""])
async def test_an_entry_with_the_last_id_there_is_blocks_its_tenant_for_a_moment(
    redis_url: str, redis: Redis, rogue: Redis, payload: bytes
) -> None:
    async with worker(redis_url):
        await rogue.xadd(ROGUE, {"a": b"edge1", "m": payload}, id=f"{2**64 - 1}-{2**64 - 1}")
        await wait_until(lambda: _takes(rogue), "the stream to take entries again")


async def _takes(rogue: Redis) -> bool:
    with contextlib.suppress(rx.ResponseError):
        return bool(await rogue.xadd(ROGUE, {"a": b"edge1", "m": encode(job())}))
    return False


# --- filling memory --------------------------------------------------------------------------------------------


async def test_a_stream_is_cut_to_its_length_and_its_bytes(
    redis: Redis, rogue: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounds, "JOBS_MAX_BYTES", 4_000_000)
    monkeypatch.setattr(bounds, "JOBS_MAXLEN", 50)
    ingress, held = Ingress(redis, TARGET, "w1"), Bounds(redis, TARGET, "w1", 1 << 30)
    await ingress.open()
    for _ in range(10):
        await rogue.xadd(ROGUE, {"m": MEGABYTE})
    await held.hold(ingress.open_streams)
    assert 1 <= await redis.xlen(ROGUE) <= 4
    assert await redis.memory_usage(ROGUE, samples=0) <= 4_500_000
    for _ in range(60):
        await rogue.xadd(ROGUE, {"m": b"small"})
    await held.hold(ingress.open_streams)
    assert await redis.xlen(ROGUE) <= 50


async def test_keys_nobody_asked_for_are_counted_ended_and_removed(redis: Redis, rogue: Redis) -> None:
    """An edge may add to any stream below its own name, read by a worker or not, with or without an end."""
    held = Bounds(redis, TARGET, "w1", 3_000_000)
    for number in range(6):
        await rogue.xadd(keys.jobs(TARGET, "rogue", f"nobody{number}"), {"m": MEGABYTE})
    await rogue.xadd(keys.output("rogue", "ab"), {"m": b"small"})
    await rogue.xadd(f"{keys.jobs(TARGET, 'rogue', 'w')}:{HONEST}", {"m": MEGABYTE})
    await redis.xadd(HONEST, {"m": MEGABYTE})
    await held.census()
    left = [key async for key in redis.scan_iter(match="pf:*rogue*")]
    assert sum([await redis.memory_usage(key, samples=0) for key in left]) <= 3_000_000
    assert all([await redis.ttl(key) > 0 for key in left])
    assert keys.output("rogue", "ab").encode() in left, "the largest go first"
    assert await redis.xlen(HONEST) == 1, "one tenant pays for what another wrote"


async def test_however_many_keys_there_are_one_command_names_a_page_of_them(
    redis: Redis, rogue: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounds, "PAGE", 5)
    held = Bounds(redis, TARGET, "w1", 20_000)
    for number in range(40):
        await rogue.xadd(keys.jobs(TARGET, "rogue", f"nobody{number}"), {"m": b"small"})
        await rogue.xadd(f"{keys.jobs(TARGET, 'rogue', 'w')}:{number}", {"m": b"no key of ours"})
    longest = 0

    async def unlink(*names: bytes) -> int:
        nonlocal longest
        longest = max(longest, len(names))
        return int(await redis.delete(*names))

    monkeypatch.setattr(redis, "unlink", unlink)
    await held.census()
    left = [key async for key in redis.scan_iter(match="pf:*rogue*")]
    assert 1 <= len(left) < 40
    assert not [key for key in left if tenant_of(key) is None]
    assert 1 <= longest <= 5


async def test_a_census_that_does_not_end_holds_up_neither_beats_nor_leases(
    redis_url: str, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who adds keys fast enough makes it last as long as he likes."""
    counting = asyncio.Event()

    async def census(self: Bounds) -> None:
        counting.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(Bounds, "census", census)
    async with worker(redis_url):
        await asyncio.wait_for(counting.wait(), 10)
        then = await redis.zscore(keys.workers(TARGET), "w1")
        await wait_until(lambda: _beaten(redis, then), "two more beats")
        assert await honest_is_served(redis_url) < 10


async def _beaten(redis: Redis, then: float) -> bool:
    return float(await redis.zscore(keys.workers(TARGET), "w1")) > then + keys.BEAT_EVERY_MS


def test_a_key_is_counted_for_the_one_who_may_write_it() -> None:
    for key in (HONEST, keys.replies("default", "e"), keys.output("default", "a" * 32), keys.agent_beat("default", "e"),
                keys.prompts("default"), keys.agents("default")):  # fmt: skip
        assert tenant_of(key.encode()) == "default"
    for key in (keys.TENANTS, keys.TARGETS, keys.pair(TARGET), keys.beat(TARGET, "w1"), keys.workers(TARGET),
                keys.dead_letters(TARGET), "pf:salt", f"pf:{TARGET}:fwd:w1", f"pf:{TARGET}:kv:3:9:w1"):  # fmt: skip
        assert tenant_of(key.encode()) == "", key
    for key in (f"pf:{TARGET}:jobs:a:b:c", "pf:rep:a:b:c", "pf:out:a", "pf:rep:a:b\n", f"pf:{'x' * 16}:jobs:a:b"):
        assert tenant_of(key.encode()) is None, key


async def test_a_flood_of_sessions_of_one_tenant_drowns_none_of_anothers(monkeypatch: pytest.MonkeyPatch) -> None:
    from pilotfish.cloud_worker import verify
    from pilotfish.cloud_worker.engines.fake import FakeVerifier

    class Idle:
        info = FakeVerifier().info

    monkeypatch.setattr(verify, "MAX_SESSIONS", 64)
    desk = verify.Verification(Idle(), "w1", lambda tenant: 1)  # type: ignore[arg-type]
    desk._session(verify.Ticket("default", job(), 0, "r"))
    for number in range(500):
        desk._session(verify.Ticket("rogue", job(session=f"{number:032x}"), 0, "r"))
    assert ("default", "edge1", "0" * 32) in desk.known
    assert len(desk.known) <= 64


async def test_a_flood_of_long_sessions_of_one_tenant_fills_no_workers_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    from pilotfish.cloud_worker import verify
    from pilotfish.cloud_worker.engines.fake import FakeVerifier

    class Idle:
        info = FakeVerifier().info

    monkeypatch.setattr(verify, "KNOWN_IDS_MAX", 10_000)
    monkeypatch.setattr(verify, "WEIGHED_EVERY", 4)
    desk = verify.Verification(Idle(), "w1", lambda tenant: 1)  # type: ignore[arg-type]
    desk._session(verify.Ticket("default", job(), 0, "r")).ids.extend(PROMPT)
    for number in range(50):
        desk._session(verify.Ticket("default", job(session=f"a{number:031x}"), 0, "r")).ids.extend(PROMPT)
    for number in range(500):
        desk._session(verify.Ticket("rogue", job(session=f"{number:032x}"), 0, "r")).ids.extend(PROMPT * 40)
        assert sum(len(known.ids) for known in desk.known.values()) <= 10_000 + 4 * 40 * len(PROMPT)
    assert sum(tenant == "default" for tenant, _, _ in desk.known) == 51


# --- starving others -------------------------------------------------------------------------------------------


async def test_the_last_places_are_for_tenants_of_whom_nothing_is_held(redis: Redis, rogue: Redis) -> None:
    ingress = Ingress(redis, TARGET, "w1")
    await ingress.open()
    await ingress.beat({"state": "serving"})
    for number in range(40):
        await rogue.xadd(ROGUE, {"a": b"edge1", "m": encode(job(session=f"{number:032x}"))})
    room = 8
    while taken := await ingress.pick_up(room, 10):
        assert {delivery.tenant for delivery in taken} == {"rogue"}
        room -= len(taken)
    assert 1 <= room <= 2
    sent = await redis.xadd(HONEST, {"a": b"edge1", "m": encode(job())})
    assert [delivery.entry_id for delivery in await ingress.pick_up(room, 10)] == [sent.decode()]


async def test_slow_jobs_of_one_tenant_keep_no_other_out(redis_url: str, rogue: Redis) -> None:
    """Continuations as long as the context, far more of them than the worker takes."""
    async with worker(redis_url, model="step_ms=5", max_jobs=8):
        for number in range(100):
            wanted = job(session=f"{number:032x}", continue_tokens=2000, deadline_ms=600_000)
            await rogue.xadd(ROGUE, {"a": b"edge1", "m": encode(wanted)})
        assert await honest_is_served(redis_url) < 10
