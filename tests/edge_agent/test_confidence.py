from __future__ import annotations

import time
from importlib.metadata import EntryPoint

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pilotfish.edge_agent import confidence
from pilotfish.edge_agent.confidence import BUILT_IN, Ensemble, Strategy, log_odds, strategies, strategy
from pilotfish.protocol.errors import SettingsError
from pilotfish.protocol.messages import Sampling
from pilotfish.protocol.sampling import draw, perturbed

NAMES = ["max_prob", "entropy", "temperature", "top_k_agg", "margin", "ensemble"]
ROWS = arrays(np.float32, 40, elements=st.floats(-30, 30, width=32))
SAMPLINGS = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.0]),
    top_k=st.sampled_from([0, 1, 5]),
    top_p=st.sampled_from([1.0, 0.5]),
    seed=st.integers(0, 2**64 - 1),
)


def drawn(row: np.ndarray, sampling: Sampling) -> int:
    return int(draw(row[None], [7], sampling)[0])


@pytest.mark.parametrize("name", NAMES)
@given(row=ROWS, sampling=SAMPLINGS)
@settings(max_examples=40)
def test_every_score_lies_between_0_and_1(name: str, row: np.ndarray, sampling: Sampling) -> None:
    score = strategy(name).score(row, drawn(row, sampling), 7, sampling)
    assert isinstance(score, float)
    assert 0 <= score <= 1


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_draft_without_doubt_scores_higher_than_one_that_guesses(name: str, temperature: float) -> None:
    sampling = Sampling(temperature=temperature, seed=3)
    guessing = np.zeros(64, np.float32)
    certain = guessing.copy()
    certain[9] = 30
    one = strategy(name)
    scores = [one.score(row, drawn(row, sampling), 7, sampling) for row in (guessing, certain)]
    assert scores[1] > 0.99
    assert scores[0] < 0.99 * scores[1]


@given(row=ROWS, seed=st.integers(0, 2**64 - 1))
def test_the_margin_is_that_of_the_perturbed_logits(row: np.ndarray, seed: int) -> None:
    sampling = Sampling(temperature=0.8, seed=seed)
    sums = np.sort(perturbed(row[None], [7], sampling)[0])
    score = strategy("margin").score(row, drawn(row, sampling), 7, sampling)
    assert score == pytest.approx(1 - np.exp(sums[-2] - sums[-1]))


@pytest.mark.parametrize("name", NAMES)
def test_ids_that_cannot_be_drawn_do_not_matter(name: str) -> None:
    row = np.array([2, 1, 0, -np.inf, -np.inf, -np.inf, -np.inf, -np.inf, -np.inf], np.float32)
    assert 0 < strategy(name).score(row, 0, 7, Sampling()) <= 1


def test_a_large_vocabulary_takes_no_loop() -> None:
    row = np.random.default_rng(1).normal(size=150_000).astype(np.float32)
    for one in strategies().values():
        one.score(row, int(row.argmax()), 7, Sampling())
        start = time.perf_counter()
        one.score(row, int(row.argmax()), 7, Sampling())
        assert time.perf_counter() - start < 0.1  # a Python loop over the ids takes longer; this takes 1 to 4 ms


def test_what_is_switched_off_is_gone_from_the_ensemble_too() -> None:
    assert list(strategies(["entropy", "margin"])) == ["max_prob", "temperature", "top_k_agg"]
    ensemble = strategy("ensemble", off=["entropy"])
    assert isinstance(ensemble, Ensemble)
    assert [member.name for member in ensemble.members] == ["max_prob", "temperature", "top_k_agg", "margin"]
    with pytest.raises(SettingsError, match="switched off: choose"):
        strategy("margin", off=["margin"])
    with pytest.raises(SettingsError, match="no strategy 'entopy'"):
        strategies(["entopy"])
    with pytest.raises(SettingsError, match="not known: choose max_prob"):
        strategy("best")
    with pytest.raises(SettingsError, match="fewer"):
        strategy("ensemble", off=NAMES[:-1])


def test_weights_can_be_given() -> None:
    row = np.array([3, 1, 0, 0.5, 0], np.float32)
    only = strategy("ensemble", weights={"margin": 1.0})
    assert only.score(row, 0, 7, Sampling()) == pytest.approx(strategy("margin").score(row, 0, 7, Sampling()))
    with pytest.raises(SettingsError, match="as many weights"):
        Ensemble([kind() for kind in BUILT_IN], [1.0])


def test_weights_can_be_learnt() -> None:
    """Of five members only the second knows anything: it gets the weight."""
    rng = np.random.default_rng(5)
    scores = rng.uniform(0.01, 0.99, (4000, 5))
    agreed = rng.uniform(size=4000) < scores[:, 1]
    fitted = Ensemble([kind() for kind in BUILT_IN]).fitted(scores, agreed)
    assert fitted.weights[1] == pytest.approx(1, abs=0.1)
    assert np.abs(np.delete(fitted.weights, 1)).max() < 0.1
    assert np.corrcoef(log_odds(fitted.combined(scores)), log_odds(scores[:, 1]))[0, 1] > 0.99


class Peaky(Strategy):
    name = "peaky"

    def score(self, logits: np.ndarray, token: int, position: int, sampling: Sampling) -> float:
        return 0.5


def test_another_package_adds_one(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"peaky": Peaky}
    monkeypatch.setattr(confidence, "_installed", lambda: found)
    assert strategy("peaky").score(np.zeros(3, np.float32), 0, 1, Sampling()) == 0.5
    assert "peaky" in strategies()


def test_one_that_cannot_be_loaded_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = EntryPoint("broken", "no.such.module:Thing", confidence.GROUP)
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: [broken])
    confidence._installed.cache_clear()
    with pytest.raises(SettingsError, match=r"'broken' \(no\.such\.module:Thing\) cannot be loaded"):
        strategies()
    confidence._installed.cache_clear()
