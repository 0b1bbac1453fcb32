"""Bytes from a stranger, through what an agent does with a verdict, with an audit's scores, with a submitted prompt."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from typing import Any

import pytest
from fuzzing import EXECUTIONS, SEED, complaints, fuzzed
from rigs import PROMPT, TARGET, draws

from mutations import Guided
from pilotfish.cloud_worker.engines.fake import VOCAB, fake_target
from pilotfish.edge_agent import (
    ahead,
    audit,
    audit_jobs,
    calibration,
    ledger,
    outbox,
    plan,
    policy,
    proposer,
    retry,
    submissions,
    tally,
)  # fmt: skip
from pilotfish.edge_agent import (
    generation as generation_module,
)
from pilotfish.edge_agent import (
    session as session_module,
)
from pilotfish.edge_agent.agent import Agent
from pilotfish.edge_agent.audit import Audit
from pilotfish.edge_agent.audit_jobs import AuditJobs
from pilotfish.edge_agent.drafters.fake import FakeDrafter
from pilotfish.edge_agent.generation import Generation
from pilotfish.edge_agent.submissions import Submissions
from pilotfish.edge_agent.task import Task
from pilotfish.edge_agent.tokenizer import ByteTokenizer
from pilotfish.protocol import codec, history, keys
from pilotfish.protocol import messages as m
from pilotfish.protocol.broker import Taken, read_entry
from pilotfish.protocol.codec import decode, encode
from pilotfish.protocol.errors import InvalidMessage
from pilotfish.protocol.fleet import Target, Vocabulary

pytestmark = pytest.mark.slow
CONTEXT = 96
OTHER = "f" * 32
KNOWN = Target(TARGET, "fake", CONTEXT, 16, Vocabulary(tuple(bytes([i]) for i in range(VOCAB))))
HEARS = [
    codec,
    session_module,
    generation_module,
    history,
    retry,
    outbox,
    tally,
    ledger,
    plan,
    policy,
    ahead,
    calibration,
]


# --- verdicts and refusals ---------------------------------------------------------------------------------------


def generation() -> Generation:
    """One with rounds in flight, as `_send_more` leaves it."""
    started = Generation(Task(PROMPT, max_tokens=48, window=3), None, None, KNOWN, VOCAB)  # type: ignore[arg-type]
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
    guided = Guided(SEED, seeds, HEARS)
    fuzzed(guided, EXECUTIONS // 4, lambda: guided.mutated(hearing.honest()), hearing.hear)
    assert hearing.committed > EXECUTIONS // 100, "messages that are all dropped test little"
    assert hearing.finished > EXECUTIONS // 2000


# --- an audit's scores -----------------------------------------------------------------------------------------


class Audited:
    """A text that a gate committed, while its audit is under way."""

    agent, boot, worker = "edge1", "b", ""  # it is its own outbox

    def __init__(self, rng: random.Random) -> None:
        self.running = Generation(Task(PROMPT, max_tokens=48), None, None, KNOWN, VOCAB)  # type: ignore[arg-type]
        text = [token if rng.random() < 0.8 else rng.randrange(VOCAB) for token in draws(PROMPT, 24)]
        self.running.ledger.drafted(len(PROMPT), text, [0.5] * len(text))
        self.running.ledger.committed(self.running.session.commit_local(text))
        self.audit, heard = Audit(self.running.ledger, 0.5), self.running.tally.computed
        out: Any = self
        self.jobs = AuditJobs(self.audit, self.running.session, out, self.running.inbox, 8, heard)

    async def publish(self, job: m.ScoreJob) -> bytes:
        return b"1-0"

    @property
    def span(self) -> tuple[int, int]:
        """What is to be scored next; (0, 0) when there is nothing left."""
        return next(iter(self.running.ledger.unscored(8)), (0, 0))

    def honest(self, tries: int = 0) -> m.Scores:
        """What a worker says of that; `tries` of the same span came before."""
        session, (start, end) = self.running.session, self.span
        ids = session.history.ids
        return m.Scores(
            boot="b", session=session.id, round=session._next_round + tries, base=start, worker="w",
            digest=session.history.digest(start), rows=9, steps=1,
            draws=tuple(fake_target(ids[:at], at, session.sampling, VOCAB) for at in range(start, end)),
        )  # fmt: skip

    async def hear(self, message: Any) -> None:
        """The message, and behind it what a peer says."""
        for said in (message, self.honest(), self.honest(1)):
            self.running.inbox.put_nowait(said)
        async with asyncio.timeout(5):
            await self.jobs._score(*self.span)
        while not self.running.inbox.empty():
            self.running.inbox.get_nowait()


def test_an_audit_takes_in_whatever_comes_and_changes_no_text() -> None:
    rng, loop, scored = random.Random(SEED), asyncio.new_event_loop(), 0
    audited = Audited(rng)
    seeds = [encode(audited.honest()), encode(m.Refusal(code="need_prefix", worker="w"))]
    guided = Guided(SEED, seeds, [codec, audit_jobs, audit, ledger, tally])

    def fresh() -> bytes:
        nonlocal audited
        if audited.span == (0, 0):
            audited = Audited(rng)
        honest = audited.honest()
        about = {"boot": "b", "session": honest.session, "round": honest.round, "worker": "w"}
        refused = m.Refusal(code=rng.choice(["need_prefix", "stale", "overloaded"]), **about)
        return guided.mutated(encode(honest if rng.random() < 0.7 else refused))

    def target(data: bytes) -> None:
        nonlocal scored
        try:
            message: Any = decode(data, m.ToEdge)
        except InvalidMessage:
            return
        if isinstance(message, m.CancelRequest):
            return
        before, had = audited.running.session.history.ids[:], audited.audit.scored
        loop.run_until_complete(audited.hear(message))
        assert audited.running.session.history.ids == before, "an audit changed the text"
        assert audited.audit.disagreed <= audited.audit.scored <= audited.running.ledger.local
        assert all(label.local for label in audited.running.ledger.labels())
        encode(m.Finished(request=OTHER, reason="stop", summary=audited.running.summary()))
        scored += audited.audit.scored > had

    try:
        fuzzed(guided, EXECUTIONS // 20, fresh, target)
    finally:
        loop.close()
    assert scored > EXECUTIONS // 200, "answers that are all dropped test little"


# --- submitted prompts -----------------------------------------------------------------------------------------


class Board:
    """Stands for `EdgeBroker`: hears what becomes of a prompt."""

    agent, boot = "edge1", "b"

    def __init__(self) -> None:
        self.said: list[m.Message] = []
        self.dropped = 0

    async def withdrawn(self, request: str) -> bool:
        return False

    async def say(self, request: str, message: m.Message) -> None:
        assert decode(encode(message), m.ToShell) == message
        self.said.append(message)

    async def drop_prompt(self, entry_id: bytes) -> None:
        self.dropped += 1


def test_an_agent_answers_whatever_is_submitted_with_one_last_word() -> None:
    prompts = [
        m.Prompt(request=OTHER, text="hello", raw=True, max_tokens=9),
        m.Prompt(request=OTHER, text="once", raw=True, mode="gated", max_tokens=20, on_cloud_loss="local"),
        m.Prompt(request=OTHER, text="x" * 90, max_tokens=40, deadline_ms=1, sampling=m.Sampling(temperature=0.7)),
    ]
    guided = Guided(SEED, [encode(one) for one in prompts], [codec, submissions, generation_module, proposer, tally])
    loop, board, ends = asyncio.new_event_loop(), Board(), Counter[str]()
    agent = Agent(FakeDrafter(fake_target, vocab_size=VOCAB, context=CONTEXT), ByteTokenizer(), ())
    stream: Any = board
    serving = Submissions(agent, stream)

    def target(data: bytes) -> None:
        board.said.clear()
        board.dropped = 0
        fields = {keys.FIELD_MESSAGE.encode(): data}
        taken = Taken(b"1-0", read_entry(fields, m.Prompt), guided.rng.choice([1, 1, 2, keys.DELIVERIES_MAX + 1]))
        loop.run_until_complete(serving._serve(taken))
        assert board.dropped == 1
        assert not agent.generations
        if isinstance(taken.prompt, InvalidMessage):
            assert not board.said
            return
        lasts = [isinstance(one, m.Finished | m.Failed) for one in board.said]
        assert lasts.index(True) == len(lasts) - 1, board.said
        ends[board.said[-1].type] += 1  # type: ignore[attr-defined]

    try:
        with complaints() as logged:
            fuzzed(guided, EXECUTIONS // 20, guided.mutated, target)
        assert not logged, logged
    finally:
        loop.run_until_complete(agent.stop())
        loop.close()
    assert min(ends["finished"], ends["failed"]) > EXECUTIONS // 2000, ends
