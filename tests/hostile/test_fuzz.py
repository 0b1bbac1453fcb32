"""Bytes from a stranger, through the codec and a worker's handlers: typed refusals, flat memory, no more."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgpack
import pytest
from arq.connections import ArqRedis
from fuzzing import EXECUTIONS, SEED, complaints, fuzzed
from rigs import PROMPT, TARGET, draws, job

from mutations import Guided
from pilotfish.cloud_worker import functions, job_tasks, verify
from pilotfish.cloud_worker.arq_pool import arq_pool, unpack_job
from pilotfish.cloud_worker.engines.base import VerifyEvent, VerifyRequest
from pilotfish.cloud_worker.engines.fake import FakeVerifier
from pilotfish.cloud_worker.functions import FUNCTIONS
from pilotfish.cloud_worker.verify import Verification
from pilotfish.cloud_worker.worker import StreamWorker
from pilotfish.protocol import codec, history, quota, usage
from pilotfish.protocol import messages as m
from pilotfish.protocol.codec import decode, encode
from pilotfish.protocol.delivery import Delivery
from pilotfish.protocol.errors import InvalidMessage
from pilotfish.protocol.history import History
from pilotfish.protocol.usage import Usage

pytestmark = pytest.mark.slow
CONTEXT = 96
OTHER = "f" * 32

JOBS: list[m.Message] = [
    job(PROMPT, draws(PROMPT, 3), stop_ids=(2,)), job(PROMPT, (1, 2, 3), sampling=m.Sampling(temperature=0.7, seed=7)),
    job(PROMPT, continue_tokens=9), job((5,), (6,), session=OTHER, epoch=3, round=4),
    m.Cancel(agent="edge1", boot="b", session="0" * 32), m.Close(agent="edge1", boot="b", session="0" * 32),
]  # fmt: skip


# --- the codec -------------------------------------------------------------------------------------------------


def test_the_codec_raises_one_typed_error_and_nothing_else() -> None:
    kinds = [m.ToWorker, m.ToEdge, m.ToAgent, m.ToShell]
    text = m.Text(request=OTHER, ids=(1, 2), pieces=("a", "b"), origins=("local", "accepted"))
    seeds: list[m.Message] = [*JOBS, text, m.Prompt(request=OTHER, text="hello"), m.Refusal(code="stale", worker="w")]
    guided = Guided(SEED, [encode(one, padded=bool(i % 2)) for i, one in enumerate(seeds)], [codec, m])
    outcome: Counter[str] = Counter()

    def target(data: bytes) -> None:
        try:
            message = decode(data, kinds[0] if guided.rng.random() < 0.5 else guided.rng.choice(kinds))
        except InvalidMessage as error:
            outcome["refused"] += 1
            assert 0 < len(str(error)) <= 300
        else:
            outcome["read"] += 1
            assert decode(encode(message, padded=True), type(message)) == message

    fuzzed(guided, EXECUTIONS // 2, guided.mutated, target)
    assert min(outcome["refused"], outcome["read"]) > EXECUTIONS // 50, outcome


# --- a worker's handlers ---------------------------------------------------------------------------------------


class InstantEngine:
    """The fake engine, asked and stepped at once."""

    def __init__(self) -> None:
        self.verifier = FakeVerifier(context=CONTEXT)
        self.info = self.verifier.info

    async def stream(self, request: VerifyRequest) -> AsyncGenerator[VerifyEvent, None]:
        self.verifier.submit(request)
        done = False
        try:
            while not done:
                for event in self.verifier.step():
                    done = done or event.done
                    yield event
        finally:
            self.verifier.cancel(request.request_id)

    async def cancel(self, request_id: str) -> None:
        self.verifier.cancel(request_id)

    async def forget(self, session: str) -> None:
        """It has none."""


class Desk:
    """Stands for `Ingress`: hears what the worker says about one delivery."""

    worker, target = "w1", TARGET

    def __init__(self, redis: ArqRedis, age_ms: Callable[[], int]) -> None:
        self.redis = redis
        self.usage = Usage(redis, TARGET, self.worker, {})
        self.said: list[tuple[m.Message | None, bool]] = []
        self._age_ms = age_ms

    def age_ms(self, delivery: Delivery) -> int:
        return self._age_ms()

    @contextmanager
    def under_way(self, tenant: str, job: m.VerifyJob | m.ScoreJob) -> Iterator[None]:
        """As `Pickup` counts it, shares aside."""
        self.usage.begin(tenant, quota.rows(job), tokens := quota.tokens(job))
        yield
        self.usage.end(tenant, tokens)

    async def reply(self, delivery: Delivery, message: m.Message | None, *, last: bool = True, dead: str = "") -> None:
        if message is not None:
            assert decode(encode(message), m.ToEdge) == message
        self.said.append((message, last))

    async def start_over(self, stream: str) -> None:
        """Nothing to mend here."""

    def release(self, delivery: Delivery) -> None:
        raise AssertionError("a job was left without an answer")


def test_a_worker_answers_whatever_comes_once_and_stays_up() -> None:
    """On a loop of its own, so that one execution is one plain call."""
    guided = Guided(SEED, [encode(one) for one in JOBS], [codec, verify, job_tasks, functions, history, quota, usage])
    ages = [1, 1, 1, 1, -60_000, 60_000, 10**9]
    loop = asyncio.new_event_loop()
    pool = arq_pool("redis://127.0.0.1:1/0", "arq:fuzz")  # never connected
    desk = Desk(pool, lambda: guided.rng.choice(ages))
    try:
        running = loop.run_until_complete(_worker(pool, desk))
        verification: Verification = running.ctx["verification"]

        def target(data: bytes) -> None:
            desk.said.clear()
            tenant, tries = guided.rng.choice(["default", "acme"]), guided.rng.choice([1, 1, 1, 2, 4])
            delivery = Delivery("pf:x:jobs:default:any", "5-0", tenant, guided.rng.choice(["edge1", ""]), data, tries)
            loop.run_until_complete(running._run(delivery))
            assert [last for _, last in desk.said].count(True) == 1, desk.said
            assert desk.said[-1][1]
            assert not logged, logged
            assert all(len(known.ids) <= CONTEXT for known in verification.known.values())

        with complaints() as logged:
            fuzzed(guided, EXECUTIONS // 4, lambda: _signed(guided), target)
        assert verification.counts["verified"] > EXECUTIONS // 200, "inputs that are all refused early test little"
    finally:
        loop.run_until_complete(pool.aclose(close_connection_pool=True))
        loop.close()


async def _worker(pool: ArqRedis, desk: Any) -> StreamWorker:
    async def nothing() -> None:
        """No target to announce."""

    running = StreamWorker(
        FUNCTIONS, ingress=desk, describe=dict, announce=nothing, redis_pool=pool,
        job_serializer=msgpack.packb, job_deserializer=unpack_job,
    )  # fmt: skip
    running.ctx["verification"] = Verification(InstantEngine(), "w1", lambda tenant: 1)
    return running


def _signed(guided: Guided) -> bytes:
    """A mutated job, half of the time with the digest that fits it: whoever makes jobs up can hash."""
    data = guided.mutated()
    if guided.rng.random() < 0.5:
        return data
    try:
        wanted: Any = decode(data, m.ToWorker)
        ids = wanted.ids[:CONTEXT]
        digest = History(TARGET, wanted.sampling, ids).digest(len(ids))
        session = f"{guided.rng.randrange(2000):032x}"  # one session would soon have seen its last epoch
        fixed = {"ids": ids, "base": len(ids), "offset": 0, "digest": digest, "session": session}
        return encode(wanted.model_copy(update=fixed)) if ids else data
    except (InvalidMessage, AttributeError, ValueError):
        return data
