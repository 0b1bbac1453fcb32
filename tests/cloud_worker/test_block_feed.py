"""The feed: what the index is told, when it is told anew, and when it is told nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
import redis.exceptions as rx
from hypothesis import given
from hypothesis import strategies as st
from redis.asyncio import Redis

from helpers import wait_until
from pilotfish.cache.prefix_index import BATCH_BLOCKS, PrefixIndex
from pilotfish.cloud_worker import block_feed
from pilotfish.cloud_worker.block_feed import LIES, BlockFeed, PrefillRate
from pilotfish.cloud_worker.engines.base import KvChange
from pilotfish.cloud_worker.engines.fake_cache import FakeBlockCache

TARGET = "a" * 16
NAMES = [n.to_bytes(8, "big") for n in range(1, 1_000)]


@pytest.fixture
async def feed(redis: Redis) -> AsyncIterator[BlockFeed]:
    feed = BlockFeed(PrefixIndex(redis, TARGET), "w1", 1_000)
    await feed.start()
    yield feed
    await feed.stop()


async def told(feed: BlockFeed, count: int) -> None:
    async def equal() -> bool:
        return [holder.blocks for holder in await feed.index.look()] == [count]

    await wait_until(equal, f"the index to hold {count} blocks")


async def test_what_the_engine_says_is_told_in_batches(feed: BlockFeed) -> None:
    feed.heard(KvChange("stored", tuple(NAMES)))
    await told(feed, len(NAMES))
    assert feed.share is not None
    assert feed.share.seq == -(-len(NAMES) // BATCH_BLOCKS)
    feed.heard(KvChange("removed", tuple(NAMES[500:])))
    await told(feed, 500)
    assert feed.resyncs == 1


async def test_a_block_that_came_and_went_is_not_told_at_all(feed: BlockFeed) -> None:
    feed.heard(KvChange("stored", tuple(NAMES[:5])))
    feed.heard(KvChange("removed", tuple(NAMES[:5])))
    feed.heard(KvChange("stored", tuple(NAMES[5:6])))
    await told(feed, 1)


async def test_an_engine_that_starts_anew_holds_nothing_at_once(feed: BlockFeed) -> None:
    feed.heard(KvChange("stored", tuple(NAMES)))
    await told(feed, len(NAMES))
    feed.heard(KvChange("cleared"))
    feed.heard(KvChange("stored", tuple(NAMES[:3])))
    await told(feed, 3)
    assert feed.resyncs == 2


async def test_a_lost_batch_makes_it_tell_everything(feed: BlockFeed) -> None:
    feed.heard(KvChange("stored", tuple(NAMES[:10])))
    await told(feed, 10)
    assert feed.share is not None
    feed.share.seq += 1
    feed.heard(KvChange("stored", tuple(NAMES[10:12])))
    await told(feed, 12)
    assert feed.resyncs == 2


async def test_a_redis_that_fails_for_a_while_is_told_everything_later(
    feed: BlockFeed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block_feed, "PAUSE_SECONDS", 0.001)
    publish, failures = feed.index.publish, iter([True] * 3)

    async def flaky(*args: Any, **options: Any) -> Any:
        if next(failures, False):
            raise rx.ConnectionError("away")
        return await publish(*args, **options)

    monkeypatch.setattr(feed.index, "publish", flaky)
    feed.heard(KvChange("stored", tuple(NAMES[:300])))
    await told(feed, 300)


async def test_who_drains_is_gone_and_stays_gone(feed: BlockFeed) -> None:
    feed.heard(KvChange("stored", tuple(NAMES[:10])))
    await told(feed, 10)
    await feed.leave()
    feed.heard(KvChange("stored", tuple(NAMES[10:20])))
    await feed.beat(0)
    await asyncio.sleep(0)
    assert await feed.index.look() == []


async def test_a_beat_of_the_epoch_before_does_not_end_the_new_one(
    feed: BlockFeed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was under way when the worker registered anew: what it hears is of the old epoch."""
    beat, meanwhile = feed.index.beat, asyncio.Event()

    async def late(*args: Any) -> bool:
        feed.heard(KvChange("cleared"))
        await wait_until(lambda: feed.share, "the second epoch")
        meanwhile.set()
        return bool(await beat(*args))

    monkeypatch.setattr(feed.index, "beat", late)
    await feed.beat(0)
    assert meanwhile.is_set()
    assert feed.share is not None
    assert feed.resyncs == 2


