from __future__ import annotations

from math import inf, log

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pilotfish.edge_agent.calibration import BINS, Labelled, bin_of
from pilotfish.edge_agent.gate import (
    CONFIDENCE,
    Evidence,
    Gate,
    Watch,
    bound_from,
    budget_for,
    expect,
    log_wealth,
    threshold,
    upper_bound,
    wilson,
)

BUDGETS = st.sampled_from([0.005, 0.01, 0.02, 0.05])
SCORES = st.floats(0, 1)


def evidence(*groups: tuple[float, int, int]) -> Evidence:
    """Groups of (score, tokens, wrong), as twenty requests."""
    found = Evidence()
    for score, tokens, wrong in groups:
        found.seen[bin_of(score)] += tokens
        found.wrong[bin_of(score)] += wrong
    found.requests[:] = 20
    return found


GOOD = evidence((0.99, 2000, 2), (0.8, 1000, 20), (0.3, 1000, 400))


# --- the bound -----------------------------------------------------------------------------------------------


def test_the_rule_of_three() -> None:
    """Without an error in n tokens, the rate is below about 3 / n at 95 %; an anytime bound pays a little more."""
    assert 3 / 1000 < upper_bound(0, 1000) < 6 / 1000
    assert upper_bound(0, 0) == 1


@given(st.integers(0, 300), st.integers(1, 20_000))
def test_the_bound_lies_above_what_was_seen(wrong: int, tokens: int) -> None:
    bound = upper_bound(wrong, tokens)
    assert min(1.0, wrong / tokens) <= bound <= 1
    assert bound <= upper_bound(wrong + 1, tokens)
    assert bound == 1 or log_wealth(wrong, tokens, bound) == pytest.approx(-log(1 - CONFIDENCE), abs=1e-3)


def test_the_bound_is_not_loose() -> None:
    assert upper_bound(100, 10_000) < 0.0135


@pytest.mark.parametrize("rate", [0.005, 0.02])
def test_at_any_time_the_bound_is_rarely_wrong(rate: float) -> None:
    """Ville: over a whole path, the wealth against the truth passes 20 on at most 5 % of the paths."""
    rng = np.random.default_rng(8)
    passed = 0
    for _ in range(400):
        wrong = np.cumsum(rng.uniform(size=4000) < rate)
        looks = np.arange(50, 4000, 50)
        passed += any(log_wealth(int(wrong[n - 1]), int(n), rate) >= log(20) for n in looks)
    assert passed / 400 <= 0.05


# --- the threshold -------------------------------------------------------------------------------------------


@given(BUDGETS, st.lists(st.tuples(SCORES, st.integers(0, 400), st.floats(0, 1)), max_size=12))
def test_an_open_gate_has_evidence_for_its_budget(budget: float, groups: list[tuple[float, int, float]]) -> None:
    found = evidence(*[(score, tokens, int(tokens * share)) for score, tokens, share in groups])
    at = threshold(found, budget)
    if at < BINS:
        assert upper_bound(found.wrong_from(at), found.tokens) <= budget + 1e-9
    if at > 0:
        assert found.tokens == 0 or upper_bound(found.wrong_from(at - 1), found.tokens) > budget - 1e-9


def test_errors_that_come_in_clusters_take_more_evidence() -> None:
    """Ten requests of a hundred hold all the errors: other requests will hold more, or fewer."""
    even, clustered = Evidence(), Evidence()
    for number in range(100):
        even.observe([Labelled(0.9, at > 0) for at in range(100)])
        clustered.observe([Labelled(0.9, number % 10 > 0 or at > 9) for at in range(100)])
    assert even.tokens == clustered.tokens
    assert even.wrong_from(0) == clustered.wrong_from(0) == 100
    assert even.dispersion(0) == 1
    assert clustered.dispersion(0) == pytest.approx(9)
    assert bound_from(even, 0) < 0.014 < bound_from(clustered, 0)


def test_without_evidence_it_is_shut() -> None:
    gate = Gate(Evidence(), 0.02)
    assert not gate.open
    assert gate.split([1.0, 1.0]) == (0, 2)
    assert not Gate(GOOD, 0.0).open


def test_a_larger_budget_commits_more() -> None:
    shares = [expect(GOOD, budget).unverified for budget in (0.003, 0.01, 0.2)]
    assert shares == [0.5, 0.75, 1.0]


@given(st.lists(SCORES, max_size=16))
def test_it_commits_sure_tokens_in_front_and_has_the_unsure_run_verified(scores: list[float]) -> None:
    gate = Gate(GOOD, 0.01)
    commit, verify = gate.split(scores)
    assert all(gate.sure(score) for score in scores[:commit])
    assert not any(gate.sure(score) for score in scores[commit : commit + verify])
    assert all(gate.sure(score) for score in scores[commit + verify :][:1])
    assert (commit + verify > 0) == bool(scores)


# --- the watch -----------------------------------------------------------------------------------------------


def stream(rate: float, tokens: int, seed: int) -> list[Labelled]:
    wrong = np.random.default_rng(seed).uniform(size=tokens) < rate
    return [Labelled(0.9, not bad, local=True) for bad in wrong]


@pytest.mark.parametrize("budget", [0.005, 0.02])
def test_the_watch_sees_three_times_the_budget_and_lets_half_of_it_pass(budget: float) -> None:
    noticed = []
    for seed in range(12):
        watch = Watch(budget)
        watch.observe(stream(budget / 2, int(40 / budget), seed))
        assert not watch.alarmed
        tokens = 0
        while watch.level < watch.limit and tokens < 60 / budget:
            watch.observe(stream(3 * budget, 20, 1000 * seed + tokens))
            tokens += 20
        noticed.append(tokens)
    assert np.median(noticed) < 14 / budget  # a dozen disagreements within the budget's own measure
    assert max(noticed) < 50 / budget


def test_what_the_cloud_wrote_does_not_count() -> None:
    watch = Watch(0.02)
    watch.observe([Labelled(0.1, False)] * 1000)
    assert watch.level < 1 / 0.02


def test_suspicion_comes_before_the_alarm_and_audits_everything() -> None:
    gate = Gate(GOOD, 0.02)
    assert gate.audit_share(0.05) == 0.05
    seen: list[float] = []
    while not gate.watch.alarmed:
        gate.watch.observe(stream(0.3, 5, len(seen)))
        seen.append(gate.audit_share(0.05))
    assert seen[-1] == 1.0


# --- what to expect ------------------------------------------------------------------------------------------


@given(BUDGETS)
def test_what_is_expected_has_an_interval(budget: float) -> None:
    found = expect(GOOD, budget)
    assert found.unverified_low <= found.unverified <= found.unverified_high
    assert found.disagreement <= found.disagreement_high <= budget + 1e-9


@settings(max_examples=30)
@given(st.sampled_from([0.1, 0.5, 0.6, 0.75, 0.9, 1.0]))
def test_a_share_becomes_the_budget_that_reaches_it(share: float) -> None:
    budget = budget_for(GOOD, share)
    assert expect(GOOD, budget + 1e-6).unverified >= share
    assert expect(GOOD, budget * 0.98).unverified < share


def test_some_shares_cannot_be_reached() -> None:
    assert budget_for(Evidence(), 0.1) == inf
    assert wilson(0.5, 0) == (0, 1)
