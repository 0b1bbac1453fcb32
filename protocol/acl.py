"""Who may touch which keys: Redis ACL users per role and tenant, least rights each, as lines of an ACL file.

    worker              everything under our prefixes and arq's; no FLUSHALL, no CONFIG, no other keys
    operator            reads everything of ours, says which of the tenants are served and what each is granted
    admin               adds and revokes tenants: who may make users may make himself one that may do everything
    <tenant>+agent      adds jobs to its tenant's streams, reads its tenant's replies, takes prompts, writes outputs
    <tenant>+agent+<a>  the same for one device: no other device's replies, no other device's beat
    <tenant>+shell      submits prompts, reads outputs, tells agents to cancel

Nobody but the worker may delete a key, overwrite one, or run a script. Patterns are made by the functions of `keys.py`.
Needs Redis 7 (selectors, %R~ and %W~). Knows no passwords but their hashes; talks to nobody.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Final

from pilotfish.protocol import keys

ANY_TARGET: Final = "?" * 16  # a target's id has 16 digits, and no `*` that would match a colon
CALLS: Final = "+ping +time +select +multi +exec +discard"  # they touch no key
NOBODY: Final = "user default off resetpass resetkeys resetchannels -@all"  # Redis' own user, which may do everything

_LINE = re.compile(r"user (\S+) .*?#([0-9a-f]{64})\b.*")


@dataclass(frozen=True, slots=True)
class User:
    """One ACL user and what it may do, in the words of Redis' ACL SETUSER."""

    name: str
    rules: str

    def line(self, password_hash: str) -> str:
        """Its line of an ACL file."""
        return f"user {self.name} on #{password_hash} resetchannels -@all {self.rules}"


def users(tenants: Iterable[str], devices: Iterable[tuple[str, str]] = ()) -> list[User]:
    """Worker, operator, admin, each tenant's agent and shell; `devices` are (tenant, agent) with a user each."""
    own = [user for tenant in tenants for user in (agent(tenant), shell(tenant))]
    return [worker(), operator(), admin(), *own, *(agent(tenant, name) for tenant, name in devices)]


def worker() -> User:
    """The cloud's side, which everyone else has to trust."""
    return User(
        "worker",
        f"~{keys.PREFIX}:* ~arq:* {CALLS} +@read +@write +@transaction +@scripting -@dangerous -@admin +info",
    )


def operator() -> User:
    """A person who looks, and says which tenants are served."""
    granting = f"(+sadd +srem ~{keys.TENANTS}) (+hset +hdel ~{keys.QUOTAS})"
    return User("operator", f"{CALLS} +info +@read -@dangerous %R~{keys.PREFIX}:* %R~arq:* {granting}")


def admin() -> User:
    """Who makes and removes tenants with their users (`pilotfish tenants`)."""
    users = "+acl|setuser +acl|deluser +acl|users +acl|save"
    return User("admin", f"~{keys.PREFIX}:* {CALLS} +@read +@write -@dangerous +info {users}")


def agent(tenant: str, name: str = "") -> User:
    """A tenant's devices: all of them, or the one that has this name."""
    jobs, pair = keys.jobs(ANY_TARGET, tenant, "*"), keys.pair(ANY_TARGET)
    replies, beat = keys.replies(tenant, name or "*"), keys.agent_beat(tenant, name or "*")
    groups = "+xgroup|create +xreadgroup +xautoclaim +xpending +xclaim +xack +xdel +pexpire"
    return User(
        f"{tenant}+agent+{name}" if name else f"{tenant}+agent",
        _rules(
            ("+hgetall", f"%R~{keys.TARGETS}"),
            ("+get", f"%R~{pair}"),
            ("+zrangebyscore", f"%R~{keys.workers(ANY_TARGET)}"),
            ("+xadd", f"%W~{jobs}"),
            ("+xgroup|create +xreadgroup +pexpire", f"~{replies}"),
            ("+hset +pexpire", f"%W~{beat}"),
            ("+zadd +zrem +zremrangebyscore +pexpire", f"%W~{keys.agents(tenant)}"),
            (groups, f"~{keys.prompts(tenant)}"),
            ("+xadd +xrevrange +pexpire", f"~{keys.output(tenant, '*')}"),
        ),
    )


def shell(tenant: str) -> User:
    """Whoever submits a tenant's prompts."""
    return User(
        f"{tenant}+shell",
        _rules(
            ("+zrangebyscore", f"%R~{keys.agents(tenant)}"),
            ("+xadd +xrange", f"~{keys.prompts(tenant)}"),
            ("+xadd +xread +exists +pexpire", f"~{keys.output(tenant, '*')}"),
            ("+xadd +pexpire", f"%W~{keys.replies(tenant, '*')}"),
        ),
    )


def _rules(*selectors: tuple[str, str]) -> str:
    return " ".join([CALLS, *(f"({commands} {pattern})" for commands, pattern in selectors)])


# --- the file ------------------------------------------------------------------------------------------------


def password_hash(password: str) -> str:
    """As an ACL file has it."""
    return sha256(password.encode()).hexdigest()


def hashes(acl_file: str) -> dict[str, str]:
    """User -> password hash of an ACL file's text."""
    return dict(found.groups() for found in map(_LINE.fullmatch, acl_file.splitlines()) if found)  # type: ignore[misc]


def acl_file(of: Iterable[User], passwords: Mapping[str, str]) -> str:
    """The file's text: `passwords` are hashes by user name."""
    return "".join(f"{line}\n" for line in [NOBODY, *(user.line(passwords[user.name]) for user in of)])
