"""One generation's drafting, told the time: what it does next and what it learns."""

from __future__ import annotations

from typing import Any

import pytest

from pilotfish.edge_agent.calibration import Labelled
from pilotfish.edge_agent.drafters.base import Draft
from pilotfish.edge_agent.plan import Plan
from pilotfish.edge_agent.policy import TRIALS, FixedDraft, Pace, StopRule
from pilotfish.edge_agent.session import Committed, Round
from pilotfish.protocol.messages import Verdict


def plan(window: int = 1) -> Plan:
    pace = Pace()
    return Plan(StopRule(pace, window), pace, lambda score: score)


def labels(*agreed: bool) -> list[Labelled]:
    return [Labelled(0.9, one) for one in agreed]


def verdict(number: int = 0, draws: tuple[int, ...] = (1,), **more: Any) -> Verdict:
    fields = {"row_ms": 0.5, "engine_ms": 6.0, "rows": 4, **more}
    return Verdict(
        boot="b", session="0" * 32, epoch=0, round=number, base=9, digest=bytes(16), draws=draws, worker="w", **fields
    )


def final(*ids: int) -> list[Committed]:
    return [Committed(token, "accepted") for token in ids]


def test_what_is_drafted_is_unsent_until_it_flies_and_is_labelled_when_it_lands() -> None:
    one = plan()
    one.drafted(Draft([1, 2, 3], [0.9, 0.8, 0.7], 3.0, 1))
    assert one.unsent(0) == [1, 2, 3]
    one.sent(Round(0, 9, (1, 2)), 1.0)
    assert one.unsent(2) == [3]
    one.answered(verdict(draws=(1, 2)), final(1, 2), labels(True, True), 1.02, idle=False)
    assert one.unsent(0) == [3]
    assert one.pace.right.amount == one.pace.right.weight == 2


def test_a_round_is_measured_without_the_prefill_it_carried() -> None:
    one = plan()
    one.begin(0.0)
    one.drafted(Draft([1, 2, 3], [0.9] * 3, 6.0, 1))
    one.sent(Round(0, 9, (1, 2, 3)), 0.006)
    one.answered(verdict(draws=(1, 2, 3, 4), rows=104, engine_ms=56.0), final(1, 2, 3, 4), [], 0.092, idle=True)
    pace = one.pace
    assert pace.token_ms == pytest.approx(2.0)
    assert pace.job.value(-1) == pytest.approx(4.0), "6 ms for the pass, of which 4 rows took 2"
    assert pace.trip.value(-1) == pytest.approx(30.0), "86 ms away, of which the engine took 56"
    assert pace.rate == pytest.approx(4 / 42), "92 ms, of which 100 rows of prefill took 50"


def test_a_long_prefill_on_the_device_is_no_measure_of_its_pace() -> None:
    one = plan()
    one.drafted(Draft([1, 2], [0.9] * 2, 4.0, 1))
    one.drafted(Draft([3], [0.9], 900.0, 400))
    assert one.pace.token_ms == pytest.approx(2.0)


def test_a_cycle_ends_where_nothing_is_in_flight() -> None:
    one = plan(window=4)
    one.begin(0.0)
    for number, at in enumerate((0.1, 0.2)):
        one.sent(Round(number, 9, (1,)), 0.0)
        one.answered(verdict(number, rows=2), final(1), [], at, idle=number == 1)
        assert one.pace.trials == TRIALS - number
    assert one.pace.rate == pytest.approx(2 / 200)


def test_time_spent_by_whoever_reads_the_tokens_is_not_counted() -> None:
    one = plan()
    one.begin(0.0)
    one.begin(5.0)
    one.sent(Round(0, 9, ()), 5.0)
    one.answered(verdict(rows=1), final(1), [], 5.1, idle=True)
    assert one.pace.rate == pytest.approx(1 / 100)


def test_a_continuation_teaches_what_the_cloud_needs_and_nothing_about_drafts() -> None:
    one = plan()
    one.begin(0.0)
    one.pace.ceded = 5
    one.sent(Round(0, 9, (), continues=4), 0.0)
    one.answered(verdict(draws=(1,), rows=1, last=False), final(1), [], 0.05, idle=False)
    one.answered(verdict(draws=(2, 3, 4, 5), seq=1, engine_ms=20.0), final(2, 3, 4, 5), [], 0.07, idle=True)
    assert (one.ceded, one.pace.ceded, one.pace.trials) == (5, 0, TRIALS)
    assert one.pace.step.value(-1) == pytest.approx(5.0)


def test_a_verdict_that_changes_nothing_teaches_nothing_about_speed() -> None:
    one = plan()
    one.answered(verdict(), [], [], 3.0, idle=True)
    assert one.pace.trials == TRIALS


def test_the_drafter_is_told_to_stop_on_its_own_thread_with_what_stands_before() -> None:
    one = Plan(FixedDraft(3), Pace(), lambda score: score)
    one.drafted(Draft([1], [0.9], 1.0, 1))
    proceed = one.proceed(flying=0)
    assert [proceed(7, 0.9), proceed(7, 0.9)] == [True, False]
    assert one.unsent(0) == [1], "what is drafted counts when the drafter returns it"
