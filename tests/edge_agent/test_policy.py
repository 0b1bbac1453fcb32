"""The stop rule, the batches of a pipeline, and when drafting gives way: numbers in, decisions out."""

from __future__ import annotations

import random
from itertools import accumulate
from operator import mul

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pilotfish.edge_agent.calibration import Labelled
from pilotfish.edge_agent.policy import STRETCH, STRETCH_MAX, TRIALS, FixedDraft, Pace, Ratio, StopRule

CHANCES = st.lists(st.floats(0, 1), max_size=20)


def pace(*, token_ms: float = 5.0, trip_ms: float = 20.0, rate: float = 0.05, row_ms: float = 0.5) -> Pace:
    """An agent that has measured this."""
    measured = Pace()
    for _ in range(TRIALS):
        measured.drafted(4, 4 * token_ms)
        measured.verified(5, 4.0 + 5 * row_ms, trip_ms, row_ms)
        measured.judged([Labelled(0.9, agreed=True)] * 9 + [Labelled(0.9, agreed=False)])
        measured.cycle(10, 10 / rate)
    return measured


def length(rule: StopRule, chance: float) -> int:
    """Tokens drafted if each has this chance."""
    batch: list[float] = []
    while len(batch) < 200 and rule.goes_on([], batch):
        batch.append(chance)
    return len(batch)


# --- the stop rule -------------------------------------------------------------------------------------------


def test_drafting_stops_where_the_next_token_costs_more_than_it_brings() -> None:
    measured = pace()
    batch = [0.9] * length(StopRule(measured), 0.9)
    worth = [chance * measured.hope for chance in (1.0, *accumulate(batch, mul))]
    limit = measured.rate * (measured.token_ms + measured.row_ms)
    assert all(value >= limit for value in worth[:-1])
    assert worth[-1] < limit


@given(CHANCES, st.floats(0, 1))
def test_once_it_stops_no_further_token_makes_it_go_on(batch: list[float], chance: float) -> None:
    rule = StopRule(pace())
    assert rule.goes_on([], batch) or not rule.goes_on([], [*batch, chance])


def test_drafts_lengthen_as_the_rate_falls_and_shorten_as_tokens_cost_more() -> None:
    by_rate = [length(StopRule(pace(rate=rate)), 0.9) for rate in (0.15, 0.05, 0.02, 0.01)]
    assert by_rate == sorted(by_rate)
    assert by_rate[0] < by_rate[-1]
    assert length(StopRule(pace(token_ms=5)), 0.9) > length(StopRule(pace(token_ms=15)), 0.9)
    assert length(StopRule(pace(row_ms=0.1)), 0.9) > length(StopRule(pace(row_ms=9)), 0.9)


def test_before_anything_is_measured_a_draft_goes_on_while_it_is_more_likely_right_than_not() -> None:
    rule = StopRule(Pace())
    assert rule.goes_on([], [0.8, 0.7])
    assert not rule.goes_on([], [0.8, 0.6])


def test_where_a_draft_cannot_pay_there_is_none_and_it_is_tried_again_once_it_could() -> None:
    measured = pace(token_ms=15, rate=0.17)
    assert length(StopRule(measured), 0.99) == 0
    for _ in range(40):  # rounds without a draft, over a longer way
        measured.cycle(1, 100.0)
    assert length(StopRule(measured), 0.99) > 0


def test_an_acceptance_that_was_not_tried_for_long_is_thought_well_of() -> None:
    measured = Pace()
    for _ in range(50):
        measured.judged([Labelled(0.9, agreed=False)])
    assert measured.hope < 0.05
    for _ in range(1500):
        measured.judged([])
    assert measured.hope > 0.5


@pytest.mark.parametrize("trip_ms", [1.0, 30.0, 100.0])
@pytest.mark.parametrize("start", [1e-4, 0.5])
def test_the_rate_it_measures_leads_to_the_best_length_from_wherever_it_starts(trip_ms: float, start: float) -> None:
    """Dinkelbach's iteration, played: each token is right with chance 0.9, a round costs K * 5.5 + trip + 4 ms."""
    measured, dice = pace(trip_ms=trip_ms, rate=start), random.Random(7)

    def play(k: int) -> tuple[int, float]:
        right = next((at for at in range(k) if dice.random() > 0.9), k)
        return right + 1, 5.5 * k + trip_ms + 4

    lengths = []
    for _ in range(400):
        lengths.append(min(64, length(StopRule(measured), 0.9)))
        measured.cycle(*play(lengths[-1]))
    best = max(range(65), key=lambda k: sum(0.9**n for n in range(k + 1)) / (5.5 * k + trip_ms + 4))
    settled = lengths[200:]
    assert abs(sum(settled) / len(settled) - best) <= 1.5


