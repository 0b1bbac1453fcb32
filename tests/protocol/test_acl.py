"""What `protocol/acl.py` grants, tried out on a real Redis: each side can do its work, and nothing beside it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, aclosing, nullcontext

import httpx
import pytest
import redis.exceptions as rx
from http_rigs import served
from redis.asyncio import Redis
from rigs import PROMPT, TARGET, agent, draws, job, worker

from logins import TENANTS, login, redis_with_acl
from pilotfish.edge_agent.http.service import Service
from pilotfish.protocol import acl, fleet, inspection, keys
from pilotfish.protocol.broker import EdgeBroker, connect
from pilotfish.protocol.errors import BrokerRefused
from pilotfish.protocol.messages import CancelRequest, Finished, Prompt, ToShell, Verdict
from pilotfish.protocol.shell import ShellBroker

pytestmark = pytest.mark.slow
REQUEST = "e" * 32
JOBS = keys.jobs(TARGET, "acme")


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with redis_with_acl(tmp_path_factory.mktemp("users")) as url:
        yield url


class Users:
    """Clients by user name, of the Redis with users."""

    def __init__(self, url: str, stack: AsyncExitStack) -> None:
        self.url, self.stack = url, stack

    async def __call__(self, name: str) -> Redis:
        return await self.stack.enter_async_context(Redis.from_url(login(self.url, name)))


@pytest.fixture
async def user(redis_url: str, redis: Redis) -> AsyncIterator[Users]:
    async with AsyncExitStack() as stack:
        yield Users(redis_url, stack)


# --- everyone can do their work --------------------------------------------------------------------------------


async def test_a_worker_an_agent_and_a_shell_serve_a_prompt_each_as_its_own_user(redis_url: str, user: Users) -> None:
    shell = ShellBroker(await user("default+shell"), keys.DEFAULT_TENANT)
    text = bytes(PROMPT).decode()
    async with worker(redis_url), agent(redis_url, prompts=True) as running:
        found = await fleet.find_target(running.broker.redis)  # type: ignore[union-attr]
        assert found.id == TARGET
        await shell.submit(Prompt(request=REQUEST, text=text, raw=True, max_tokens=12))
        said: list[ToShell] = [message async for message in shell.output(REQUEST, follow=True)]
        assert isinstance(said[-1], Finished)
        ids = [token for message in said if message.type == "text" for token in message.ids]
        assert ids == draws(PROMPT, 12)
        await shell.tell_agent("edge1", CancelRequest(request=REQUEST))
        seen = await inspection.look(await user("operator"), keys.DEFAULT_TENANT)
        assert [peer.name for peer in seen.agents] == ["edge1"]
        assert [peer.name for peer in seen.targets[0].workers] == ["w1"]


async def test_a_device_of_its_own_user_publishes_and_hears_its_replies(
    redis_url: str, redis: Redis, user: Users
) -> None:
    await redis.sadd(keys.TENANTS, "acme")  # type: ignore[misc]  # redis-py types both its clients at once
    edge = EdgeBroker(await user("acme+agent+edge1"), "acme", "edge1", "boot")
    async with worker(redis_url):
        assert await edge.publish(TARGET, "w1", job())
        async with aclosing(edge.replies()) as replies:
            verdict = await asyncio.wait_for(anext(replies), 5)
    assert isinstance(verdict, Verdict)


async def test_a_devices_dashboard_shows_what_its_user_may_see(redis_url: str, redis: Redis) -> None:
    await redis.acl_log_reset()
    async with worker(redis_url), agent(redis_url) as running, served(Service(running)) as one:
        await one.chat(max_tokens=5)
        async with httpx.AsyncClient(base_url=one.url) as http:
            told = [(await http.get("/v1/status")).json()["cloud"] for _ in range(2)]
            assert (await http.get("/ready")).json()["workers"] == 1
    for seen in told:
        (target,) = seen["targets"]
        assert (seen["limited"], [peer["name"] for peer in target["workers"]]) == (True, ["w1"])
        assert seen["rtt_ms"] > 0
    refused = await redis.acl_log()
    assert len(refused) <= 1, "it learns at the first refusal"


async def test_the_operator_adds_a_tenant_and_changes_nothing_else(user: Users) -> None:
    operator = await user("operator")
    assert await operator.sadd(keys.TENANTS, "acme") == 1  # type: ignore[misc]
    with pytest.raises(rx.NoPermissionError):
        await operator.sadd("pf:other", "acme")  # type: ignore[misc]
    with pytest.raises(rx.NoPermissionError):
        await operator.xadd(JOBS, {"m": b""})
    await operator.srem(keys.TENANTS, "acme")  # type: ignore[misc]


# --- and nothing beside it -------------------------------------------------------------------------------------

EVERYONE = [user.name for user in acl.users(TENANTS[1:3], [("acme", "edge1")])]
EDGES = [name for name in EVERYONE if "+" in name]
SERVER = [
    "FLUSHALL", "FLUSHDB", "CONFIG GET *", "ACL LIST", "KEYS *", "SHUTDOWN", "SAVE", "MONITOR", "SET foreign 1",
    "REPLICAOF localhost 1", "CLIENT KILL TYPE normal", "PUBLISH a b",
]  # fmt: skip
QUEUE = [
    f"SET {JOBS} 1", f"DEL {JOBS}", f"UNLINK {JOBS}", f"RENAME {JOBS} x", f"EXPIRE {JOBS} 1", f"PEXPIRE {JOBS} 1",
    f"XTRIM {JOBS} MAXLEN 0", f"XDEL {JOBS} 1-1", f"XSETID {JOBS} 9-9", f"XGROUP DESTROY {JOBS} workers",
    f"XREAD STREAMS {JOBS} 0", f"XREADGROUP GROUP workers w1 STREAMS {JOBS} >", f"XACK {JOBS} workers 1-1",
    f"XAUTOCLAIM {JOBS} workers w1 0 0", f"COPY {JOBS} pf:out:acme:x", "EVAL return{} 0", "SCAN 0",
    f"SET {keys.replies('acme', 'edge1')} 1", f"SADD {keys.TENANTS} x", f"HSET {keys.TARGETS} a b",
    f"SET {keys.pair(TARGET)} x", f"ZADD {keys.workers(TARGET)} 1 w9", f"XRANGE {keys.dead_letters(TARGET)} - +",
]  # fmt: skip
FOREIGN = [
    f"XADD {JOBS} * a edge1 m x", f"XADD {keys.jobs(TARGET, 'acme', 'w1')} * m x",
    f"XREADGROUP GROUP g c STREAMS {keys.replies('acme', 'edge1')} >",
    f"XREAD STREAMS {keys.replies('acme', 'edge1')} 0",
    f"XADD {keys.replies('acme', 'edge1')} * m x",
    f"XREAD STREAMS {keys.output('acme', REQUEST)} 0", f"XADD {keys.prompts('acme')} * m x",
    f"XRANGE {keys.prompts('acme')} - +", f"HSET {keys.agent_beat('acme', 'edge1')} a b",
    f"ZADD {keys.agents('acme')} 1 x", f"PEXPIRE {keys.replies('acme', 'edge1')} 1",
]  # fmt: skip


async def granted(client: Redis, commands: list[str]) -> list[str]:
    """Those that are not refused for want of a right."""
    through = []
    for command in commands:
        try:
            await client.execute_command(*command.split())  # type: ignore[no-untyped-call]
        except rx.NoPermissionError:
            continue
        except rx.RedisError as error:
            command += f": {error}"
        through.append(command)
    return through


@pytest.mark.parametrize("name", EVERYONE)
async def test_nobody_reaches_the_server_itself_or_foreign_keys(user: Users, name: str) -> None:
    assert await granted(await user(name), SERVER) == []


@pytest.mark.parametrize("name", EDGES)
async def test_an_edge_may_add_jobs_and_neither_read_remove_nor_replace_them(user: Users, name: str) -> None:
    assert await granted(await user(name), QUEUE) == []


@pytest.mark.parametrize("name", ["rogue+agent", "rogue+shell"])
async def test_no_tenant_reads_writes_or_answers_for_another(user: Users, name: str) -> None:
    assert await granted(await user(name), FOREIGN) == []


async def test_a_device_of_its_own_user_sees_no_other_devices_replies(redis: Redis, user: Users) -> None:
    device, fleet_user = await user("acme+agent+edge1"), await user("acme+agent")
    replies = keys.replies("acme", "edge2")
    await redis.xadd(replies, {"m": b"x"})
    await redis.pexpire(replies, 1000)
    with pytest.raises(rx.NoPermissionError):
        await device.xgroup_create(replies, "boot", "0")
    await fleet_user.xgroup_create(replies, "boot", "0")
    for client, allowed in ((device, False), (fleet_user, True)):
        with nullcontext() if allowed else pytest.raises(rx.NoPermissionError):
            assert await client.xreadgroup("boot", "edge2", {replies: ">"})
    with pytest.raises(rx.NoPermissionError):
        await device.pexpire(replies, 0)


async def test_redis_own_default_user_is_shut_out(redis_url: str) -> None:
    async with connect(f"redis://{redis_url.rpartition('@')[2]}") as stranger:
        with pytest.raises(BrokerRefused, match="Check the password or ACL"):
            await fleet.find_target(stranger)


async def test_what_an_acl_forbids_is_a_sentence(user: Users) -> None:
    edge = EdgeBroker(await user("rogue+agent"), "acme", "edge1", "boot")
    with pytest.raises(BrokerRefused, match="Check the password or ACL in REDIS_URL"):
        await edge.publish(TARGET, "", job())
