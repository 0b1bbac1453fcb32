from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from redis.asyncio import Redis
from rigs import TARGET, job, worker

from helpers import wait_until
from pilotfish.cache.prefix_index import PrefixIndex
from pilotfish.cli import cloud_inspection
from pilotfish.cli.main import run_command
from pilotfish.protocol import keys
from pilotfish.protocol.broker import EdgeBroker
from pilotfish.protocol.errors import UsageError
from pilotfish.protocol.settings import Settings

TEXT = "The same words, said often enough to fill some blocks of the cache: " * 3


@pytest.fixture
async def warm(redis: Redis, redis_url: str) -> AsyncIterator[PrefixIndex]:
    """w1 has computed TEXT, w2 nothing."""
    async with worker(redis_url, "w1", "kv_blocks=100"), worker(redis_url, "w2", "kv_blocks=100"):
        edge = EdgeBroker(redis, keys.DEFAULT_TENANT, "edge1", "boot1")
        await edge.publish(TARGET, "w1", job(list(TEXT.encode())))
        index = PrefixIndex(redis, TARGET)

        async def told() -> bool:
            return any(holder.blocks for holder in await index.look())

        await wait_until(told, "w1 to tell what it holds")
        yield index


async def command(*args: str) -> int:
    return await asyncio.to_thread(run_command, list(args))


async def test_index_lists_workers(warm: PrefixIndex, redis_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert await command("cache", "index", "--redis-url", redis_url, "--json") == 0
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    blocks = len(TEXT) // 16
    assert sorted((one["worker"], one["blocks"], one["kv_blocks"]) for one in found) == [
        ("w1", blocks, 100),
        ("w2", 0, 100),
    ]
    assert await command("cache", "index", "--redis-url", redis_url) == 0
    assert f"worker w1  {blocks} of 100 blocks" in capsys.readouterr().out


async def test_lookup_says_who_is_warm(warm: PrefixIndex, redis_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert await command("cache", "lookup", TEXT + "And more.", "--redis-url", redis_url, "--json") == 0
    found = {one["worker"]: one["cached_tokens"] for one in json.loads(capsys.readouterr().out)}
    assert found == {"w1": len(TEXT) // 16 * 16, "w2": 0}
    assert await command("cache", "lookup", "Something else.", "--redis-url", redis_url) == 0
    assert "worker w1  0 of 15 tokens cached" in capsys.readouterr().out


async def test_a_worker_that_has_not_said_how_large_its_blocks_are_is_left_out(
    redis: Redis, redis_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """It has just started, or has just died: its lease stands, its beat does not."""
    async with worker(redis_url, "w1", "kv_blocks=100"):
        await PrefixIndex(redis, TARGET).register("w2", 1)
        assert await command("cache", "lookup", "A prompt.", "--redis-url", redis_url, "--json") == 0
        assert [one["worker"] for one in json.loads(capsys.readouterr().out)] == ["w1"]
    async with worker(redis_url, "w3"):  # which has no blocks
        assert await cloud_inspection.warmth(redis, Settings(redis_url=redis_url), "A prompt.", chat=True) == []


async def test_another_tenant_finds_nothing(warm: PrefixIndex, redis: Redis, redis_url: str) -> None:
    found = await cloud_inspection.warmth(redis, Settings(redis_url=redis_url, tenant="other"), TEXT, chat=True)
    assert [one.cached_tokens for one in found] == [0, 0]


async def test_a_forgotten_worker_tells_everything_again(warm: PrefixIndex, redis: Redis) -> None:
    before = {holder.worker: holder.epoch for holder in await warm.look()}
    await cloud_inspection.forget(redis, "", "w1")

    async def again() -> bool:
        return any(
            (one.worker, one.blocks) == ("w1", len(TEXT) // 16) and one.epoch > before["w1"]
            for one in await warm.look()
        )

    await wait_until(again, "w1 to tell it again")
    with pytest.raises(UsageError, match="knows no worker 'w9'"):
        await cloud_inspection.forget(redis, "", "w9")


def test_without_workers_it_says_so(redis: Redis, redis_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["cache", "index", "--redis-url", redis_url]) == 0
    assert capsys.readouterr().out.startswith("nobody keeps an index")
