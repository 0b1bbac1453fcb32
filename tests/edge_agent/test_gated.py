"""Gated mode against a made-up cloud: what is committed locally, what is verified, audited, and learnt."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rigs import PROMPT, TARGET, draws

from pilotfish.cloud_worker.engines.base import VerifyRequest
from pilotfish.cloud_worker.engines.fake import FakeVerifier, fake_target
from pilotfish.edge_agent.calibration import COLD, Labelled
from pilotfish.edge_agent.drafters.base import Draft
from pilotfish.edge_agent.drafters.fake import FakeDrafter
from pilotfish.edge_agent.gate import upper_bound
from pilotfish.edge_agent.generation import Generation
from pilotfish.edge_agent.learned import Store
from pilotfish.edge_agent.learning import Learned, Learner, Lesson
from pilotfish.edge_agent.ledger import Ledger
from pilotfish.edge_agent.session import Committed
from pilotfish.edge_agent.task import Task
from pilotfish.protocol.errors import BrokerUnreachable
from pilotfish.protocol.fleet import Target, Vocabulary
from pilotfish.protocol.messages import Close, Message, Refusal, Sampling, ScoreJob, Scores, Verdict, VerifyJob

FLEET = Target(TARGET, "fake", 4096, 16, Vocabulary(tuple(bytes([value]) for value in range(256))))


@dataclass
class Cloud:
    """A broker double with the fake engine behind it."""

    away: bool = False
    scoring: bool = True
    agent: str = "edge1"
    boot: str = "boot1"
    patience: float = 0.12
    asked: list[VerifyJob | ScoreJob] = field(default_factory=list)
    notes: list[Message] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    generation: Generation | None = None

    @property
    def jobs(self) -> list[VerifyJob]:
        return [job for job in self.asked if isinstance(job, VerifyJob)]

    @property
    def audits(self) -> list[ScoreJob]:
        return [job for job in self.asked if isinstance(job, ScoreJob)]

    async def publish(self, target: str, worker: str, message: Message) -> bytes:
        if self.away:
            raise BrokerUnreachable("away")
        if isinstance(message, VerifyJob | ScoreJob):
            self.asked.append(message)
            assert self.generation
            for reply in self.serve(message):
                self.generation.inbox.put_nowait(reply)
        else:
            self.notes.append(message)
        return b"1-0"

    def serve(self, job: VerifyJob | ScoreJob) -> list[Verdict | Scores | Refusal]:
        about: dict[str, Any] = {name: getattr(job, name) for name in ("boot", "session", "round")}
        if job.offset > len(self.ids):
            return [Refusal(code="need_prefix", worker="w1", epoch=job.epoch, **about)]
        self.ids = [*self.ids[: job.offset], *job.ids]
        scored, engine = isinstance(job, ScoreJob), FakeVerifier()
        engine.submit(VerifyRequest("r", "s", self.ids, list(job.draft), job.sampling, score=scored))
        (event,) = engine.step()
        about |= {"base": job.base, "digest": job.digest, "draws": tuple(event.draws), "worker": "w1", "rows": 1}
        if scored:
            self.ids += job.draft
            return [Scores(**about)] if self.scoring else []
        return [Verdict(**about, epoch=job.epoch, accepted=event.accepted)]

    async def live_workers(self, target: str) -> int:
        return 0 if self.away else 1


def experienced() -> Learned:
    """As far as anyone has seen, tokens that score 0.5 are right, and the others wrong."""
    learned = Learned()
    learned.evidence.observe([Labelled(at / 1000, at >= 500) for at in range(1000)])
    assert learned.gate(0.3).open
    return learned


def gated(
    cloud: Cloud,
    alpha: float,
    *,
    spread: float = 0.0,
    learned: Learned | None = None,
    share: float | None = None,
    **task: Any,
) -> Generation:
    """A generation with a fake draft; `spread` varies its confidence from token to token."""
    drafter = FakeDrafter(fake_target, alpha=alpha, spread=spread)

    async def draft(session: str, ids: Sequence[int], count: int, sampling: Sampling, *rest: Any) -> Draft:
        await asyncio.sleep(0)
        return drafter.draft(session, ids, count, sampling, *rest)

    fields = {"max_tokens": 24, "mode": "gated", "on_cloud_loss": "local", "max_disagreement": 0.3, **task}
    opened = Task(PROMPT, **fields)
    cloud.generation = Generation(opened, draft, cloud, FLEET, 256, learned or experienced(), share)  # type: ignore[arg-type]
    return cloud.generation


async def text(generation: Generation) -> list[int]:
    return [token.id async for tokens in generation.run() for token in tokens]


async def test_a_sure_draft_is_committed_and_never_leaves() -> None:
    cloud = Cloud()
    generation = gated(cloud, 1.0)
    assert await text(generation) == draws(PROMPT, 24)
    summary = generation.summary()
    assert (summary.local, summary.unverified, summary.never_sent, summary.rounds) == (24, 24, 24, 0)
    assert not cloud.jobs
    assert not cloud.notes
    assert not generation.lesson().whole  # nobody knows whether it was right


async def test_an_unsure_draft_is_verified_and_the_text_is_the_targets() -> None:
    cloud = Cloud()
    generation = gated(cloud, 0.1)
    assert await text(generation) == draws(PROMPT, 24)
    assert generation.summary().unverified == 0
    assert len(generation.lesson().labels) > 10
    assert not generation.lesson().whole  # verified because it was hard: no fair sample


async def test_what_is_committed_locally_is_the_prefix_of_what_is_verified_next() -> None:
    cloud = Cloud()
    generation = gated(cloud, 0.55, spread=1.0, max_tokens=60)
    ids = await text(generation)
    summary = generation.summary()
    assert 0 < summary.unverified < 60
    assert summary.tokens == 60 == summary.local + summary.accepted + summary.corrected + summary.continued
    assert [*PROMPT, *ids][: cloud.jobs[-1].base] == cloud.ids


async def test_an_audit_labels_every_local_token_and_changes_none() -> None:
    cloud = Cloud()
    expected = await text(gated(Cloud(), 0.55, spread=1.0, max_tokens=60))
    generation = gated(cloud, 0.55, spread=1.0, share=0.25, max_tokens=60)
    assert await text(generation) == expected
    summary, lesson, whole = generation.summary(), generation.lesson(), [*PROMPT, *expected]
    assert summary.audited == summary.unverified > 0
    local = {place: one for place, one in generation.ledger.proposals.items() if one.local}
    assert all(one.agreed == (fake_target(whole[:at], at, Sampling()) == whole[at]) for at, one in local.items())
    assert summary.audit_disagreed == sum(not one.agreed for one in local.values()) > 0
    assert (lesson.whole, lesson.weight, lesson.budget) == (True, 4.0, 0.3)
    assert all(len(job.draft) <= 16 for job in cloud.audits)
    assert isinstance(cloud.notes[-1], Close)


async def test_an_audit_of_a_request_that_never_left_sends_all_of_it() -> None:
    cloud = Cloud()
    generation = gated(cloud, 1.0, share=1.0, max_tokens=40)
    assert await text(generation) == draws(PROMPT, 40)
    assert [(job.offset, len(job.draft)) for job in cloud.audits] == [(0, 16), (32, 16), (48, 8)]
    assert (generation.summary().audited, generation.summary().audit_disagreed) == (40, 0)
    assert generation.summary().never_sent == 0


async def test_a_worker_that_forgot_the_session_gets_all_of_it_once_more() -> None:
    cloud = Cloud()
    generation = gated(cloud, 1.0, share=1.0, max_tokens=40)
    keep = cloud.serve

    def forgetful(job: Any) -> Any:
        if job.offset == 32:
            cloud.ids.clear()
        return keep(job)

    cloud.serve = forgetful  # type: ignore[method-assign]
    await text(generation)
    assert [job.offset for job in cloud.audits] == [0, 32, 0, 48]
    assert generation.summary().audited == 40


@pytest.mark.parametrize("how", ["silent", "away"])
async def test_an_audit_nobody_answers_costs_labels_and_no_more(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pilotfish.edge_agent.audit_jobs.AUDIT_SECONDS", 0.05)
    generation = gated(Cloud(scoring=False, away=how == "away"), 1.0, share=1.0)
    assert await text(generation) == draws(PROMPT, 24)
    assert generation.summary().audited == 0
    assert not generation.lesson().whole


async def test_a_shut_gate_is_exact_mode_and_evidence() -> None:
    cloud = Cloud()
    generation = gated(cloud, 0.6, learned=Learned(), share=1.0)
    assert await text(generation) == draws(PROMPT, 24)
    assert generation.lesson().whole
    assert generation.lesson().budget is None
    assert not cloud.audits


async def test_a_local_only_request_has_no_broker() -> None:
    cloud = Cloud()
    generation = gated(cloud, 0.2, share=1.0, privacy="local_only")
    await text(generation)
    assert (cloud.jobs, cloud.audits, cloud.notes) == ([], [], [])
    assert generation.summary().never_sent == generation.summary().local == 24


async def test_a_stop_id_that_is_sure_ends_the_text() -> None:
    want = draws(PROMPT, 30)
    generation = gated(Cloud(), 1.0, stop_ids=frozenset({want[6]}), max_tokens=30)
    assert await text(generation) == want[: want.index(want[6]) + 1]
    assert generation.finish == "stop"


async def test_without_the_cloud_it_goes_on_and_learns_nothing_of_that() -> None:
    generation = gated(Cloud(away=True), 0.1, resends=0, round_timeout_ms=10)
    assert len(await text(generation)) == 24
    assert generation.summary().degraded
    assert generation.summary().unverified == 0
    assert generation.lesson().labels == []


# --- the ledger ----------------------------------------------------------------------------------------------


def test_a_correction_takes_back_what_was_drafted_behind_it() -> None:
    ledger = Ledger(10)
    ledger.drafted(10, [1, 2, 3], [0.9, 0.8, 0.7])
    ledger.committed([Committed(1, "accepted"), Committed(9, "corrected"), Committed(3, "continued")])
    assert ledger.labels() == [Labelled(0.9, True), Labelled(0.8, False)]
    assert ledger.complete


def test_the_token_after_the_draft_labels_what_was_drafted_there() -> None:
    ledger = Ledger(10)
    ledger.drafted(10, [1, 2], [0.3, 0.9])
    ledger.committed([Committed(1, "accepted"), Committed(2, "continued")])
    assert ledger.labels() == [Labelled(0.3, True), Labelled(0.9, True)]


@given(st.lists(st.booleans(), max_size=60), st.integers(1, 16))
@settings(max_examples=60)
def test_spans_cover_every_local_token_and_no_more_than_they_must(local: list[bool], longest: int) -> None:
    ledger = Ledger(5)
    ledger.drafted(5, list(range(len(local))), [0.5] * len(local))
    ledger.committed([Committed(at, "local" if mine else "accepted") for at, mine in enumerate(local)])
    spans = ledger.unscored(longest)
    covered = {place for start, end in spans for place in range(start, end)}
    assert {5 + at for at, mine in enumerate(local) if mine} <= covered
    assert all(0 < end - start <= longest for start, end in spans)
    assert len(covered) == sum(end - start for start, end in spans)
    for start, end in spans:
        ledger.scored(start, list(range(start - 5, end - 5)))
    assert ledger.complete


# --- learning ------------------------------------------------------------------------------------------------


def lesson(labels: list[Labelled], **about: Any) -> Lesson:
    return Lesson(labels, **{"whole": True, **about})


def test_only_whole_requests_are_evidence() -> None:
    learned = Learned()
    learned.learn(lesson([Labelled(0.9, True)] * 50, whole=False))
    assert learned.evidence.tokens == 0
    learned.learn(lesson([Labelled(0.9, True)] * 50))
    assert learned.evidence.tokens == 50


def test_verified_labels_are_learnt_as_they_come_and_audited_ones_once_at_the_end() -> None:
    learned = Learned()
    seen = [Labelled(0.9, True)] * 50
    learned.judged(seen)
    assert learned.calibration.acceptance(0.9) > 0.9
    learned.learn(lesson([*seen, Labelled(0.9, False, local=True)], weight=20.0))
    assert learned.calibration.weight.sum() == 70


async def test_the_map_follows_within_one_answer() -> None:
    generation = gated(Cloud(), 1.0, learned=Learned(), mode="exact", max_tokens=60, window=1, drafting="fixed")
    cold = generation.learned.calibration.acceptance(1.0)
    await text(generation)
    assert cold == COLD
    assert generation.learned.calibration.acceptance(1.0) > 0.9


def test_enough_evidence_opens_the_gate_and_a_bad_audit_shuts_it() -> None:
    learned = Learned()
    gate = learned.gate(0.02)
    for _ in range(20):
        learned.learn(lesson([Labelled(0.99, True)] * 20))
    assert gate.open
    bad = lesson([Labelled(0.99, False, local=True)], budget=0.02, weight=20.0)
    audits = 1
    while not learned.learn(bad):
        audits += 1
    assert audits < 10
    assert not gate.open
    assert learned.evidence.tokens == 0
    assert not gate.watch.alarmed
    for _ in range(20):
        learned.learn(lesson([Labelled(0.99, True)] * 20))
    assert gate.open


def test_what_was_learnt_is_kept_and_what_was_forgotten_is_not(tmp_path: Any) -> None:
    store = Store(tmp_path)
    learner = Learner("d", "t", "margin", store)
    learner.learn(Sampling(), lesson([Labelled(0.99, True)] * 300))
    learner.save()
    learner.save()
    again = Learner("d", "t", "margin", store)
    assert again.of(Sampling()).evidence.tokens == 300
    assert again.of(Sampling(temperature=0.5)).evidence.tokens == 0
    again.of(Sampling()).forget()
    again.save()
    assert Learner("d", "t", "margin", store).of(Sampling()).evidence.tokens == 0


def test_a_broken_file_stops_nothing(tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
    learner = Learner("d", "t", "margin", Store(tmp_path))
    learner.learn(Sampling(), lesson([Labelled(0.9, True)]))
    learner.save()
    (path,) = tmp_path.glob("*.json")
    path.write_text("{")
    assert Learner("d", "t", "margin", Store(tmp_path)).of(Sampling()).evidence.tokens == 0
    assert "learning starts anew" in caplog.text


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans(), st.booleans()), max_size=200), st.sampled_from([0.01, 0.1]))
@settings(max_examples=60, deadline=None)
def test_the_budget_is_never_silently_passed(tokens: list[tuple[float, bool, bool]], budget: float) -> None:
    """After every lesson an open gate has evidence for its budget, and audits beyond it have shut it."""
    learned = Learned()
    gate = learned.gate(budget)
    for score, agreed, audited in tokens:
        label = Labelled(score, agreed, local=audited)
        alarmed = learned.learn(lesson([label] * 20, budget=budget if audited else None))
        assert not (alarmed and gate.open)
        if gate.open:
            wrong = learned.evidence.wrong_from(gate.threshold)
            assert upper_bound(wrong, learned.evidence.tokens) <= budget + 1e-9
