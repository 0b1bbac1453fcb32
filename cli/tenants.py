"""`tenants add|ls|revoke`: who may use the workers, how much of them, and who no longer may."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from pilotfish.cli.options import AsJson, Help, takes

if TYPE_CHECKING:
    from pilotfish.protocol.broker import RedisBytes
    from pilotfish.protocol.settings import Settings
    from pilotfish.protocol.tenancy import Added, Row

app = typer.Typer(help="Add, list and revoke tenants: Redis users with quotas.", no_args_is_help=True)
T = TypeVar("T")
ADMIN = ("redis_url", "tls_ca", "allow_plaintext")
Tenant = Annotated[str, typer.Argument(metavar="NAME", help="Letters, digits, _ . - (64 at most).")]


@app.callback()
def _tenants(help: Help = False) -> None: ...


@app.command()
@takes(*ADMIN)
def add(
    settings: Settings,
    tenant: Tenant,
    weight: Annotated[
        float | None, typer.Option(min=0.001, max=1000, help="Its part against others' when all wait; 1 at first.")
    ] = None,
    rows_per_second: Annotated[
        float | None, typer.Option(min=0, help="Engine rows a second; 0, at first: no limit.")
    ] = None,
    tokens_in_flight: Annotated[
        int | None, typer.Option(min=0, help="Context of jobs under way; 0, at first: no limit.")
    ] = None,
    device: Annotated[
        list[str] | None, typer.Option("--device", metavar="AGENT", help="A user for this one device; repeat for more.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make a tenant's Redis users and print what its devices need, once; of one there is, change what is said.

    Talk to Redis as `admin` (see `pilotfish acl`). Users that are there keep their passwords, limits not named stay.
    """
    import asyncio
    import json

    from pilotfish.protocol import tenancy

    limits = {"weight": weight, "rows_per_second": rows_per_second, "tokens_in_flight": tokens_in_flight}
    said = {name: value for name, value in limits.items() if value is not None}
    url, added = asyncio.run(_as_admin(settings, lambda redis: tenancy.add(redis, tenant, said, device or ())))
    urls = {user: tenancy.login(url, user, password) for user, password in added.passwords.items()}
    if as_json:
        print(json.dumps({"tenant": tenant, "quota": added.quota.text(), "redis_urls": urls, "saved": added.saved}))
        return
    for redis_url in urls.values():
        print(f"REDIS_URL='{redis_url}'")
    _tell(added)


@app.command()
@takes(*ADMIN)
def ls(settings: Settings, as_json: AsJson = False) -> None:
    """List tenants: quota, jobs waiting and taken, tokens in flight, agents alive, age."""
    import asyncio
    import json

    from pilotfish.protocol import tenancy

    _, rows = asyncio.run(_as_admin(settings, tenancy.listed))
    if as_json:
        print(json.dumps([row.as_json() for row in rows]))
    else:
        _show(rows)


@app.command()
@takes(*ADMIN)
def revoke(settings: Settings, tenant: Tenant, as_json: AsJson = False) -> None:
    """Remove a tenant: its users are disconnected, its keys removed; workers drop its sessions within a second."""
    import asyncio
    import json

    from pilotfish.protocol import tenancy

    _, (users, removed) = asyncio.run(_as_admin(settings, lambda redis: tenancy.revoke(redis, tenant)))
    if as_json:
        print(json.dumps({"tenant": tenant, "users": users, "keys": removed}))
    else:
        print(f"{tenant} is revoked: {len(users)} users and {removed} keys are gone")


async def _as_admin(settings: Settings, what: Callable[[RedisBytes], Awaitable[T]]) -> tuple[str, T]:
    from pilotfish.cli.redis_url import redis_url
    from pilotfish.protocol.broker import connect, ping

    url = redis_url(settings)
    async with connect(url) as redis:
        await ping(redis, url)
        return url, await what(redis)


# --- for people ----------------------------------------------------------------------------------------------


def _tell(added: Added) -> None:
    """What is not in the URLs."""
    import sys

    said = [f"tenant {added.tenant}: {added.quota.text()}"]
    if added.passwords:
        said.append("the passwords are shown this once; a device starts with `pilotfish agent --tenant "
                    f"{added.tenant}`, a shell submits with `pilotfish submit --tenant {added.tenant}`")  # fmt: skip
    if added.passwords and not added.saved:
        said.append("this Redis has no ACL file: its users are gone when it restarts")
    if added.also_default:
        said.append("the tenant default, so far the only one, goes on being served: revoke it if it should not")
    print("\n".join(said), file=sys.stderr)


def _show(rows: list[Row]) -> None:
    from rich.console import Console
    from rich.table import Table

    from pilotfish.cli.queue import age

    table = Table(box=None, pad_edge=False)
    table.add_column("tenant")
    for name in ("weight", "rows/s", "in flight", "of", "waiting", "taken", "agents", "age"):
        table.add_column(name, justify="right")
    for row in rows:
        quota = row.quota
        limit = f"{quota.tokens_in_flight}" if quota.tokens_in_flight else "-"
        rate = f"{quota.rows_per_second:g}" if quota.rows_per_second else "-"
        counted = str(row.tokens) if quota.limited else "-"
        table.add_row(row.tenant, f"{quota.weight:g}", rate, counted, limit, str(row.waiting), str(row.taken),
                      str(row.agents), age(row.age_ms))  # fmt: skip
    Console(highlight=False, soft_wrap=True).print(table)
