"""An agent and the shells that submit prompts to it."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import pytest
from redis.asyncio import Redis
from rigs import TARGET, agent, draws, text_of, worker

from helpers import wait_until
from pilotfish.edge_agent.agent import INBOX_MAX, Agent
from pilotfish.edge_agent.drafters.base import Draft
from pilotfish.edge_agent.drafters.fake import FakeDrafter
from pilotfish.edge_agent.session import Committed
from pilotfish.edge_agent.submissions import unhurried
from pilotfish.edge_agent.task import Task
from pilotfish.edge_agent.tokenizer import ByteTokenizer
from pilotfish.protocol import keys
from pilotfish.protocol.codec import encode
from pilotfish.protocol.errors import EmptyPrompt, NoAgent, PilotfishError, PromptTooLong
from pilotfish.protocol.messages import Accepted, CancelRequest, Failed, Finished, Prompt, Refusal, Summary, Text
from pilotfish.protocol.shell import ShellBroker

TENANT = keys.DEFAULT_TENANT
REQUEST = "a" * 32


def prompt(**changes: Any) -> Prompt:
    return Prompt(
        **{"request": REQUEST, "text": "once upon a time", "max_tokens": 30, "deadline_ms": 20_000, **changes}
    )


async def said(redis: Redis, request: str = REQUEST) -> list[Any]:
    return [message async for message in ShellBroker(redis, TENANT).output(request, follow=True)]


def ids_of(messages: list[Any]) -> list[int]:
    """A reader's view: what it has is skipped."""
    ids: list[int] = []
    for message in messages:
        if isinstance(message, Text):
            ids[message.start :] = message.ids
    return ids


WANT = draws(tuple(b"once upon a time"), 30)


async def queue_is_empty(redis: Redis) -> bool:
    return not await redis.xlen(keys.prompts(TENANT))


async def test_a_submitted_prompt_is_accepted_written_and_finished(redis: Redis, redis_url: str) -> None:
    async with worker(redis_url), agent(redis_url, prompts=True):
        await ShellBroker(redis, TENANT).submit(prompt())
        first, *text, last = await said(redis)
        assert first == Accepted(request=REQUEST, agent="edge1", prompt_tokens=16, seed=0)
        assert all(isinstance(message, Text) for message in text)
        assert ids_of(text) == WANT
        assert isinstance(last, Finished)
        assert (last.reason, last.summary.tokens, last.summary.degraded) == ("length", 30, False)
        await wait_until(lambda: queue_is_empty(redis), "the prompt to leave the queue")


async def test_several_prompts_are_served_at_once(redis: Redis, redis_url: str) -> None:
    requests = [f"{n:032x}" for n in range(5)]
    async with worker(redis_url), agent(redis_url, prompts=True, max_requests=3):
        for request in requests:
            await ShellBroker(redis, TENANT).submit(prompt(request=request))
        outputs = await asyncio.gather(*(said(redis, request) for request in requests))
    assert [ids_of(output) for output in outputs] == [WANT] * 5


@pytest.mark.parametrize(
    ("wish", "code", "sentence"),
    [
        ({"text": "  "}, "empty_prompt", "the prompt is empty"),
        ({"max_tokens": 5000}, "too_long", "exceed the context of 4096"),
    ],
)
async def test_a_prompt_that_cannot_be_served_fails_with_the_reason(
    redis: Redis, redis_url: str, wish: dict[str, Any], code: str, sentence: str
) -> None:
    async with worker(redis_url), agent(redis_url, prompts=True):
        await ShellBroker(redis, TENANT).submit(prompt(**wish))
        (failed,) = await said(redis)
        assert isinstance(failed, Failed)
        assert (failed.code, sentence in failed.sentence) == (code, True)
        await wait_until(lambda: queue_is_empty(redis), "the prompt to leave the queue")


async def test_a_cloud_that_went_away_is_told_at_the_deadline(redis: Redis, redis_url: str) -> None:
    async with worker(redis_url):
        pass
    await redis.zadd(keys.workers(TARGET), {"w1": 2**53})
    async with agent(redis_url, prompts=True, round_timeout_ms=200):
        await redis.delete(*[name async for name in redis.scan_iter("pf:*:jobs:*")])
        await ShellBroker(redis, TENANT).submit(prompt(deadline_ms=900))
        messages = await said(redis)
        assert (messages[-1].type, messages[-1].code) == ("failed", "deadline")
        assert "no worker serves" in messages[-1].sentence


