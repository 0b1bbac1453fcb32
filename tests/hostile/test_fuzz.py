"""Bytes from a stranger, through the codec, a worker's handlers and an agent's: typed refusals, flat memory, no more.

Coverage-guided: `mutations.Guided` goes on from what reached new lines. FUZZ_EXECUTIONS says how many in all (`make
fuzz`: a million), FUZZ_SEED which; both are printed with a failure.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgpack
import pytest
from arq.connections import ArqRedis
from rigs import PROMPT, TARGET, draws, job

from mutations import Guided
from pilotfish.cloud_worker import functions, job_tasks, verify
from pilotfish.cloud_worker.arq_pool import arq_pool, unpack_job
from pilotfish.cloud_worker.engines.base import VerifyEvent, VerifyRequest
from pilotfish.cloud_worker.engines.fake import VOCAB, FakeVerifier
from pilotfish.cloud_worker.functions import FUNCTIONS
from pilotfish.cloud_worker.verify import Verification
from pilotfish.cloud_worker.worker import StreamWorker
from pilotfish.edge_agent import generation as generation_module
from pilotfish.edge_agent import session as session_module
from pilotfish.edge_agent.generation import Generation
from pilotfish.edge_agent.task import Task
from pilotfish.protocol import codec, history, quota
from pilotfish.protocol import messages as m
from pilotfish.protocol.codec import decode, encode
from pilotfish.protocol.delivery import Delivery
from pilotfish.protocol.errors import InvalidMessage
from pilotfish.protocol.fleet import Target, Vocabulary
from pilotfish.protocol.history import History
from pilotfish.protocol.usage import Usage

pytestmark = pytest.mark.slow
log = logging.getLogger("fuzz")
EXECUTIONS = int(os.environ.get("FUZZ_EXECUTIONS", "50000"))
SEED = int(os.environ.get("FUZZ_SEED") or random.SystemRandom().randrange(2**32))
GROWTH_MB = 16.0
CONTEXT = 96
OTHER = "f" * 32

JOBS: list[m.Message] = [
    job(PROMPT, draws(PROMPT, 3), stop_ids=(2,)), job(PROMPT, (1, 2, 3), sampling=m.Sampling(temperature=0.7, seed=7)),
    job(PROMPT, continue_tokens=9), job((5,), (6,), session=OTHER, epoch=3, round=4),
    m.Cancel(agent="edge1", boot="b", session="0" * 32), m.Close(agent="edge1", boot="b", session="0" * 32),
]  # fmt: skip


def rss_mb() -> float:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def fuzzed(guided: Guided, count: int, next_input: Callable[[], bytes], target: Callable[[bytes], None]) -> None:
    """`count` executions; memory after the first fifth is what it is at the end."""
    settled = 0.0
    for number in range(count):
        if number == count // 5:
            settled = rss_mb()
        data = next_input()
        try:
            guided.execute(target, data)
        except BaseException as error:
            error.add_note(f"FUZZ_SEED={SEED} FUZZ_EXECUTIONS={EXECUTIONS}, execution {number}: {data.hex()[:4000]}")
            raise
    grown = rss_mb() - settled
    assert grown < GROWTH_MB, f"{grown:.1f} MB more after {count} executions (FUZZ_SEED={SEED})"
    reached = (count, len(guided.arcs), len(guided.corpus), grown)
    log.info("%d executions, %d arcs reached, corpus of %d, %+.1f MB", *reached)


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


class Complaints(logging.Handler):
    """Errors that the worker logged: exceptions nobody meant."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.records: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(self.format(record))


