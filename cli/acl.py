"""`acl`: an ACL file for a Redis that several tenants share, and the passwords that go with it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pilotfish.cli.options import AsJson
from pilotfish.protocol.errors import UsageError


def acl(
    tenant: Annotated[list[str] | None, typer.Option("--tenant", help="Whose users to make; repeat for more.")] = None,
    device: Annotated[
        list[str] | None,
        typer.Option("--device", metavar="TENANT/AGENT", help="A user for this one device; repeat for more."),
    ] = None,
    keep: Annotated[
        str, typer.Option("--keep", metavar="FILE", help="An ACL file; its users keep their passwords.")
    ] = "",
    as_json: AsJson = False,
) -> None:
    """Print an ACL file for Redis 7 or newer: a worker, an operator, and each tenant's agent and shell.

    The file holds hashes; new passwords are shown once, on stderr. Redis' own default user is switched off. With --json
    one object holds both.
    """
    import json
    import secrets
    import sys

    from pilotfish.protocol import acl as rules

    tenants = list(dict.fromkeys(map(_checked, tenant or ["default"])))
    users = rules.users(tenants, [_device(one, tenants) for one in device or ()])
    hashes = rules.hashes(_read(keep)) if keep else {}
    fresh = {user.name: secrets.token_urlsafe(24) for user in users if user.name not in hashes}
    hashes |= {name: rules.password_hash(password) for name, password in fresh.items()}
    text = rules.acl_file(users, hashes)
    if as_json:
        print(json.dumps({"acl_file": text, "passwords": fresh, "tenants": tenants}))
        return
    sys.stdout.write(text)
    _tell(fresh, tenants)


def _tell(fresh: dict[str, str], tenants: list[str]) -> None:
    """What a person does next, with the passwords nobody will see again."""
    import sys

    from pilotfish.protocol import keys

    for name, password in fresh.items():
        print(f"REDIS_URL=rediss://{name}:{password}@HOST:PORT/0", file=sys.stderr)
    print(f"load it: redis-server --aclfile FILE, or ACL LOAD; redis-cli SADD {keys.TENANTS} {' '.join(tenants)}",
          file=sys.stderr)  # fmt: skip


def _checked(name: str) -> str:
    from pilotfish.protocol import keys

    if not keys.NAME.fullmatch(name):
        raise UsageError(f"{name[:80]!r} cannot name a tenant or agent: take letters, digits, _ . - (64 at most)")
    return name


def _device(given: str, tenants: list[str]) -> tuple[str, str]:
    tenant, slash, name = given.partition("/")
    if not slash or tenant not in tenants:
        raise UsageError(f"{given[:80]!r} is no device: --device takes TENANT/AGENT, of a tenant named by --tenant")
    return tenant, _checked(name)


def _read(path: str) -> str:
    from pilotfish.protocol.home import expand_user

    try:
        return Path(expand_user(path)).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the ACL file {path} cannot be read ({error}): name one that `pilotfish acl` wrote") from None
