"""A worker that lies, floods or says nothing useful: an agent keeps its text, and every generation ends in time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from redis.asyncio import Redis
from rigs import PROMPT, TARGET, agent, draws, text_of, worker

from pilotfish.cloud_worker.engines.fake import VOCAB, FakeVerifier
from pilotfish.edge_agent.task import Task
from pilotfish.protocol import fleet, keys
from pilotfish.protocol.codec import decode
from pilotfish.protocol.delivery import Delivery
from pilotfish.protocol.errors import DeadlineExceeded, JobRefused
from pilotfish.protocol.ingress import Ingress
from pilotfish.protocol.messages import MAX_TOKEN_ID, MILLIS_MAX, Message, Refusal, ToWorker, Verdict, VerifyJob

pytestmark = pytest.mark.slow
Said = Iterator[Message]


def verdict(job: VerifyJob, said: list[int], **changes: Any) -> Verdict:
    about = {name: getattr(job, name) for name in ("boot", "session", "epoch", "round", "base", "digest")}
    return Verdict(**{**about, "draws": tuple(said), "worker": "rogue", **changes})


def refusal(job: VerifyJob, code: Any) -> Refusal:
    about = {name: getattr(job, name) for name in ("boot", "session", "epoch", "round")}
    return Refusal(code=code, worker="rogue", **about)


# --- what it says to a job -------------------------------------------------------------------------------------


def ids_out_of_range(job: VerifyJob) -> Said:
    yield verdict(job, [VOCAB])
    yield verdict(job, [MAX_TOKEN_ID])


def a_rewind(job: VerifyJob) -> Said:
    yield verdict(job, [1, 2, 3], base=1)
    yield verdict(job, [1, 2, 3], base=max(1, job.base - 3))


def a_leap_ahead(job: VerifyJob) -> Said:
    for far in range(1, 100):
        yield verdict(job, [1], base=job.base + far)


def need_prefix_for_ever(job: VerifyJob) -> Said:
    yield refusal(job, "need_prefix")


def try_again_for_ever(job: VerifyJob) -> Said:
    yield refusal(job, "overloaded")


def a_flood_of_refusals(job: VerifyJob) -> Said:
    while True:
        yield refusal(job, "overloaded")


def a_flood_of_what_is_stale(job: VerifyJob) -> Said:
    while True:
        yield verdict(job, [1], epoch=job.epoch + 1000)  # the next epoch's would be a plain lie, and apply


def other_digests(job: VerifyJob) -> Said:
    yield verdict(job, [1], digest=b"?" * 16)


def nothing(job: VerifyJob) -> Said:
    return iter(())


def chunks_that_never_end(job: VerifyJob) -> Said:
    right = draws(PROMPT, job.base - len(PROMPT) + 1)[-1]
    yield verdict(job, [right], last=False, engine_ms=MILLIS_MAX, rows=1 << 18)


UNHELPFUL = [ids_out_of_range, a_rewind, a_leap_ahead, need_prefix_for_ever, try_again_for_ever, a_flood_of_refusals,
             a_flood_of_what_is_stale, other_digests, nothing]  # fmt: skip


@asynccontextmanager
async def rogue(redis: Redis, says: Callable[[VerifyJob], Said]) -> AsyncIterator[None]:
    """A worker of the target, for as long as the block runs; it answers each job so, and acknowledges it."""
    ingress, engine = Ingress(redis, TARGET, "rogue"), FakeVerifier()
    vocabulary = fleet.Vocabulary(tuple(bytes([i]) for i in range(VOCAB)))
    await fleet.announce(redis, fleet.Target(TARGET, "fake", engine.info.context, 16, vocabulary))
    await ingress.open()

    async def beat() -> None:
        while True:
            await ingress.beat({"state": "serving"})
            await asyncio.sleep(keys.BEAT_EVERY_MS / 1000)

    async def serve() -> None:
        while True:
            taken = await ingress.pick_up(16, 100)
            tasks.extend(asyncio.create_task(answer(ingress, delivery, says)) for delivery in taken)

    await ingress.beat({"state": "serving"})
    tasks = [asyncio.create_task(beat()), asyncio.create_task(serve())]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await ingress.leave()


async def answer(ingress: Ingress, delivery: Delivery, says: Callable[[VerifyJob], Said]) -> None:
    wanted = decode(delivery.payload, ToWorker)
    if isinstance(wanted, VerifyJob):
        for message in says(wanted):
            await ingress.reply(delivery, message, last=False)
            await asyncio.sleep(0.002)
    await ingress.reply(delivery, None)


# --- what comes of it ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("says", UNHELPFUL, ids=lambda says: says.__name__)
async def test_who_may_go_on_alone_does_so_in_time(redis: Redis, redis_url: str, says: Any) -> None:
    async with rogue(redis, says), agent(redis_url, alpha=1.0, round_timeout_ms=150, resends=1) as running:
        since = time.monotonic()
        task = Task(PROMPT, max_tokens=12, on_cloud_loss="local", round_timeout_ms=150, resends=1, deadline_ms=8000)
        text, generation = await text_of(running, task)
    assert time.monotonic() - since < 8
    assert text == draws(PROMPT, 12), "a drafter that is always right wrote something else"
    assert generation.summary().degraded


@pytest.mark.parametrize("says", [a_flood_of_refusals, a_flood_of_what_is_stale, need_prefix_for_ever, nothing],
                         ids=lambda says: says.__name__)  # fmt: skip
async def test_who_must_wait_ends_at_the_deadline(redis: Redis, redis_url: str, says: Any) -> None:
    async with rogue(redis, says), agent(redis_url) as running:
        since = time.monotonic()
        with pytest.raises((DeadlineExceeded, JobRefused)):
            await text_of(running, Task(PROMPT, max_tokens=12, round_timeout_ms=100, deadline_ms=1500))
    assert 1 < time.monotonic() - since < 4


async def test_an_answer_that_never_says_its_last_word_still_moves_on(redis: Redis, redis_url: str) -> None:
    """Each such verdict is one right token: slow, but no hang, and its huge figures do not break the summary."""
    async with rogue(redis, chunks_that_never_end), agent(redis_url, alpha=1.0) as running:
        task = Task(PROMPT, max_tokens=5, round_timeout_ms=50, deadline_ms=10_000)
        text, generation = await text_of(running, task)
    assert text[:4] == draws(PROMPT, 4)
    assert generation.summary().cloud_ms == MILLIS_MAX


@pytest.mark.parametrize("says", [other_digests, try_again_for_ever, a_leap_ahead], ids=lambda says: says.__name__)
async def test_beside_an_honest_worker_the_text_is_the_honest_one(redis: Redis, redis_url: str, says: Any) -> None:
    async with worker(redis_url), rogue(redis, says), agent(redis_url) as running:
        task = Task(PROMPT, max_tokens=24, round_timeout_ms=150, resends=5, deadline_ms=20_000)
        text, _ = await text_of(running, task)
    assert text == draws(PROMPT, 24)
