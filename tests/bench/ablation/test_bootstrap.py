"""Intervals: they cover what they should, comparisons are paired, and equals are told to be equal."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import bootstrap as reference

from ablations import failed, record
from pilotfish.bench.ablation import bootstrap
from pilotfish.bench.ablation.bootstrap import Sums, break_even, compare, crossing, sums
from pilotfish.bench.ablation.measures import MEASURES

SPEED, ACCURACY = MEASURES["tokens_per_second"], MEASURES["accuracy"]


def slow(variant: str, prompt: int, ms: float) -> dict[str, object]:
    return record(variant, prompt, token_ms=[1.0, 1.0, 1.0, ms])


def test_a_figure_is_a_ratio_of_sums() -> None:
    found = sums([slow("a", 1, 100), slow("a", 2, 300)], SPEED)
    assert found.value == pytest.approx(8 / 0.4)


def test_the_interval_is_that_of_scipy() -> None:
    rng = np.random.default_rng(1)
    over, under = rng.exponential(1.0, 60), rng.uniform(1, 2, 60)
    ours = Sums(over[:, None], under[:, None]).interval()
    theirs = reference(
        (over, under), lambda a, b, axis=-1: a.sum(axis) / b.sum(axis), paired=True, method="percentile",
        n_resamples=4000, rng=np.random.default_rng(2),
    ).confidence_interval  # fmt: skip
    assert ours is not None
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), rel=0.05)


def test_too_few_prompts_have_no_interval() -> None:
    found = sums([slow("a", prompt, 100) for prompt in range(4)], SPEED).interval()
    assert found is not None
    assert found.low is None


def test_a_prompt_is_one_sample_whatever_its_seeds() -> None:
    rng = np.random.default_rng(3)
    once = [slow("a", prompt, rng.uniform(50, 500)) for prompt in range(30)]
    again = [{**one, "seed": seed} for one in once for seed in range(5)]
    five, one = sums(again, SPEED).interval(), sums(once, SPEED).interval()
    assert five is not None
    assert one is not None
    assert (five.value, five.low, five.high) == pytest.approx((one.value, one.low, one.high))


def test_pairing_sees_what_the_prompts_variety_hides() -> None:
    rng = np.random.default_rng(4)
    times = rng.uniform(50, 5000, 40)
    base = [slow("baseline", prompt, ms) for prompt, ms in enumerate(times)]
    faster = [slow("b", prompt, 0.95 * ms) for prompt, ms in enumerate(times)]
    found = compare(faster, base, SPEED)
    assert found is not None
    assert found.verdict == "better"
    assert found.interval.value == pytest.approx(1 / 0.95)
    a, b = sums(faster, SPEED).interval(), sums(base, SPEED).interval()
    assert a is not None
    assert b is not None
    assert b.holds(a.value)  # each alone says nothing


def test_equals_are_told_to_be_equal() -> None:
    rng = np.random.default_rng(5)
    base = [slow("baseline", prompt, ms) for prompt, ms in enumerate(rng.uniform(90, 110, 40))]
    other = [slow("b", prompt, ms) for prompt, ms in enumerate(rng.uniform(90, 110, 40))]
    found = compare(other, base, SPEED)
    assert found is not None
    assert found.verdict == "no difference"


def test_an_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng, hits = np.random.default_rng(6), 0
    for _ in range(300):
        over, under = rng.exponential(2.0, 50), rng.uniform(0.5, 1.5, 50)
        found = Sums(over[:, None], under[:, None]).interval()
        assert found is not None
        hits += found.holds(2.0)
    assert 0.88 <= hits / 300 <= 0.98


def test_only_requests_with_a_partner_are_compared() -> None:
    base = [record("baseline", prompt) for prompt in range(6)]
    other = [record("b", prompt) for prompt in range(5)] + [failed("b", 5)]
    speed, accuracy = compare(other, base, SPEED), compare(other, base, ACCURACY)
    assert speed is not None
    assert accuracy is not None
    assert (speed.pairs, accuracy.pairs) == (5, 6)
    assert accuracy.interval.value == pytest.approx(-1 / 6)  # a failure is a wrong answer


@pytest.mark.parametrize(
    ("gaps", "place"),
    [([-1, 1], 5.0), ([-1, 3], 2.5), ([1, 2], None), ([0, 1], 0.0), ([-2, -1, 1], 15.0), ([-1, 0], 10.0)],
)
def test_where_lines_cross(gaps: list[float], place: float | None) -> None:
    assert crossing([0.0, 10.0, 20.0][: len(gaps)], gaps) == place


def test_break_even_has_an_interval() -> None:
    rng = np.random.default_rng(7)
    steady = rng.uniform(5, 6, (40, 1))
    ones = np.ones((40, 1))
    ours = [Sums(steady - 1, ones), Sums(steady + 3 + rng.normal(0, 0.5, (40, 1)), ones)]
    theirs = [Sums(steady, ones), Sums(steady, ones)]
    found = break_even([0.0, 40.0], ours, theirs)
    assert found.share == 1
    assert found.interval is not None
    assert found.interval.low is not None
    assert found.interval.high is not None
    assert found.interval.low < 10 < found.interval.high
    assert break_even([0.0, 40.0], theirs, ours[:1] * 2).interval is None


def test_resamples_are_the_same_for_everyone() -> None:
    assert bootstrap.drawn(7, 1) is bootstrap.drawn(7, 1)
    assert (bootstrap.drawn(7, 1).sum(axis=1) == 7).all()


def test_what_a_seed_did_to_all_its_prompts_widens_the_interval() -> None:
    """A gate that learnt well in one replicate and badly in another: five seeds are five samples, not two hundred."""
    rng, missed, missed_by_prompts = np.random.default_rng(8), 0, 0
    for _ in range(100):
        effect = rng.normal(0, 0.3, 5)
        over = 2.0 + effect[None, :] + rng.normal(0, 0.3, (40, 5))
        two_way = Sums(over, np.ones((40, 5))).interval()
        by_prompts = Sums(over.sum(axis=1, keepdims=True), np.full((40, 1), 5.0)).interval()
        assert two_way is not None
        assert by_prompts is not None
        missed += not two_way.holds(2.0)
        missed_by_prompts += not by_prompts.holds(2.0)
    assert missed <= 25
    assert missed_by_prompts > 50