# --- pipelining ----------------------------------------------------------------------------------------------


def test_with_one_round_at_a_time_a_batch_is_never_due_before_drafting_stops() -> None:
    assert not StopRule(pace(), window=1).due([], [0.1] * 50)


@given(CHANCES, CHANCES)
def test_a_batch_that_is_due_stays_due_as_it_grows(batch: list[float], more: list[float]) -> None:
    rule = StopRule(pace(), window=4)
    assert rule.due([], [*batch, *more]) or not rule.due([], batch)


def test_unsure_batches_leave_early_and_sure_ones_wait_for_company() -> None:
    rule = StopRule(pace(trip_ms=0.0), window=8)
    sizes = [next(n for n in range(1, 99) if rule.due([], [chance] * n)) for chance in (0.3, 0.9, 0.99)]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1]


def test_the_window_lasts_until_the_first_verdict_can_be_back() -> None:
    measured = pace(token_ms=1.0, trip_ms=100.0)
    rule = StopRule(measured, window=4)
    size = next(n for n in range(1, 200) if rule.due([], [0.5] * n))
    assert 4 * size * measured.token_ms >= 100


def test_while_a_verdict_is_away_only_the_row_has_a_price() -> None:
    measured = pace(token_ms=50.0, row_ms=0.0, rate=0.1)
    assert not StopRule(measured, window=8).goes_on([], [])
    assert StopRule(measured, window=8).goes_on([0.5], [])
    assert not StopRule(measured, window=1).goes_on([0.5], [])


# --- drafting, or the cloud by itself --------------------------------------------------------------------------


def slow(rate: float) -> Pace:
    """Drafting at this rate; the cloud would need 4.5 ms a token and 20 ms to come back."""
    return pace(rate=rate)


def test_the_cloud_takes_over_where_it_measures_faster_and_only_then() -> None:
    assert slow(0.5).cedes(500) == 0
    assert slow(0.01).cedes(500) == STRETCH
    assert slow(0.01).cedes(7) == 7
    assert slow(0.01).cedes(1) == 0, "a single token is what a round brings anyway"


def test_drafting_is_measured_before_it_is_given_up() -> None:
    fresh = Pace()
    fresh.verified(2, 1.0, 500.0, 0.1)
    for _ in range(TRIALS - 1):
        fresh.cycle(1, 10_000)
        assert fresh.cedes(100) == 0
    fresh.cycle(1, 10_000)
    assert fresh.cedes(100)


def test_stretches_double_while_drafting_stays_slower_and_begin_anew_once_it_is_not() -> None:
    measured, stretches = slow(0.01), []
    for _ in range(9):
        stretches.append(measured.cedes(10_000))
        measured.wrote(stretches[-1])
        assert measured.cedes(10_000) == 0, "first it is tried again"
        for _ in range(TRIALS):
            measured.cycle(1, 100)
    assert stretches == [min(STRETCH_MAX, STRETCH * 2**n) for n in range(9)]
    for _ in range(60):
        measured.cycle(10, 10)
    assert measured.cedes(10_000) == 0
    assert measured.stretch == STRETCH


def test_what_the_cloud_needs_by_itself_is_measured_once_it_wrote() -> None:
    measured = slow(0.01)
    guessed = measured.alone_rate(100)
    for _ in range(20):
        measured.continued(10, 10 * 400.0)
    assert measured.alone_rate(100) < guessed / 10
    assert measured.cedes(500) == 0


# --- the rest ------------------------------------------------------------------------------------------------


def test_a_fixed_draft_asks_nobody() -> None:
    rule = FixedDraft(3)
    assert [rule.goes_on([], [0.0] * n) for n in range(4)] == [True, True, True, False]
    assert [rule.due([], [1.0] * n) for n in range(4)] == [False, False, False, True]


@given(st.lists(st.tuples(st.floats(0, 9), st.floats(0.1, 9)), min_size=1, max_size=30))
def test_a_ratio_lies_between_the_smallest_and_the_largest_it_saw(pairs: list[tuple[float, float]]) -> None:
    ratio = Ratio(5)
    for amount, weight in pairs:
        ratio.add(amount, weight)
    seen = [amount / weight for amount, weight in pairs]
    assert min(seen) - 1e-9 <= ratio.value(-1) <= max(seen) + 1e-9


def test_a_drafter_that_takes_no_time_divides_by_nothing() -> None:
    pace = Pace()
    pace.drafted(4, 0.0)
    assert pace.rate > 0
    assert StopRule(pace).goes_on([], [0.5])
