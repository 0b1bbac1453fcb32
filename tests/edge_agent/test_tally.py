"""What a generation cost, added up without running one."""

from __future__ import annotations

from pilotfish.edge_agent.audit import Audit
from pilotfish.edge_agent.ledger import Ledger
from pilotfish.edge_agent.plan import Plan, policy_for
from pilotfish.edge_agent.policy import Pace
from pilotfish.edge_agent.session import Committed, Limits, Session
from pilotfish.edge_agent.tally import Tally
from pilotfish.edge_agent.task import Task
from pilotfish.protocol import metrics
from pilotfish.protocol.messages import MILLIS_MAX, Sampling, Scores, Verdict

PROMPT = (1, 2, 3)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def tally(audit: bool = False) -> tuple[Tally, Clock, Session]:
    clock, ledger, pace = Clock(), Ledger(len(PROMPT)), Pace()
    session = Session.start("0" * 32, "t", Sampling(seed=7), PROMPT, Limits(9), 256)
    plan = Plan(policy_for(Task(PROMPT), pace), pace, lambda score: score)
    audited = Audit(ledger, 0.5, scored=4, disagreed=1) if audit else None
    return Tally(session, ledger, plan, audited, clock), clock, session


def verdict(rows: int, engine_ms: float) -> Verdict:
    return Verdict(
        boot="b", session="0" * 32, epoch=0, round=0, base=3, digest=bytes(16), draws=(4,), worker="w", rows=rows,
        steps=1, engine_ms=engine_ms,
    )  # fmt: skip


def test_times_run_from_the_beginning_and_the_first_token_is_the_first() -> None:
    one, clock, _ = tally()
    clock.now += 5
    one.begin()
    clock.now += 0.25
    one.committed([Committed(4, "accepted")])
    clock.now += 0.5
    one.committed([Committed(5, "corrected"), Committed(6, "accepted")])
    summary = one.summary()
    assert (summary.first_token_ms, summary.total_ms) == (250.0, 750.0)
    assert (summary.accepted, summary.corrected, summary.local, summary.continued) == (2, 1, 0, 0)


def test_what_answers_took_adds_up_and_no_strangers_number_breaks_the_sum() -> None:
    one, _, _ = tally()
    one.drafted(2.0)
    one.drafted(1.5)
    one.computed(verdict(5, 6.0))
    one.computed(
        Scores(boot="b", session="0" * 32, round=1, base=3, digest=bytes(16), draws=(4,), worker="w", rows=2, steps=1)
    )
    summary = one.summary()
    assert (summary.draft_ms, summary.cloud_ms, summary.cloud_rows, summary.cloud_steps) == (3.5, 6.0, 7, 2)
    for _ in range(2):
        one.computed(verdict(1, MILLIS_MAX))
    assert one.summary().cloud_ms == MILLIS_MAX


def test_what_others_count_is_read_where_they_count_it() -> None:
    one, _, session = tally(audit=True)
    session.publish((4, 5))
    session.unsent = 3
    summary = one.summary()
    assert (summary.prompt_tokens, summary.rounds, summary.drafted, summary.seed) == (3, 1, 2, 7)
    assert (summary.never_sent, summary.audited, summary.audit_disagreed) == (3, 4, 1)


def test_the_end_goes_into_the_metrics_once() -> None:
    def ended() -> tuple[float, float]:
        read = metrics.REGISTRY.get_sample_value
        return (
            read("pilotfish_generations_total", {"outcome": "stop"}) or 0.0,
            read("pilotfish_verdicts_total", {"fate": "stale"}) or 0.0,
        )

    one, _, session = tally()
    before = ended()
    session.counts.stale = 2
    one.end("stop")
    assert [now - then for now, then in zip(ended(), before, strict=True)] == [1, 2]
