"""Adding, listing and revoking tenants: Redis ACL users, a quota, and a place in the set that workers re-read.

For an administrator: making users needs the right to (`acl.admin`). Users outlive a restart of Redis if it has an
ACL file. Knows Redis; `acl.py` says what a user may do, `quota.py` what a tenant is granted.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any
from urllib.parse import quote, urlsplit, urlunsplit

import redis.exceptions as rx

from pilotfish.protocol import acl, keys
from pilotfish.protocol.bounds import tenant_of
from pilotfish.protocol.broker import RedisBytes, clock_ms, translated
from pilotfish.protocol.errors import BrokerRefused, UsageError
from pilotfish.protocol.quota import UNLIMITED, Quota, parse

SCAN_COUNT = 1_000


@dataclass(frozen=True, slots=True)
class Added:
    """What `add` did: passwords of the users that are new, by name; whether they outlive a restart of Redis."""

    tenant: str
    quota: Quota
    passwords: dict[str, str]
    saved: bool
    also_default: bool  # it was served as the only one there was, and goes on being served


@dataclass(frozen=True, slots=True)
class Row:
    """One tenant as `ls` shows it. `tokens` in flight are counted for tenants with limits only."""

    tenant: str
    quota: Quota
    waiting: int
    taken: int
    tokens: int
    agents: int
    age_ms: int | None

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


async def add(redis: RedisBytes, tenant: str, said: Mapping[str, float], devices: Sequence[str] = ()) -> Added:
    """Make a tenant, or add devices to one and change those fields of its quota that are said.

    Users that are there keep their passwords, and limits nobody names stay: one more device lifts none.

    Raises UsageError for names, BrokerRefused for a Redis that is too old or a user that may not.
    """
    for name in (tenant, *devices):
        if not keys.NAME.fullmatch(name):
            raise UsageError(f"{name[:80]!r} cannot name a tenant or agent: take letters, digits, _ . - (64 at most)")
    with translated():
        await _check_version(redis)
        there = await _users(redis)
        wanted = [acl.agent(tenant), acl.shell(tenant), *(acl.agent(tenant, device) for device in devices)]
        fresh = {user.name: secrets.token_urlsafe(24) for user in wanted if user.name not in there}
        for user in wanted:
            if user.name in fresh:
                line = user.line(acl.password_hash(fresh[user.name])).split()
                await redis.execute_command("ACL", "SETUSER", *line[1:])  # type: ignore[no-untyped-call]
        first = not await redis.exists(keys.TENANTS) and tenant != keys.DEFAULT_TENANT
        before = parse((await redis.hget(keys.QUOTAS, tenant) or b"").decode())  # type: ignore[misc]  # sync or async
        granted = replace(before, **said, since_ms=before.since_ms or await clock_ms(redis))  # type: ignore[arg-type]
        await redis.hset(keys.QUOTAS, tenant, granted.text())  # type: ignore[misc]
        await redis.sadd(keys.TENANTS, tenant, *([keys.DEFAULT_TENANT] if first else []))  # type: ignore[misc]
        return Added(tenant, granted, fresh, await _save(redis), first)


async def revoke(redis: RedisBytes, tenant: str) -> tuple[list[str], int]:
    """Remove a tenant: its users (which are disconnected), its quota, its keys. Returns the users' names, and how many
    keys went. Workers drop its sessions with their next beat. Raises UsageError if there is no such tenant.
    """
    with translated():
        own = [f"{tenant}+agent", f"{tenant}+shell"]
        users = [name for name in await _users(redis) if name in own or name.startswith(f"{tenant}+agent+")]
        if users:
            await redis.execute_command("ACL", "DELUSER", *users)  # type: ignore[no-untyped-call]
            await _save(redis)
        known = await redis.srem(keys.TENANTS, tenant)  # type: ignore[misc]
        known += await redis.hdel(keys.QUOTAS, tenant)  # type: ignore[misc]
        if not (known or users):
            raise UsageError(f"there is no tenant {tenant[:80]!r}: `pilotfish tenants ls` lists those there are")
        doomed = [key async for key in redis.scan_iter(match=f"{keys.PREFIX}:*", count=SCAN_COUNT)]
        doomed = [key for key in doomed if tenant_of(key) == tenant or _counts(key, tenant)]
        return users, await redis.unlink(*doomed) if doomed else 0


def _counts(key: bytes, tenant: str) -> bool:
    """Whether workers count this tenant's use there."""
    parts = key.decode(errors="replace").split(":")
    return len(parts) == 4 and key.decode(errors="replace") == keys.use(parts[1], tenant)


