"""`pilotfish tenants` on a Redis with users: what it prints is what a device needs, and what it revokes is gone."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis as sync_redis
import redis.exceptions as rx
from rigs import TARGET, job, worker

import pilotfish
from helpers import wait_until
from logins import login, redis_with_acl
from pilotfish.cli.main import run_command
from pilotfish.protocol import keys, quota
from pilotfish.protocol.broker import EdgeBroker, connect
from pilotfish.protocol.messages import Verdict

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with redis_with_acl(tmp_path_factory.mktemp("users")) as url:
        yield url


@pytest.fixture(autouse=True)
def as_admin(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDIS_URL", login(redis_url, "admin"))


def tenants(capsys: pytest.CaptureFixture[str], *args: str, code: int = 0) -> tuple[str, str]:
    assert run_command(["tenants", *args]) == code
    told = capsys.readouterr()
    return told.out, told.err


def urls(out: str) -> dict[str, str]:
    return {user: f"redis://{user}:{rest}" for user, rest in re.findall(r"^REDIS_URL='redis://(.+?):(.+)'$", out, re.M)}


async def answered(url: str, tenant: str, agent: str) -> Verdict:
    """One round as this device."""
    async with connect(url) as client:
        broker = EdgeBroker(client, tenant, agent, "boot1")
        replies = broker.replies()
        await broker.publish(TARGET, "", job(agent=agent))
        async with asyncio.timeout(10):
            verdict = await anext(replies)
    assert isinstance(verdict, Verdict)
    return verdict


async def test_what_add_prints_is_what_a_device_needs(redis_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    async with worker(redis_url):
        out, err = await asyncio.to_thread(
            tenants, capsys, "add", "newco", "--weight", "2", "--rows-per-second", "500", "--device", "phone"
        )
        given = urls(out)
        assert set(given) == {"newco+agent", "newco+shell", "newco+agent+phone"}
        assert "weight=2 rows_per_second=500" in err
        async with connect(redis_url) as looks:
            stream = keys.jobs(TARGET, "newco")
            await wait_until(lambda: looks.exists(stream), "the worker to open the tenant's streams")
        verdict = await answered(given["newco+agent+phone"], "newco", "phone")
        assert verdict.type == "verdict"
        rows = json.loads((await asyncio.to_thread(tenants, capsys, "ls", "--json"))[0])
        assert [row["tenant"] for row in rows] == ["default", "newco"]
        assert rows[1]["quota"]["rows_per_second"] == 500
        assert 0 < rows[1]["age_ms"] < 60_000
        again, _ = await asyncio.to_thread(tenants, capsys, "add", "newco", "--device", "tablet", "--weight", "3")
        assert set(urls(again)) == {"newco+agent+tablet"}, "a password is shown once"
        granted = quota.parse(_granted(redis_url)["newco"])
        assert (granted.weight, granted.rows_per_second) == (3, 500), "a limit that is not named stays"

        await asyncio.to_thread(tenants, capsys, "revoke", "newco")
        with sync_redis.Redis.from_url(given["newco+agent"]) as gone, pytest.raises(rx.AuthenticationError):
            gone.ping()
        with sync_redis.Redis.from_url(redis_url) as looks:
            assert not [key for key in looks.scan_iter() if b"newco" in key]
        out, err = await asyncio.to_thread(tenants, capsys, "revoke", "newco", code=2)
        assert "there is no tenant 'newco'" in err


def _granted(url: str) -> dict[str, str]:
    with sync_redis.Redis.from_url(url, decode_responses=True) as client:
        return dict(client.hgetall(keys.QUOTAS))


def test_a_person_sees_a_table_and_a_first_tenant_leaves_the_default_served(
    redis_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _, err = tenants(capsys, "add", "first", "--tokens-in-flight", "9000")
    assert "default, so far the only one, goes on being served" in err
    out, _ = tenants(capsys, "ls")
    assert re.search(r"^first +1 +- +0 +9000 +0 +0 +0 +\d+", out, re.M)
    assert out.count("\n") == 3


@pytest.mark.parametrize("name", ["a:b", "x" * 65, "*", ""])
def test_a_name_that_could_reach_other_keys_is_refused(
    redis_url: str, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert "cannot name a tenant" in tenants(capsys, "add", name, code=2)[1]


def test_who_may_not_make_users_is_told(
    redis_url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REDIS_URL", login(redis_url, "acme+agent"))
    assert "refuses this user" in tenants(capsys, "add", "more", code=3)[1]


def test_the_commands_in_the_docs_run(redis_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(pilotfish.__file__).parent / "docs/tenants.md").read_text()
    (block,) = re.findall(r"```console\n(.*?)```", page, re.S)
    commands = re.findall(r"^\$ pilotfish tenants (.*)$", block, re.M)
    assert len(commands) == 4
    for command in commands:
        tenants(capsys, *command.split())
    assert _granted(redis_url)["acme"].startswith("weight=2 rows_per_second=4000 tokens_in_flight=200000")
