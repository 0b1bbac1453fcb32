"""The edge's and the shell's side: one command to publish, one connection to read, prompts, and errors with a fix."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from redis.asyncio import Redis
from rigs import TARGET, calls, job

from helpers import wait_until
from pilotfish.protocol import fleet, keys
from pilotfish.protocol.broker import EdgeBroker, connect, ensure_group, ping
from pilotfish.protocol.codec import encode
from pilotfish.protocol.errors import AnswerLost, BrokerRefused, BrokerUnreachable, InvalidMessage, NoAgent, NoWorker
from pilotfish.protocol.messages import Accepted, CancelRequest, Finished, Prompt, Refusal, Summary, Text
from pilotfish.protocol.settings import redacted
from pilotfish.protocol.shell import ShellBroker

TENANT = keys.DEFAULT_TENANT
REQUEST = "1" * 32
PROMPT = Prompt(request=REQUEST, text="hello")
DONE = Finished(request=REQUEST, reason="length", summary=Summary())
ACCEPTED = Accepted(request=REQUEST, agent="edge1", prompt_tokens=1, seed=1)
WORD = Text(request=REQUEST, start=0, ids=(104,), pieces=("h",), origins=("accepted",))


@pytest.fixture
def edge(redis: Redis) -> EdgeBroker:
    return EdgeBroker(redis, TENANT, "edge1", "boot1")


async def open_stream(redis: Redis, worker: str = keys.ANY) -> str:
    stream = keys.jobs(TARGET, TENANT, worker)
    await ensure_group(redis, stream, keys.GROUP_WORKERS)
    return stream


async def say(redis: Redis, message: Any, entry_id: str = "*") -> None:
    stream = keys.replies(TENANT, "edge1")
    await redis.xadd(stream, {keys.FIELD_MESSAGE: encode(message)}, id=entry_id)
    await redis.pexpire(stream, 10_000)


def refusal(number: int) -> Refusal:
    return Refusal(code="overloaded", worker="w1", round=number)


# --- publishing ----------------------------------------------------------------------------------------------


async def test_publishing_is_exactly_one_command(redis: Redis, edge: EdgeBroker) -> None:
    await open_stream(redis)
    await edge.publish(TARGET, "", job())  # opens its connection
    await redis.config_resetstat()
    await edge.publish(TARGET, "", job())
    counted = await calls(redis)
    assert {name: n for name, n in counted.items() if name not in ("config", "config|resetstat", "info")} == {"xadd": 1}


async def test_a_job_goes_to_the_worker_that_served_last_while_its_stream_is_open(
    redis: Redis, edge: EdgeBroker
) -> None:
    anyones, own = await open_stream(redis), await open_stream(redis, "w1")
    await redis.config_resetstat()
    await edge.publish(TARGET, "w1", job())
    assert (await calls(redis))["xadd"] == 1
    await edge.publish(TARGET, "gone", job())
    assert await redis.xlen(own) == 1
    assert await redis.xlen(anyones) == 1
    assert not await redis.exists(keys.jobs(TARGET, TENANT, "gone")), "an edge created a stream that nobody reads"


async def test_without_a_worker_publishing_says_so_and_leaves_nothing_behind(redis: Redis, edge: EdgeBroker) -> None:
    with pytest.raises(NoWorker, match="start one with `pilotfish worker`"):
        await edge.publish(TARGET, "w1", job())
    assert await redis.keys() == []


# --- reading -------------------------------------------------------------------------------------------------


async def test_all_replies_come_over_one_blocking_connection(redis: Redis, edge: EdgeBroker) -> None:
    replies = edge.replies()
    first = asyncio.create_task(anext(replies))
    await wait_until(lambda: _readers(redis), "the reader to wait")
    for number in range(20):
        await say(redis, refusal(number))
    got = [await first] + [await anext(replies) for _ in range(19)]
    assert got == [refusal(number) for number in range(20)]
    waiting = asyncio.create_task(anext(replies))
    assert await wait_until(lambda: _readers(redis), "the reader to wait again") == 1
    waiting.cancel()


async def _readers(redis: Redis) -> int:
    return sum(client["cmd"].startswith("xread") and "b" in client["flags"] for client in await redis.client_list())


async def test_two_agents_of_one_name_both_hear_everything(redis: Redis, edge: EdgeBroker) -> None:
    twin = EdgeBroker(redis, TENANT, "edge1", "another-boot")
    await say(redis, refusal(3))
    assert [await anext(edge.replies()), await anext(twin.replies())] == [refusal(3)] * 2


async def test_a_reply_stream_that_ran_out_of_its_life_is_opened_again(redis: Redis, edge: EdgeBroker) -> None:
    replies = edge.replies()
    waiting = asyncio.create_task(anext(replies))
    await wait_until(lambda: _readers(redis), "the reader to wait")
    await redis.delete(keys.replies(TENANT, "edge1"))
    await say(redis, refusal(4))
    assert await asyncio.wait_for(waiting, 8) == refusal(4)
    assert 0 < await redis.pttl(keys.replies(TENANT, "edge1")) <= keys.REPLY_TTL_MS


async def test_what_cannot_be_read_is_told_and_the_rest_goes_on(redis: Redis, edge: EdgeBroker) -> None:
    await redis.xadd(keys.replies(TENANT, "edge1"), {keys.FIELD_MESSAGE: b"\xc1"})
    await say(redis, refusal(7))
    replies = edge.replies()
    assert isinstance(await anext(replies), InvalidMessage)
    assert await anext(replies) == refusal(7)


async def test_a_cursor_ahead_of_a_stream_that_began_again_starts_over(redis: Redis, edge: EdgeBroker) -> None:
    replies = edge.replies()
    await say(redis, refusal(1), "9999999999999-0")
    assert await anext(replies) == refusal(1)
    await redis.delete(keys.replies(TENANT, "edge1"))
    await say(redis, refusal(2))
    assert await asyncio.wait_for(anext(replies), 5) == refusal(2)


# --- prompts -------------------------------------------------------------------------------------------------


@pytest.fixture
async def agents(redis: Redis) -> tuple[EdgeBroker, EdgeBroker]:
    both = EdgeBroker(redis, TENANT, "edge1", "b"), EdgeBroker(redis, TENANT, "edge2", "b")
    for agent in both:
        await agent.open_prompts()
        await agent.beat({"running": "0"})
    return both


async def test_without_an_agent_a_prompt_is_refused_at_once(redis: Redis) -> None:
    with pytest.raises(NoAgent, match="start one with `pilotfish agent`"):
        await ShellBroker(redis, TENANT).submit(PROMPT)
    assert await redis.keys() == []


async def test_an_agent_that_takes_no_more_does_not_count(redis: Redis, agents: tuple[EdgeBroker, EdgeBroker]) -> None:
    for agent in agents:
        await agent.beat({"running": "1"}, taking=False)
    with pytest.raises(NoAgent):
        await ShellBroker(redis, TENANT).submit(PROMPT)


async def test_an_agent_at_rest_costs_little_and_what_it_owns_still_lives(redis: Redis) -> None:
    agent = EdgeBroker(redis, TENANT, "edge1", "b")
    await agent.open_prompts()
    await agent.beat({"running": "0"})
    await redis.config_resetstat()
    await agent.beat({"running": "0"})
    stats = await redis.info("commandstats")
    asked = {name.removeprefix("cmdstat_") for name in stats} - {"config", "config|resetstat"}
    assert asked == {"time", "zadd", "hset", "pexpire"}
    assert stats["cmdstat_pexpire"]["calls"] == 1

    await redis.flushall()  # what Redis forgot is given a life again
    await agent.open_prompts()
    await agent.beat({"running": "0"})
    await agent.beat({"running": "0"})
    lives = {key: await redis.pttl(key) for key in await redis.keys()}
    assert set(lives) == {
        keys.prompts(TENANT).encode(),
        keys.agents(TENANT).encode(),
        keys.agent_beat(TENANT, "edge1").encode(),
    }
    assert all(life > 0 for life in lives.values())


async def test_one_agent_takes_a_prompt_and_when_it_is_answered_it_is_gone(
    redis: Redis, agents: tuple[EdgeBroker, EdgeBroker]
) -> None:
    first, second = agents
    await ShellBroker(redis, TENANT).submit(PROMPT)
    (taken,) = await first.take_prompts(4)
    assert (taken.prompt, taken.deliveries) == (PROMPT, 1)
    assert await second.take_prompts(4) == []
    assert await first.keep_prompts([taken.entry_id]) == []
    await first.drop_prompt(taken.entry_id)
    assert await redis.xlen(keys.prompts(TENANT)) == 0


async def test_a_prompt_taken_over_is_not_stolen_back(
    redis: Redis, agents: tuple[EdgeBroker, EdgeBroker], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pilotfish.protocol.broker.PROMPT_LEASE_MS", 100)
    first, second = agents
    await ShellBroker(redis, TENANT).submit(PROMPT)
    (taken,) = await first.take_prompts(4)
    (again,) = await wait_until(lambda: second.take_prompts(4), "the second agent to take it over")
    assert (again.entry_id, again.deliveries) == (taken.entry_id, 2)
    assert await first.keep_prompts([taken.entry_id]) == [taken.entry_id]
    assert await second.keep_prompts([taken.entry_id]) == []


async def test_the_output_is_followed_to_its_last_word(redis: Redis, agents: tuple[EdgeBroker, EdgeBroker]) -> None:
    accepted = Accepted(request=REQUEST, agent="edge1", prompt_tokens=5, seed=0)
    await agents[0].say(REQUEST, accepted)
    shell = ShellBroker(redis, TENANT)
    assert [message async for message in shell.output(REQUEST, follow=False)] == [accepted]
    following = asyncio.create_task(_all(shell))
    await agents[0].say(REQUEST, DONE)
    assert await following == [accepted, DONE]


async def _all(shell: ShellBroker) -> list[Any]:
    return [message async for message in shell.output(REQUEST, follow=True)]


async def test_following_a_request_whose_agents_are_gone_ends_with_a_sentence(redis: Redis) -> None:
    with pytest.raises(NoAgent, match=f"request {REQUEST} waits"):
        await asyncio.wait_for(_all(ShellBroker(redis, TENANT)), 2)


async def test_a_request_is_withdrawn_before_anyone_takes_it(
    redis: Redis, agents: tuple[EdgeBroker, EdgeBroker]
) -> None:
    shell = ShellBroker(redis, TENANT)
    await shell.submit(PROMPT)
    assert not await agents[0].withdrawn(REQUEST)
    await shell.withdraw(REQUEST, DONE)
    assert await agents[0].withdrawn(REQUEST)


async def test_a_cancel_reaches_an_agent_that_never_had_a_reply(redis: Redis, edge: EdgeBroker) -> None:
    waiting = asyncio.create_task(anext(edge.replies()))
    cancel = CancelRequest(request=REQUEST)
    await ShellBroker(redis, TENANT).tell_agent("edge1", cancel)
    assert await asyncio.wait_for(waiting, 5) == cancel


async def test_an_agent_that_leaves_is_forgotten(redis: Redis, agents: tuple[EdgeBroker, EdgeBroker]) -> None:
    for agent in agents:
        await agent.leave()
    assert await redis.keys("pf:a:*") == []
    assert await redis.zcard(keys.agents(TENANT)) == 0


# --- what can be wrong, each with what to do -----------------------------------------------------------------


async def test_no_redis_is_one_sentence_without_the_password() -> None:
    url = "redis://user:secret@127.0.0.1:1/0"
    async with connect(url) as nobody:
        with pytest.raises(BrokerUnreachable, match="pilotfish up.*REDIS_URL") as caught:
            await ping(nobody, url)
    assert "secret" not in str(caught.value)
    assert "127.0.0.1:1" in str(caught.value)


async def test_a_wrong_password_is_named(redis: Redis, redis_url: str) -> None:
    _, _, at = redis_url.rpartition("@")
    async with connect(f"redis://:wrong@{at}") as stranger:
        with pytest.raises(BrokerRefused, match="Check the password") as caught:
            await ping(stranger, f"redis://:wrong@{at}")
        with pytest.raises(BrokerRefused):
            await fleet.find_target(stranger)
    assert "wrong@" not in str(caught.value)


@pytest.mark.parametrize("url", ["", "localhost:6379", "http://localhost", "redis://host:port/0"])
def test_what_is_no_url_is_named_with_the_form_of_one(url: str) -> None:
    with pytest.raises(BrokerUnreachable, match="redis://"):
        connect(url)


@pytest.mark.parametrize(
    ("url", "printed"),
    [
        ("redis://host:1/0", "redis://host:1/0"),
        ("redis://:pa:ss@host:1/0", "redis://:***@host:1/0"),
        ("rediss://me:p@ss@host/0", "rediss://me:***@host/0"),
        ("redis://u:[@host", "redis://u:***@host"),
    ],
)
def test_no_password_is_printed(url: str, printed: str) -> None:
    assert redacted(url) == printed


async def test_a_full_redis_is_named(redis: Redis, edge: EdgeBroker) -> None:
    await open_stream(redis)
    await redis.config_set("maxmemory", "1")
    try:
        with pytest.raises(BrokerRefused, match="out of memory: raise maxmemory"):
            await edge.publish(TARGET, "", job())
    finally:
        await redis.config_set("maxmemory", "0")


async def test_no_worker_is_named(redis: Redis) -> None:
    with pytest.raises(NoWorker, match="start one with `pilotfish worker`"):
        await fleet.find_target(redis)


@pytest.mark.parametrize("said", [0, 2], ids=["before anyone took it", "in the middle of its answer"])
async def test_a_request_that_redis_lost_is_not_followed_for_ever(redis: Redis, edge: EdgeBroker, said: int) -> None:
    """Its agent stops as soon as it knows, perhaps after a word into the new Redis: nobody will write the last one."""
    shell = ShellBroker(redis, TENANT)
    await edge.open_prompts()
    await edge.beat({"running": "0"})
    await shell.submit(PROMPT)
    following = asyncio.create_task(follow(shell))
    await wait_until(lambda: blocked(redis), "the shell to wait")
    assert not following.done()
    await redis.delete(keys.prompts(TENANT))
    for message in (ACCEPTED, WORD)[:said]:
        await edge.say(REQUEST, message)
    with pytest.raises(AnswerLost, match="submit it again"):
        await asyncio.wait_for(following, 3)


async def test_the_last_word_is_heard_though_the_prompt_is_gone_by_then(redis: Redis, edge: EdgeBroker) -> None:
    """However the follower's looks fall between the word and the drop."""
    shell = ShellBroker(redis, TENANT)
    await edge.open_prompts()
    await edge.beat({"running": "0"})
    await shell.submit(PROMPT)
    (taken,) = await edge.take_prompts(1)
    following = asyncio.create_task(follow(shell))
    await wait_until(lambda: blocked(redis), "the shell to wait")
    look = shell._kept

    async def last_word_first(*asked: Any) -> bytes:
        await edge.say(REQUEST, DONE)
        await edge.drop_prompt(taken.entry_id)
        return await look(*asked)

    shell._kept = last_word_first  # type: ignore[method-assign,assignment]
    assert await asyncio.wait_for(following, 3) == ["finished"]


async def follow(shell: ShellBroker) -> list[str]:
    """What was said of REQUEST, to its end."""
    return [message.type async for message in shell.output(REQUEST, follow=True)]


async def blocked(redis: Redis) -> bool:
    return bool((await redis.info("clients"))["blocked_clients"])