def test_a_worker_answers_whatever_comes_once_and_stays_up() -> None:
    """On a loop of its own, so that one execution is one plain call."""
    guided = Guided(SEED, [encode(one) for one in JOBS], [codec, verify, job_tasks, functions, history])
    ages = [1, 1, 1, 1, -60_000, 60_000, 10**9]
    complaints = Complaints()
    logging.getLogger("pilotfish").addHandler(complaints)
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
            assert not complaints.records, complaints.records
            assert all(len(known.ids) <= CONTEXT for known in verification.known.values())

        fuzzed(guided, EXECUTIONS // 4, lambda: _signed(guided), target)
        assert verification.counts["verified"] > EXECUTIONS // 200, "inputs that are all refused early test little"
    finally:
        logging.getLogger("pilotfish").removeHandler(complaints)
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


# --- an agent's handlers ---------------------------------------------------------------------------------------


def generation() -> Generation:
    """One with rounds in flight, as `_send_more` leaves it."""
    target = Target(TARGET, "fake", CONTEXT, 16, Vocabulary(tuple(bytes([i]) for i in range(VOCAB))))
    started = Generation(Task(PROMPT, max_tokens=48, window=3), None, None, target, VOCAB)  # type: ignore[arg-type]
    fly(started, random.Random(0))
    return started


def fly(running: Generation, rng: random.Random) -> None:
    while running.session.room() and rng.random() < 0.9:
        right = draws(running.session.assumed(), min(3, running.session.room()))
        running.session.publish([token if rng.random() < 0.8 else rng.randrange(VOCAB) for token in right])


def honest(running: Generation, rng: random.Random) -> bytes:
    """What an honest worker would say about a round in flight, or a refusal of it."""
    session = running.session
    flying = rng.choice(session.flight)
    about = {"boot": "b", "session": session.id, "epoch": session.epoch, "round": flying.number, "worker": "w1"}
    if rng.random() < 0.2:
        code = rng.choice(["stale", "need_prefix", "overloaded", "engine_failed"])
        return encode(m.Refusal(code=code, **about))
    prefix = session._between(0, flying.base)
    said = draws(prefix, len(flying.draft) + 1)
    accepted = next((i for i, token in enumerate(flying.draft) if token != said[i]), len(flying.draft))
    digest = session._digest_at(flying.base)
    verdict = m.Verdict(base=flying.base, digest=digest, draws=tuple(said[: accepted + 1]), accepted=accepted, **about)
    return encode(verdict)


class Hearing:
    """A generation that hears messages; a new one begins when it is over."""

    def __init__(self) -> None:
        self.rng = random.Random(SEED)
        self.running = generation()
        self.committed = self.finished = 0

    def hear(self, data: bytes) -> None:
        """One message in; what must hold whatever it says."""
        session = self.running.session
        before, epoch = session.history.ids[:], session.epoch
        try:
            message = decode(data, m.ToEdge)
        except InvalidMessage:
            return
        if isinstance(message, m.CancelRequest):
            return
        fresh = self.running._apply(message)
        self.committed += len(fresh)
        assert session.history.ids[: len(before)] == before, "committed text was rewound"
        assert session.history.ids[len(before) :].tolist() == [token.id for token in fresh]
        assert max(session.history.ids) < VOCAB, "an id out of range"
        assert session.epoch >= epoch
        assert max(len(session.flight), len(session._waiting)) <= 3
        encode(m.Finished(request=OTHER, reason="stop", summary=self.running.summary()))

    def honest(self) -> bytes:
        """The message that fits now; opens rounds where none are in flight."""
        if self.running.session.finish or self.running._fatal:
            self.finished += 1
            self.running = generation()
        self.running._rejoin.clear()  # `_step` would have sent them
        while not self.running.session.flight:
            fly(self.running, self.rng)
        return honest(self.running, self.rng)


def test_an_agent_takes_in_whatever_comes_and_its_text_only_grows() -> None:
    hearing = Hearing()
    seeds = [hearing.honest(), encode(m.Refusal(code="stale", worker="w")), encode(m.CancelRequest(request=OTHER))]
    guided = Guided(SEED, seeds, [codec, session_module, generation_module, history])
    fuzzed(guided, EXECUTIONS // 4, lambda: guided.mutated(hearing.honest()), hearing.hear)
    assert hearing.committed > EXECUTIONS // 100, "messages that are all dropped test little"
    assert hearing.finished > EXECUTIONS // 2000
