"""The checks that watch over the other tests, checked themselves."""

from __future__ import annotations

import time

import pytest
import redis as sync_redis
from redis.asyncio import Redis

from helpers import wait_until, wait_until_sync
from pilotfish.bench.leaks import ownerless
from pilotfish.protocol import keys
from skips import ALLOWED_SKIPS, Skips, allowed_skips


def test_a_key_without_ttl_or_owner_is_a_leak(redis_url: str) -> None:
    with sync_redis.Redis.from_url(redis_url) as client:
        client.set("pf:left", 1)
        client.set("something", 1)
        client.set("pf:with:ttl", 1, ex=60)
        client.set("arq:queue", 1)
        client.sadd(keys.TENANTS, "default")
        client.hset(keys.TARGETS, "demo", "0" * 16)
        assert ownerless(client) == ["pf:left", "something"]
        client.delete("pf:left", "something")


async def test_each_test_starts_with_an_empty_redis(redis: Redis) -> None:
    assert await redis.dbsize() == 0
    await redis.set("pf:left:for:the:next", 1, ex=60)


async def test_also_after_a_test_that_left_something(redis: Redis) -> None:
    assert await redis.dbsize() == 0


def test_an_allowed_skip_has_a_reason() -> None:
    assert allowed_skips("# a comment\n\ntests/a.py::test_b[*]  # no GPU in CI\n") == ["tests/a.py::test_b[*]"]
    with pytest.raises(ValueError, match="no reason given in 'tests/a.py::test_b'"):
        allowed_skips("tests/a.py::test_b\n")


def test_the_list_of_allowed_skips_is_well_formed() -> None:
    allowed_skips(ALLOWED_SKIPS.read_text())


def skipped(nodeid: str) -> pytest.TestReport:
    return pytest.TestReport(nodeid, ("", 0, ""), {}, "skipped", ("", 0, "why"), "call")


@pytest.mark.parametrize(("ci", "status"), [("true", 1), ("", 0)])
def test_a_surprising_skip_fails_ci_and_only_ci(
    ci: str, status: int, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    class Session:
        exitstatus = pytest.ExitCode.OK

    monkeypatch.setenv("CI", ci)
    skips, session = Skips(["a.py::*"]), Session()
    skips.pytest_runtest_logreport(skipped("a.py::test"))
    skips.pytest_sessionfinish(session)  # type: ignore[arg-type]
    assert session.exitstatus == 0
    skips.pytest_runtest_logreport(skipped("b.py::test"))
    skips.pytest_sessionfinish(session)  # type: ignore[arg-type]
    assert session.exitstatus == status


async def test_waiting_returns_the_value_and_names_what_never_came() -> None:
    started = time.monotonic()

    async def later() -> bool:
        return time.monotonic() > started + 0.02

    assert await wait_until(later, "a moment")
    with pytest.raises(AssertionError, match="in vain for: Godot"):
        await wait_until(lambda: False, "Godot", timeout=0.02)
    with pytest.raises(AssertionError, match="in vain for: Godot"):
        wait_until_sync(lambda: False, "Godot", timeout=0.02)
