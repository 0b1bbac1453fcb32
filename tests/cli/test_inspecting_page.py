"""Every redis-cli command on docs/inspecting.md, run where there is something to see."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from redis.asyncio import Redis
from rigs import TARGET, agent, job, worker

import pilotfish
from helpers import wait_until
from pilotfish.cache.prefix_index import PrefixIndex
from pilotfish.protocol import keys
from pilotfish.protocol.broker import EdgeBroker
from pilotfish.protocol.ingress import Ingress
from pilotfish.protocol.quota import Quota
from pilotfish.protocol.wire import Wire

PAGE = Path(pilotfish.__file__).parent / "docs" / "inspecting.md"
COMMANDS = [
    shlex.split(line.removeprefix("$ redis-cli "), comments=True)
    for line in PAGE.read_text().splitlines()
    if line.startswith("$ redis-cli ")
]
MAY_BE_EMPTY = ("XLEN", "XPENDING", "kvgone")


def test_the_page_has_commands() -> None:
    assert len(COMMANDS) >= 15


async def test_every_command_on_the_page_shows_something(redis: Redis, redis_url: str) -> None:
    prompt = [7] * 400
    await redis.sadd(keys.TENANTS, keys.DEFAULT_TENANT)  # type: ignore[misc]
    await redis.hset(keys.QUOTAS, keys.DEFAULT_TENANT, Quota(rows_per_second=1_000_000).text())  # type: ignore[misc]
    async with worker(redis_url, "w1", "kv_blocks=200"), agent(redis_url, prompts=True):
        await EdgeBroker(redis, keys.DEFAULT_TENANT, "edge2", "b").publish(TARGET, "w1", job(prompt))
        epoch = await wait_until(lambda: _epoch(redis), "w1 to tell what it holds")
        await _passed_on(redis)
        await wait_until(lambda: redis.exists(keys.use(TARGET, keys.DEFAULT_TENANT)), "the use to be settled")
        await wait_until(lambda: redis.exists(keys.agent_beat(keys.DEFAULT_TENANT, "edge1")), "the agent's beat")
        wire = Wire(redis, 5.0)  # answers as redis-cli gets them
        for command in COMMANDS:
            args = [_named(word, epoch) for word in command]
            answer = await wire.call(*args)
            empty_is_fine = any(word.endswith(MAY_BE_EMPTY) for word in args)
            assert answer or empty_is_fine, f"nothing to see by {' '.join(args)}"


def _named(word: str, epoch: str) -> str:
    """A word of the page with real names. w2 is a name that nobody reads, so that what is passed on stays visible."""
    named = word.replace("TARGET", TARGET).replace("EPOCH", epoch).replace("AGENT", "edge1")
    return named.replace("WORKER", "w2" if ":fwd:" in word else "w1")


async def _epoch(redis: Redis) -> str:
    return next((str(one.epoch) for one in await PrefixIndex(redis, TARGET).look() if one.blocks), "")


async def _passed_on(redis: Redis) -> None:
    front, nobody = Ingress(redis, TARGET, "front"), Ingress(redis, TARGET, "w2")
    for each in (front, nobody):
        await each.open()
    await EdgeBroker(redis, keys.DEFAULT_TENANT, "edge2", "b").publish(TARGET, "front", job([1, 2, 3]))
    (delivery,) = await front.pick_up(30, 10)
    assert await front.pass_on(delivery, "w2")


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_keys_on_the_page_are_those_of_the_keys_page(command: list[str]) -> None:
    shapes = {
        keys.TARGETS, keys.workers("TARGET"), keys.beat("TARGET", "WORKER"), keys.agents("default"),
        keys.jobs("TARGET", "default"), keys.forwarded("TARGET", "WORKER"), keys.prompts("default"),
        keys.dead_letters("TARGET"), keys.index("TARGET"), keys.index_worker("TARGET", "WORKER"),
        keys.index_gone("TARGET"), keys.index_bucket("TARGET", "EPOCH", 0, "WORKER"),
        keys.TENANTS, keys.QUOTAS, keys.use("TARGET", "default"), keys.agent_beat("default", "AGENT"),
    }  # fmt: skip
    assert {word for word in command if word.startswith("pf:")} <= shapes
