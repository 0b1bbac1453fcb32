"""The prefix index on a real Redis: who holds what, leases, epochs, lost batches, queues, removal of the dead."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis.asyncio import Redis

from helpers import wait_until
from pilotfish.cache.block_hash import block_hashes, short
from pilotfish.cache.prefix_index import (
    AFFINITY_BLOCKS,
    HOP_MS,
    RATE_UNKNOWN,
    Holder,
    PrefixIndex,
    Published,
    Route,
    Share,
    buckets_for,
)
from pilotfish.protocol import keys

TARGET = "a" * 16
BLOCK = 32
NAMES = [short(name) for name in block_hashes(range(BLOCK * 400), BLOCK)]
LONG = 60_000  # ms: nobody beats in most tests


@pytest.fixture
def index(redis: Redis) -> PrefixIndex:
    return PrefixIndex(redis, TARGET, lease_ms=LONG)


async def worker(index: PrefixIndex, name: str, blocks: Sequence[bytes] = (), rate: float = 0.0) -> Share:
    share = await index.register(name, 4, rate)
    assert await index.publish(share, blocks) is Published.DONE
    return share


async def hits(index: PrefixIndex, blocks: Sequence[bytes]) -> dict[str, int]:
    return {holder.worker: holder.hit for holder in await index.look(blocks)}


# --- who holds what ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("held", [0, 1, 2, 3, 7, 199, 200])
async def test_the_longest_held_prefix_is_found(index: PrefixIndex, held: int) -> None:
    await worker(index, "w1", NAMES[:held])
    await worker(index, "w2", NAMES[held:])  # a tail without its beginning is worth nothing
    assert await hits(index, NAMES[:200]) == {"w1": held, "w2": 0 if held else 200}


async def test_removed_blocks_are_held_no_more(index: PrefixIndex) -> None:
    share = await worker(index, "w1", NAMES[:50])
    assert await index.publish(share, NAMES[390:], NAMES[20:50]) is Published.DONE
    (holder,) = await index.look(NAMES)
    assert (holder.hit, holder.blocks) == (20, 30)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.binary(min_size=8, max_size=8), min_size=1, max_size=40, unique_by=lambda b: b[0] % 128))
async def test_any_63_bits_are_kept_as_integers(index: PrefixIndex, blocks: list[bytes]) -> None:
    """Extremes too: the digits that Lua puts together are those of the number."""
    await index.redis.flushall()
    await worker(index, "w1", blocks)
    members = [m async for key in index.redis.scan_iter("*:kv:*:*:w1") for m in await index.redis.smembers(key)]  # type: ignore[misc]
    assert sorted(map(int, members)) == sorted(int.from_bytes(block, "big") & (2**63 - 1) for block in blocks)
    assert await hits(index, blocks) == {"w1": len(blocks)}


@pytest.mark.parametrize("number", [0, 1, 999_999, 1_000_000, 2**31, 2**32 - 1, 2**32, 2**48, 2**53 + 1, 2**63 - 1])
async def test_numbers_at_the_seams(index: PrefixIndex, number: int) -> None:
    await worker(index, "w1", [number.to_bytes(8, "big")])
    (key,) = [key async for key in index.redis.scan_iter("*:kv:*:*:w1")]
    assert await index.redis.smembers(key) == {str(number).encode()}  # type: ignore[misc]
    assert await index.redis.object("ENCODING", key) == b"intset"


async def test_every_key_has_a_life_time_and_a_beat_renews_it(index: PrefixIndex) -> None:
    share = await worker(index, "w1", NAMES)
    names = [key async for key in index.redis.scan_iter("pf:*")]
    assert len(names) == 2 + share.buckets
    for key in names:
        await index.redis.pexpire(key, 5_000)
    assert await index.beat(share, 100.0)
    assert all([await index.redis.pttl(key) > keys.JOBS_TTL_MS / 2 for key in names])


async def test_no_token_id_and_no_whole_hash_is_kept(index: PrefixIndex, redis: Redis) -> None:
    ids = list(range(1_000_001, 1_000_001 + 3 * BLOCK))
    await worker(index, "w1", [short(name) for name in block_hashes(ids, BLOCK, "salt")])
    dumps = b"".join([key + (await redis.dump(key) or b"") async for key in redis.scan_iter()])
    assert not [i for i in ids if str(i).encode() in dumps or i.to_bytes(4, "little") in dumps]
    assert not [name for name in block_hashes(ids, BLOCK, "salt") if name in dumps]


# --- leases and epochs -------------------------------------------------------------------------------------------


async def test_a_worker_counts_until_its_lease_ends_and_not_a_moment_longer(redis: Redis) -> None:
    index = PrefixIndex(redis, TARGET, lease_ms=150)
    share = await worker(index, "w1", NAMES)
    assert await hits(index, NAMES[:5]) == {"w1": 5}
    await wait_until(lambda: _nobody(index), "the lease to end")
    assert await index.beat(share, 1.0)  # it was only slow: what it said is still there
    assert await hits(index, NAMES[:5]) == {"w1": 5}


async def _nobody(index: PrefixIndex) -> bool:
    return not await index.look() and await index.route("w2", 100, BLOCK, NAMES[:3]) is None


async def test_who_left_is_gone_at_once(index: PrefixIndex) -> None:
    share = await worker(index, "w1", NAMES)
    await index.leave(share)
    assert await _nobody(index)


async def test_a_restart_in_place_holds_nothing(index: PrefixIndex) -> None:
    old = await worker(index, "w1", NAMES)
    new = await index.register("w1", 4)
    assert new.epoch > old.epoch
    assert await hits(index, NAMES) == {"w1": 0}
    assert await index.publish(old, NAMES) is Published.FENCED
    assert not await index.beat(old, 1.0)
    assert await hits(index, NAMES) == {"w1": 0}


async def test_epochs_grow_even_within_a_millisecond(index: PrefixIndex) -> None:
    epochs = [(await index.register("w1", 1)).epoch for _ in range(50)]
    assert epochs == sorted(set(epochs))


async def test_a_lost_batch_is_noticed_and_a_repeated_one_is_not_counted_twice(index: PrefixIndex) -> None:
    share = await worker(index, "w1", NAMES[:10])
    again = Share("w1", share.epoch, share.buckets, share.seq - 1)
    assert await index.publish(again, NAMES[:10]) is Published.DONE
    share.seq += 1  # a batch that never arrived
    assert await index.publish(share, NAMES[20:30]) is Published.LOST
    assert await hits(index, NAMES) == {"w1": 10}


async def test_a_flushed_redis_is_noticed_by_every_call(index: PrefixIndex) -> None:
    share = await worker(index, "w1", NAMES)
    await index.redis.flushall()
    assert not await index.beat(share, 1.0)
    assert await index.publish(share, NAMES) is Published.FENCED
    assert await index.redis.dbsize() == 0


async def test_a_redis_that_forgot_the_scripts_is_told_again(index: PrefixIndex) -> None:
    await worker(index, "w1", NAMES)
    await index.redis.script_flush()
    assert await hits(index, NAMES[:5]) == {"w1": 5}


# --- routing -----------------------------------------------------------------------------------------------------


async def test_the_warmest_wins_and_its_queue_grows(index: PrefixIndex) -> None:
    await worker(index, "cold")
    await worker(index, "warm", NAMES[:10])
    route = await index.route("cold", 11 * BLOCK, BLOCK, NAMES[:10])
    assert route is not None
    assert (route.worker, route.blocks, route.tokens) == ("warm", 10, BLOCK)
    queued = {holder.worker: holder.queued for holder in await index.look()}
    assert queued == {"cold": 0, "warm": BLOCK}


async def test_a_long_queue_outweighs_a_warm_cache(index: PrefixIndex) -> None:
    await worker(index, "cold")
    share = await worker(index, "warm", NAMES[:10])
    assert await index.beat(share, 0.0, queued=1_000)
    route = await index.route("cold", 11 * BLOCK, BLOCK, NAMES[:10])
    assert route is not None
    assert (route.worker, route.tokens) == ("cold", 11 * BLOCK)


async def test_a_slow_worker_is_passed_over_for_a_fast_one(index: PrefixIndex) -> None:
    await worker(index, "slow", rate=100.0)
    await worker(index, "fast", rate=1_000.0)
    route = await index.route("slow", 500, BLOCK, ())
    assert route is not None
    assert route.worker == "fast"


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 40), st.integers(0, 1_500), st.sampled_from([0.0, 300.0, 1_000.0, 1_234.5])),
        min_size=1,
        max_size=8,
    ),
    st.integers(0, 40),
)
async def test_who_is_not_asked_could_not_have_won(
    index: PrefixIndex, workers: list[tuple[int, int, float]], blocks: int
) -> None:
    """A route looks at few blocks; it finds whom a look at everything finds."""
    await index.redis.flushall()
    for i, (held, queued, rate) in enumerate(workers):
        share = await worker(index, f"w{i}", NAMES[:held], rate)
        await index.beat(share, rate, queued)
    tokens, known = blocks * BLOCK + 5, [rate for _, _, rate in workers if rate]
    holders = await index.look(NAMES[:blocks])

    def seconds(holder: Holder) -> float:
        rate = holder.rate or (sum(known) / len(known) if known else RATE_UNKNOWN)
        useful = holder.hit if holder.hit >= AFFINITY_BLOCKS else 0
        return (holder.queued + tokens - useful * BLOCK) / rate + (0 if holder.worker == "w0" else HOP_MS / 1000)

    route, first = await index.route("w0", tokens, BLOCK, NAMES[:blocks]), min(holders, key=seconds)
    assert route == Route(first.worker, first.hit, tokens - first.hit * BLOCK)


async def test_equals_keep_their_job(index: PrefixIndex) -> None:
    for name in "abc":
        await worker(index, name)
    for name in "abc":
        route = await index.route(name, 100, BLOCK, ())
        assert route is not None
        assert route.worker == name


async def test_a_hit_of_two_blocks_draws_nobody(index: PrefixIndex) -> None:
    await worker(index, "me")
    await worker(index, "other", NAMES[: AFFINITY_BLOCKS - 1])
    route = await index.route("me", 4 * BLOCK, BLOCK, NAMES[:3])
    assert route is not None
    assert route.worker == "me"


async def test_reservations_spread_what_comes_at_once(index: PrefixIndex) -> None:
    for name in "abcd":
        await worker(index, name)
    taken = [await index.route("a", 1_000, BLOCK, ()) for _ in range(40)]
    by_worker = sorted([route.worker for route in taken if route].count(name) for name in "abcd")
    assert by_worker == [10] * 4


async def test_computed_tokens_leave_the_queue(index: PrefixIndex) -> None:
    share = await worker(index, "w1")
    await index.route("w1", 500, BLOCK, ())
    await index.publish(share, done_tokens=400)
    assert [holder.queued for holder in await index.look()] == [100]
    await index.publish(share, done_tokens=400)
    assert [holder.queued for holder in await index.look()] == [0]


# --- the dead ----------------------------------------------------------------------------------------------------


async def test_the_dead_are_removed_in_bounded_pieces(index: PrefixIndex, redis: Redis) -> None:
    rng = random.Random(1)
    share = await index.register("w1", buckets_for(5_000))
    await index.publish(share, [rng.randbytes(8) for _ in range(5_000)])
    await worker(index, "w2", NAMES[:30])
    await index.leave(share)
    left = [await index.reap(6) for _ in range(4)]
    assert left == [14, 8, 2, 0]
    names = sorted([key async for key in redis.scan_iter("*:w1")])
    assert not names
    assert not await redis.exists(keys.index_gone(TARGET))
    assert await hits(index, NAMES) == {"w2": 30}


async def test_no_epoch_comes_twice_while_something_is_left_of_the_first(index: PrefixIndex, redis: Redis) -> None:
    """Redis' clock was set back, or a name was registered many times in one millisecond."""
    old = await worker(index, "w1", NAMES)
    await index.leave(old)
    await index.reap(1)
    seconds, _ = await redis.time()
    left = await redis.hkeys(keys.index_gone(TARGET))  # type: ignore[misc]
    assert left == [f"{old.epoch}:w1".encode()]
    soon = {f"{seconds * 1000 + ms}:w1": 4 for ms in range(4_000)}
    await redis.hset(keys.index_gone(TARGET), mapping=soon)  # type: ignore[misc]
    share = await worker(index, "w1", NAMES[:7])
    assert f"{share.epoch}:w1" not in soon
    while await index.reap():
        pass
    assert await hits(index, NAMES) == {"w1": 7}


async def test_what_a_restart_left_is_removed_too(index: PrefixIndex, redis: Redis) -> None:
    old = await worker(index, "w1", NAMES)
    await worker(index, "w1", NAMES[:7])
    assert await index.reap() == 0
    assert not [key async for key in redis.scan_iter(f"*:{old.epoch}:*")]
    assert await hits(index, NAMES) == {"w1": 7}
