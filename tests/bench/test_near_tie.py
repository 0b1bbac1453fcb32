"""What counts as a near-tie: rows made by hand, with and without filters."""

from __future__ import annotations

import numpy as np
import pytest

from pilotfish.bench.near_tie import FACTOR, Noise, explained, gap
from pilotfish.protocol.messages import Sampling
from pilotfish.protocol.sampling import Float32s, draw, perturbed

GREEDY = Sampling()
AT = 17


def row(*logits: float) -> Float32s:
    return np.array(logits, np.float32)


def drawn(logits: Float32s, sampling: Sampling) -> int:
    return int(draw(logits[None], np.array([AT]), sampling)[0])


def test_the_bound_is_eight_times_the_worst_noise() -> None:
    assert Noise(1, 1e-5, 3e-5).bound == pytest.approx(FACTOR * 3e-5)
    assert FACTOR == 8


def test_at_temperature_0_the_gap_is_that_of_the_logits() -> None:
    assert gap(row(1.0, 3.0, 2.5), AT, (1, 2), GREEDY) == pytest.approx(0.5)


def test_a_gap_below_the_bound_is_explained_and_one_above_is_not() -> None:
    logits = row(0.0, 2.0, 1.9999)
    assert explained(logits, AT, (1, 2), GREEDY, bound=2e-4)
    assert not explained(logits, AT, (1, 2), GREEDY, bound=5e-5)


def test_without_noise_nothing_is_explained() -> None:
    assert not explained(row(2.0, 2.0, 0.0), AT, (0, 1), GREEDY, bound=0.0)


def test_an_id_that_neither_pass_can_have_meant_is_not_explained() -> None:
    assert not explained(row(2.0, 1.9999, -3.0), AT, (0, 2), GREEDY, bound=1e-3)


def test_at_a_temperature_it_is_the_perturbed_values_that_tie() -> None:
    sampling = Sampling(temperature=0.5, seed=3)
    logits = row(0.0, 0.0, 0.0, 0.0)
    best, second = np.argsort(perturbed(logits[None], np.array([AT]), sampling)[0])[::-1][:2].tolist()
    ahead = gap(logits, AT, (best, second), sampling)
    logits[second] += ahead - 1e-4
    assert drawn(logits, sampling) == best
    assert gap(logits, AT, (best, second), sampling) == pytest.approx(1e-4, rel=0.1)
    assert explained(logits, AT, (best, second), sampling, bound=2e-4)
    assert not explained(logits, AT, (best, second), sampling, bound=5e-5)


@pytest.mark.parametrize("sampling", [Sampling(temperature=1, top_k=2), Sampling(temperature=1, min_p=0.5)])
def test_an_id_at_the_edge_of_a_filter_is_a_near_tie_too(sampling: Sampling) -> None:
    """Two passes disagree whether an id passes the filter; where it does, it wins by far."""
    edge = 0.0 if sampling.top_k else 1.0 + float(np.log(0.5))
    logits = row(1.0, edge + 2e-5, edge - 2e-5) if sampling.top_k else row(1.0, -9.0, edge - 2e-5)
    seed = next(s for s in range(10_000) if _third_wins(logits, sampling, s))
    chosen = sampling.model_copy(update={"seed": seed})
    other = drawn(logits, chosen)
    assert other != 2
    assert explained(logits, AT, (other, 2), chosen, bound=1e-3)
    assert explained(logits, AT, (2, other), chosen, bound=1e-3)
    assert not explained(logits, AT, (other, 2), chosen, bound=1e-6)


def _third_wins(logits: Float32s, sampling: Sampling, seed: int) -> bool:
    free = Sampling(temperature=sampling.temperature, seed=seed)
    return drawn(logits, free) == 2