async def listed(redis: RedisBytes) -> list[Row]:
    """Every tenant that workers serve."""
    with translated():
        names = sorted(name.decode() for name in await redis.smembers(keys.TENANTS)) or [keys.DEFAULT_TENANT]  # type: ignore[misc]
        quotas = {name.decode(): parse(text.decode()) for name, text in (await redis.hgetall(keys.QUOTAS)).items()}  # type: ignore[misc]
        targets = [target.decode() for target in await redis.hkeys(keys.TARGETS)]  # type: ignore[misc]
        oldest = await clock_ms(redis) - keys.BEAT_TTL_MS
        live = {t: [n.decode() for n in await redis.zrangebyscore(keys.workers(t), oldest, "+inf")] for t in targets}
        return [await _row(redis, name, quotas.get(name, UNLIMITED), live, oldest) for name in names]


async def _row(redis: RedisBytes, tenant: str, quota: Quota, live: dict[str, list[str]], oldest: int) -> Row:
    streams = [keys.jobs(target, tenant, worker) for target, names in live.items() for worker in (*names, keys.ANY)]
    pipe = redis.pipeline(transaction=False)
    for target, names in live.items():
        pipe.hmget(keys.use(target, tenant), [*names, ":at"])
    for stream in streams:
        pipe.xlen(stream)
        pipe.xpending(stream, keys.GROUP_WORKERS)
    pipe.zcount(keys.agents(tenant), oldest, "+inf")
    *answers, agents = await pipe.execute(raise_on_error=False)  # a stream without a group, or of another kind
    tokens = sum(int(held or 0) for answer in answers[: len(live)] for held in answer[:-1])
    counted = answers[len(live) :]
    lengths = [0 if isinstance(length, Exception) else int(length) for length in counted[::2]]
    taken = sum(0 if isinstance(pending, Exception) else int(pending["pending"]) for pending in counted[1::2])
    age_ms = oldest + keys.BEAT_TTL_MS - quota.since_ms if quota.since_ms else None
    return Row(tenant, quota, max(0, sum(lengths) - taken), taken, tokens, int(agents), age_ms)


def login(url: str, user: str, password: str) -> str:
    """The same Redis as this user reaches it."""
    parts = urlsplit(url)
    at = parts.netloc.rpartition("@")[2]
    return urlunsplit(parts._replace(netloc=f"{quote(user, safe='+')}:{quote(password)}@{at}"))


async def _users(redis: RedisBytes) -> list[str]:
    return [name.decode() for name in await redis.execute_command("ACL", "USERS")]  # type: ignore[no-untyped-call]


async def _save(redis: RedisBytes) -> bool:
    """Into Redis' ACL file, if it has one."""
    try:
        await redis.execute_command("ACL", "SAVE")  # type: ignore[no-untyped-call]
    except rx.NoPermissionError:
        raise
    except rx.ResponseError:
        return False
    return True


async def _check_version(redis: RedisBytes) -> None:
    version = (await redis.info("server"))["redis_version"]
    if int(version.partition(".")[0]) < 7:
        raise BrokerRefused(f"this Redis is {version}, tenants' users need 7 or newer (ACL selectors): upgrade it")