async def test_a_fault_of_ours_fails_one_prompt_and_not_the_agent(
    redis: Redis, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with worker(redis_url), agent(redis_url, prompts=True) as running:
        monkeypatch.setattr(running, "task", lambda *_: 1 / 0)
        await ShellBroker(redis, TENANT).submit(prompt())
        (failed,) = await said(redis)
        assert (failed.code, "ZeroDivisionError" in failed.sentence) == ("internal", True)
        monkeypatch.undo()
        await ShellBroker(redis, TENANT).submit(prompt(request="b" * 32))
        assert ids_of(await said(redis, "b" * 32)) == WANT


async def test_a_running_request_is_cancelled(redis: Redis, redis_url: str) -> None:
    shell = ShellBroker(redis, TENANT)
    async with worker(redis_url, model="step_ms=20"), agent(redis_url, prompts=True) as running:
        await shell.submit(prompt(max_tokens=3000))
        reading = asyncio.create_task(said(redis))
        await wait_until(lambda: running.generations, "the generation")
        await shell.tell_agent("edge1", CancelRequest(request=REQUEST))
        messages = await asyncio.wait_for(reading, 10)
        assert messages[-1].reason == "cancelled"
        await wait_until(lambda: not running.generations, "the generation to be forgotten")


async def test_a_request_withdrawn_in_time_is_never_begun(redis: Redis, redis_url: str) -> None:
    shell = ShellBroker(redis, TENANT)
    await redis.zadd(keys.agents(TENANT), {"soon": 2**53})
    await redis.xadd(keys.prompts(TENANT), {keys.FIELD_MESSAGE: encode(prompt())})
    await shell.withdraw(REQUEST, Finished(request=REQUEST, reason="cancelled", summary=Summary()))
    async with worker(redis_url), agent(redis_url, prompts=True):
        await wait_until(lambda: queue_is_empty(redis), "the prompt to leave the queue")
        assert [message.type for message in await said(redis)] == ["finished"]


async def test_what_is_no_prompt_leaves_the_queue(redis: Redis, redis_url: str) -> None:
    await redis.xadd(keys.prompts(TENANT), {keys.FIELD_MESSAGE: b"\xc1"})
    async with worker(redis_url), agent(redis_url, prompts=True):
        await wait_until(lambda: queue_is_empty(redis), "it to leave the queue")


async def test_a_prompt_that_kills_its_agents_is_given_up(redis: Redis, redis_url: str) -> None:
    stream = keys.prompts(TENANT)
    await redis.xgroup_create(stream, keys.GROUP_AGENTS, id="0", mkstream=True)
    entry = await redis.xadd(stream, {keys.FIELD_MESSAGE: encode(prompt())})
    await redis.xreadgroup(keys.GROUP_AGENTS, "ghost", {stream: ">"})
    await redis.xclaim(stream, keys.GROUP_AGENTS, "ghost", 0, [entry], idle=60_000, retrycount=keys.DELIVERIES_MAX)
    async with worker(redis_url), agent(redis_url, prompts=True):
        (failed,) = await said(redis)
        assert "3 agents took the prompt and none finished it" in failed.sentence
        await wait_until(lambda: queue_is_empty(redis), "the prompt to leave the queue")


AGENT_CODE = """
import asyncio, sys
sys.path.insert(0, sys.argv[2])
from rigs import agent
async def main():
    async with agent(sys.argv[1], "doomed", prompts=True):
        print("ready", flush=True)
        await asyncio.sleep(60)
asyncio.run(main())
"""


@pytest.mark.slow
async def test_an_agent_that_dies_mid_prompt_leaves_it_to_another_with_the_same_text(
    redis: Redis, redis_url: str
) -> None:
    tests = os.path.dirname(os.path.dirname(__file__))
    async with worker(redis_url, model="step_ms=30"):
        doomed = await asyncio.create_subprocess_exec(
            sys.executable, "-c", AGENT_CODE, redis_url, tests, stdout=asyncio.subprocess.PIPE
        )
        assert doomed.stdout
        assert await doomed.stdout.readline() == b"ready\n"
        await ShellBroker(redis, TENANT).submit(prompt(max_tokens=100))
        await wait_until(lambda: _spoke(redis), "the first words")
        os.kill(doomed.pid, signal.SIGKILL)
        await doomed.wait()
        async with agent(redis_url, "heir", prompts=True):
            messages = await asyncio.wait_for(said(redis), 14)
    assert [message.agent for message in messages if isinstance(message, Accepted)] == ["doomed", "heir"]
    assert ids_of(messages) == draws(tuple(b"once upon a time"), 100)


async def _spoke(redis: Redis) -> bool:
    return bool(await redis.xlen(keys.output(TENANT, REQUEST)) > 2)


async def test_with_the_last_agent_gone_a_reader_is_told_within_seconds(redis: Redis, redis_url: str) -> None:
    async with worker(redis_url):
        async with agent(redis_url, prompts=True):
            pass
        with pytest.raises(NoAgent, match="pilotfish agent"):
            await ShellBroker(redis, TENANT).submit(prompt())
        with pytest.raises(NoAgent, match="pilotfish agent"):
            await asyncio.wait_for(said(redis), 2)


@pytest.mark.slow
async def test_a_draining_agent_finishes_what_it_has_and_takes_no_more(redis: Redis, redis_url: str) -> None:
    shell = ShellBroker(redis, TENANT)
    async with worker(redis_url, model="step_ms=40"), agent(redis_url, prompts=True) as running:
        await shell.submit(prompt(max_tokens=150))
        await wait_until(lambda: running.generations, "the generation")
        await shell.submit(prompt(request="b" * 32))
        await wait_until(lambda: len(running.generations) == 2, "both")
        drained = asyncio.create_task(running.drain(10))
        await wait_until(lambda: _deaf(shell), "shells to be refused")
        await drained
        assert (await said(redis))[-1].reason == "length"
        assert not running.generations


async def _deaf(shell: ShellBroker) -> bool:
    try:
        await shell.submit(prompt(request="c" * 32, deadline_ms=1))
    except NoAgent:
        return True
    return False


async def test_an_agent_that_slept_through_its_lease_lets_go(redis: Redis, redis_url: str) -> None:
    async with worker(redis_url, model="step_ms=40"), agent(redis_url, prompts=True) as running:
        await ShellBroker(redis, TENANT).submit(prompt(max_tokens=3000))
        await wait_until(lambda: running.generations, "the generation")
        stream = keys.prompts(TENANT)
        (pending,) = await redis.xpending_range(stream, keys.GROUP_AGENTS, "-", "+", 1)
        await redis.xclaim(stream, keys.GROUP_AGENTS, "other", 0, [pending["message_id"]])
        await wait_until(lambda: not running.generations, "it to let go")
        (pending,) = await redis.xpending_range(stream, keys.GROUP_AGENTS, "-", "+", 1)
        assert pending["consumer"] == b"other"


@pytest.mark.parametrize(
    ("text", "max_tokens", "kind"), [("", 1, EmptyPrompt), (" \n", 1, EmptyPrompt), ("x" * 4000, 100, PromptTooLong)]
)
async def test_prompts_are_measured_before_anything_else(
    redis_url: str, text: str, max_tokens: int, kind: type[PilotfishError]
) -> None:
    async with worker(redis_url), agent(redis_url) as running:
        assert isinstance(running, Agent)
        with pytest.raises(kind):
            await running.encode(text, chat=False, max_tokens=max_tokens)


async def test_a_generation_does_not_wait_for_its_reader_and_loses_nothing() -> None:
    released = asyncio.Event()

    async def run() -> AsyncGenerator[list[Committed], None]:
        for token in range(5):
            yield [Committed(token, "accepted")]
            await asyncio.sleep(0)
        released.set()
        raise PilotfishError("in the end")

    reading = unhurried(run())
    first = await anext(reading)
    await asyncio.wait_for(released.wait(), 5)
    rest = await anext(reading)
    assert [[token.id for token in tokens] for tokens in (first, rest)] == [[0], [1, 2, 3, 4]]
    with pytest.raises(PilotfishError, match="in the end"):
        await anext(reading)


async def test_a_reader_that_leaves_ends_the_generation() -> None:
    ended = asyncio.Event()

    async def run() -> AsyncGenerator[list[Committed], None]:
        try:
            while True:
                yield [Committed(1, "accepted")]
                await asyncio.sleep(0)
        finally:
            ended.set()

    reading = unhurried(run())
    await anext(reading)
    await reading.aclose()
    assert ended.is_set()


async def test_a_long_prompt_is_read_in_turns_with_the_drafts_of_others() -> None:
    """`calls` are those of the drafter's one thread: the short generation's drafts come between the long one's rows."""
    calls: list[tuple[str, int]] = []

    class Slow(FakeDrafter):
        def prefill(self, session: str, ids: Sequence[int], rows: int) -> bool:
            calls.append(("prefill", len(ids)))
            time.sleep(0.002)
            return sum(what == "prefill" for what, _ in calls) * rows >= len(ids) - 1

        def draft(self, session: str, ids: Sequence[int], *how: Any, **more: Any) -> Draft:
            calls.append(("draft", len(ids)))
            return super().draft(session, ids, *how, **more)

    running = Agent(Slow(lambda ids, at, _: 7), ByteTokenizer(), ())
    long, short = (Task((1,) * length, "edge_only", max_tokens=8, draft_tokens=1) for length in (3000, 5))
    await asyncio.gather(text_of(running, long), text_of(running, short))
    await running.stop()
    reading = [index for index, call in enumerate(calls) if call[0] == "prefill"]
    between = [call for call in calls[reading[0] : reading[-1]] if call[0] == "draft"]
    assert len(reading) == 11
    assert len(between) >= 7, "nobody waits for a whole prompt"
    assert {length for what, length in calls if what == "prefill"} == {3000}, "it is read once"


async def test_a_worker_gone_wild_fills_no_agents_memory(redis: Redis, redis_url: str) -> None:
    async with worker(redis_url), agent(redis_url) as running:
        generation = running.open(Task((1, 2, 3)))
        broker = running.broker
        assert broker
        about = {"boot": broker.boot, "session": generation.session.id, "worker": "w"}
        flood = encode(Refusal(code="overloaded", **about))
        last = encode(CancelRequest(request=REQUEST))
        heard: list[str] = []
        assert running._submissions
        running._submissions.cancel = heard.append  # type: ignore[method-assign, assignment]
        pipe = redis.pipeline(transaction=False)
        for message in [flood] * (4 * INBOX_MAX) + [last]:
            pipe.xadd(keys.replies(TENANT, broker.agent), {"m": message})
        await pipe.execute()
        await wait_until(lambda: heard, "the last of them to be heard")
        assert generation.inbox.qsize() == INBOX_MAX
        running.close(generation)
