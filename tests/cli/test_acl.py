"""`pilotfish acl`: a file Redis loads, with hashes; passwords are said once."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from pilotfish.cli.main import run_command
from pilotfish.protocol import acl


def printed(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[str, str]:
    assert run_command(["acl", *args]) == 0
    told = capsys.readouterr()
    return told.out, told.err


def test_the_file_holds_every_role_and_no_password(capsys: pytest.CaptureFixture[str]) -> None:
    out, err = printed(capsys, "--tenant", "acme", "--tenant", "beta", "--device", "acme/phone")
    names = [line.split()[1] for line in out.splitlines()]
    assert names == ["default", "worker", "operator", "admin", "acme+agent", "acme+shell", "beta+agent", "beta+shell",
                     "acme+agent+phone"]  # fmt: skip
    assert out.startswith("user default off ")
    passwords = dict(re.findall(r"rediss://(\S+):(\S+)@HOST", err))
    assert set(passwords) == set(names[1:])
    assert len(set(passwords.values())) == 8
    assert not any(password in out for password in passwords.values())
    assert acl.hashes(out) == {name: acl.password_hash(password) for name, password in passwords.items()}
    assert "SADD pf:tenants acme beta" in err


def test_users_of_a_file_keep_their_passwords(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    first, _ = printed(capsys, "--tenant", "acme")
    (tmp_path / "users.acl").write_text(first)
    second, err = printed(capsys, "--tenant", "acme", "--tenant", "beta", "--keep", str(tmp_path / "users.acl"))
    assert set(first.splitlines()) < set(second.splitlines())
    assert re.findall(r"rediss://([^:]+):", err) == ["beta+agent", "beta+shell"]


def test_json_has_all_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    out, err = printed(capsys, "--json")
    told = json.loads(out)
    assert set(told["passwords"]) == {"worker", "operator", "admin", "default+agent", "default+shell"}
    assert set(acl.hashes(told["acl_file"])) == set(told["passwords"])
    assert not err


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["--tenant", "a:b"], "'a:b' cannot name a tenant or agent"),
        (["--tenant", "a*"], "cannot name"),
        (["--tenant", "a", "--device", "b/c"], "of a tenant named by --tenant"),
        (["--tenant", "a", "--device", "a"], "TENANT/AGENT"),
        (["--tenant", "a", "--device", "a/*"], "cannot name"),
        (["--keep", "/nowhere/users.acl"], "cannot be read"),
    ],
)
def test_what_cannot_be_is_a_sentence(capsys: pytest.CaptureFixture[str], args: list[str], sentence: str) -> None:
    assert run_command(["acl", *args]) == 2
    assert sentence in capsys.readouterr().err


def test_one_user_cannot_be_two() -> None:
    names = [user.name for user in acl.users(["a", "a.agent"], [("a", "agent"), ("a", "x")])]
    assert len(set(names)) == len(names)
