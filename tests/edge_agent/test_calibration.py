from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pilotfish.edge_agent.calibration import (
    BINS,
    COLD,
    Calibration,
    bin_of,
    brier,
    ece,
    lower_edge,
    reliability,
)

LABELS = st.lists(st.tuples(st.floats(0, 1), st.booleans(), st.sampled_from([1.0, 20.0])), max_size=60)


def learnt(labels: list[tuple[float, bool, float]]) -> Calibration:
    found = Calibration()
    for score, agreed, weight in labels:
        found.observe(score, agreed, weight)
    return found


@given(LABELS)
@settings(max_examples=40)
def test_acceptance_is_a_probability_and_rises_with_the_score(labels: list[tuple[float, bool, float]]) -> None:
    curve = [learnt(labels).acceptance(lower_edge(at)) for at in range(BINS)]
    assert all(0 < one < 1 for one in curve)
    assert curve == sorted(curve)


@given(LABELS, LABELS)
def test_maps_of_two_agents_add_up(one: list[tuple[float, bool, float]], two: list[tuple[float, bool, float]]) -> None:
    merged = learnt(one)
    merged.add(learnt(two).sums())
    assert np.allclose(merged.curve(), learnt(one + two).curve())


def test_a_cold_map_is_conservative() -> None:
    cold = Calibration()
    assert cold.acceptance(1.0) == COLD
    cold.observe(0.999, True)
    assert cold.acceptance(0.999) < 0.7  # one label is no certainty
    cold = learnt([(0.9, False, 1.0)] * 20)
    assert cold.acceptance(0.1) <= cold.acceptance(0.9) < 0.2


def test_a_warm_map_says_what_happened_whatever_the_score_claims() -> None:
    rng = np.random.default_rng(1)
    claimed = rng.uniform(0.5, 1, 20_000)
    true = 0.6 * claimed  # an overconfident draft
    warm = learnt([(float(c), bool(rng.uniform() < t), 1.0) for c, t in zip(claimed, true, strict=True)])
    for score in (0.55, 0.7, 0.9):
        assert warm.acceptance(score) == pytest.approx(0.6 * score, abs=0.03)


def test_an_audit_stands_for_the_tokens_nobody_looked_at() -> None:
    """80 verified tokens were right; of 20 x 20 committed ones a twentieth was audited, and half of those wrong."""
    found = learnt([(0.9, True, 1.0)] * 80 + [(0.9, at % 2 == 0, 20.0) for at in range(20)])
    assert found.acceptance(0.9) == pytest.approx((80 + 200) / 480, abs=0.03)
    assert 20 < found.labels < 30  # Kish: as good as that many equal ones


@given(st.floats(0, 1), st.floats(0, 1))
def test_bins_are_in_the_order_of_scores(one: float, two: float) -> None:
    low, high = sorted((one, two))
    assert 0 <= bin_of(low) <= bin_of(high) < BINS
    assert lower_edge(bin_of(low)) <= low + 1e-9


def test_how_good_a_map_is() -> None:
    predicted = np.array([0.8] * 10 + [0.3] * 10)
    agreed = np.array([True] * 8 + [False] * 2 + [True] * 5 + [False] * 5)
    bars = reliability(predicted, agreed)
    assert [(round(bar.predicted, 2), bar.observed, bar.labels) for bar in bars] == [(0.3, 0.5, 10), (0.8, 0.8, 10)]
    assert ece(bars) == pytest.approx(0.1)
    assert brier(predicted, agreed) == pytest.approx(np.mean([0.16, 0.29]))
    assert ece([]) == brier(np.array([]), np.array([], bool)) == 0
