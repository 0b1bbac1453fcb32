"""`bench index`: the layouts hold what they were told, and the quick run's promises that no clock decides."""

from __future__ import annotations

from typing import Any

import pytest
import redis as sync_redis

from pilotfish.bench import index
from pilotfish.bench.registry import run
from pilotfish.cache.prefix_index import PrefixIndex
from pilotfish.protocol.broker import connect

BLOCKS = 9_000


@pytest.mark.parametrize("name", index.PEERS)
def test_a_peers_layout_answers(name: str, redis_url: str) -> None:
    here = index.world(BLOCKS)
    with sync_redis.Redis.from_url(redis_url) as client:
        peer = index.PEERS[name](client)
        held = here.held[0][:2_000]
        peer.fill("w1", held)
        peer.fill("w2", held[:100])
        assert peer.lookup(held[:500]) == 500
        assert peer.lookup(here.held[1][-500:]) == 0
        client.flushall()


async def test_ours_finds_what_every_worker_holds(redis_url: str) -> None:
    here = index.world(BLOCKS)
    async with connect(redis_url) as client:
        prefix_index = PrefixIndex(client, index.TARGET_ID)
        await index.fill(prefix_index, index.name(0), here.held[0])
        (holder,) = await prefix_index.look(here.conversations[0])
        talk = here.conversations[0]
        assert holder.blocks == BLOCKS
        assert talk[: holder.hit] == here.held[0][: holder.hit]
        assert here.held[0][holder.hit] != talk[holder.hit]


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    return run("index", quick=True)


@pytest.mark.slow
def test_the_report_has_the_targets_that_are_followed_over_time(report: dict[str, Any]) -> None:
    found = {one["name"]: one for one in report["targets"]}
    assert list(found) == ["mb_per_million", "p50_ms", "p99_ms", "reap_ms"]
    assert found["mb_per_million"]["met"] is True  # memory does not depend on the machine
    figures = report["figures"]
    assert figures["ours"]["entries"] == 1_000_000
    assert all(figures[peer]["mb_per_million"] > 10 * found["mb_per_million"]["value"] for peer in index.PEERS)