# --- predictions -------------------------------------------------------------------------------------------------


async def test_promises_that_are_kept_or_exceeded_change_nothing(feed: BlockFeed) -> None:
    for predicted, actual in [(32, 32), (0, 64), (64, 32), (64, 32), (32, 32)] * LIES:
        feed.judge(predicted, actual)
    for _ in range(2 * LIES):
        feed.judge(64, 0, excused=True)
    await feed.beat(0)
    assert feed.resyncs == 1
    assert feed.share is not None


async def test_promises_broken_in_a_row_make_it_start_over_and_the_next_time_be_silent(feed: BlockFeed) -> None:
    feed.heard(KvChange("stored", tuple(NAMES[:10])))
    await told(feed, 10)
    for _ in range(LIES):
        feed.judge(64, 0)
    await wait_until(lambda: feed.resyncs == 2, "a second epoch")
    await told(feed, 10)
    for _ in range(LIES):
        feed.judge(64, 0)
    await wait_until(lambda: feed.resyncs == 3, "a third epoch")
    await feed.beat(-1)
    assert [holder.blocks for holder in await feed.index.look()] == [0], "told again only after a silence"
    assert feed.mirror.untold == 10


# --- the rate ----------------------------------------------------------------------------------------------------


def test_the_rate_is_rows_over_the_time_some_prefill_ran() -> None:
    rate = PrefillRate()
    assert rate.per_second == 0
    rate.begin(10.0)
    rate.begin(10.5)
    rate.end(11.0, 100)
    rate.end(12.0, 100)
    assert rate.per_second == pytest.approx((100 * rate.KEEP + 100) / (1 * rate.KEEP + 1))
    rate.begin(50.0)  # idle time does not count
    rate.end(51.0, 100)
    assert rate.per_second == pytest.approx(100)


@given(st.lists(st.tuples(st.floats(0.001, 1), st.integers(1, 1000)), min_size=1, max_size=30))
def test_the_rate_lies_between_the_slowest_and_the_fastest(prefills: list[tuple[float, int]]) -> None:
    rate, now = PrefillRate(), 0.0
    for seconds, rows in prefills:
        rate.begin(now)
        now += seconds
        rate.end(now, rows)
    rates = [rows / seconds for seconds, rows in prefills]
    assert min(rates) * 0.99 <= rate.per_second <= max(rates) * 1.01


# --- the fake engine's cache -------------------------------------------------------------------------------------


def test_the_fake_cache_evicts_what_was_used_longest_ago_and_ends_before_beginnings() -> None:
    cache = FakeBlockCache(4, 2)
    cache.computed([1, 2, 3, 4, 5, 6], "")
    cache.computed([7, 8, 9, 9], "")
    assert cache.cached([1, 2, 3, 4, 5, 6, 0], "") == 4
    assert cache.cached([7, 8, 9, 9, 0], "") == 4
    assert [change.kind for change in cache.take()] == ["stored", "stored", "removed"]
    assert cache.take() == []


def test_the_fake_cache_never_serves_the_last_token_nor_another_tenant() -> None:
    cache = FakeBlockCache(10, 2)
    cache.computed([1, 2, 3, 4], "a")
    assert (cache.cached([1, 2, 3, 4], "a"), cache.cached([1, 2, 3, 4, 5], "a")) == (2, 4)
    assert cache.cached([1, 2, 3, 4, 5], "b") == 0
