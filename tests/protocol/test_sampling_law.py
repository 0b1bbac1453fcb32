"""The law of the draw: chi-square against the exact distribution, which the scalar reference computes by itself.

The token-for-token test (`exact` against `cloud_only`) cannot see a bias that both sides share; this one can.
At the end the same measure is shown to refuse draws that are wrong in the ways a draw tends to be wrong.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from scipy.stats import chi2, chisquare

from pilotfish.protocol.messages import Sampling
from pilotfish.protocol.sampling import draw, filter_logits, gumbel, gumbel_hash
from pilotfish.protocol.sampling_reference import law

N_SEEDS, N_POSITIONS = 250, 1000  # 250,000 draws a setting
P_REFUSED = 1e-4
VOCAB = 32
ROW = (np.random.default_rng(7).normal(size=VOCAB) * 1.5).astype(np.float32)
ROW[5] = ROW[11]  # a tie
SEEDS = [int(s) for s in np.random.default_rng(8).integers(0, 2**64, N_SEEDS, dtype=np.uint64)]

SETTINGS = {
    "T=1": Sampling(temperature=1.0),
    "T=0.7 top_p=0.9": Sampling(temperature=0.7, top_p=0.9),
    "T=1 top_k=20": Sampling(temperature=1.0, top_k=20),
    "T=1.3 min_p=0.05": Sampling(temperature=1.3, min_p=0.05),
    "T=0.3": Sampling(temperature=0.3),
    "T=2 everything": Sampling(temperature=2.0, top_k=24, top_p=0.95, min_p=0.02),
}

Ids = npt.NDArray[np.int64]
Drawer = Callable[[npt.NDArray[np.float32], npt.NDArray[np.int64], Sampling], Ids]


def drawn(sampling: Sampling, drawer: Drawer = draw, seeds: list[int] = SEEDS) -> Ids:
    """Draws of one row of logits, [seeds, positions]."""
    rows, positions = np.tile(ROW, (N_POSITIONS, 1)), np.arange(N_POSITIONS)
    return np.stack([drawer(rows, positions, sampling.model_copy(update={"seed": seed})) for seed in seeds])


def p_value(ids: Ids, exact: list[float]) -> float:
    """Chi-square of observed ids against a law; 0 when an impossible id was drawn, rare ids in one bin."""
    observed, expected = np.bincount(ids.ravel(), minlength=VOCAB), np.array(exact) * ids.size
    if observed[expected == 0].any():
        return 0.0
    rare = expected < 20
    observed = np.append(observed[~rare], observed[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    used = expected > 0
    return float(chisquare(observed[used], expected[used]).pvalue)


@pytest.mark.parametrize("name", SETTINGS)
def test_draws_follow_the_softmax_of_the_filtered_logits(name: str) -> None:
    ids = drawn(SETTINGS[name])
    assert ids.size >= 200_000
    assert p_value(ids, law(ROW.tolist(), SETTINGS[name])) > P_REFUSED


def test_the_law_is_a_law() -> None:
    for sampling in SETTINGS.values():
        exact = law(ROW.tolist(), sampling)
        assert sum(exact) == pytest.approx(1)
        assert [p > 0 for p in exact] == np.isfinite(filter_logits(ROW[None], sampling))[0].tolist()
    assert law(ROW.tolist(), Sampling()) == np.eye(VOCAB)[ROW.argmax()].tolist()


def test_one_seed_alone_follows_the_law_over_its_positions() -> None:
    for seed in (0, 1, 2**32, 2**64 - 1):  # the seeds people type
        ids = draw(np.tile(ROW, (200_000, 1)), np.arange(200_000), Sampling(temperature=1.0, seed=seed))
        assert p_value(ids, law(ROW.tolist(), SETTINGS["T=1"])) > P_REFUSED


def test_one_position_alone_follows_the_law_over_seeds() -> None:
    noise = gumbel(np.arange(200_000, dtype=np.uint64)[:, None], 17, np.arange(VOCAB))  # consecutive seeds
    assert p_value((ROW + noise).argmax(axis=1), law(ROW.tolist(), SETTINGS["T=1"])) > P_REFUSED


# --- independence ----------------------------------------------------------------------------------------------------


def pairs_p_value(first: Ids, second: Ids, exact: npt.NDArray[np.float64]) -> float:
    """Chi-square of pairs of ids against the product of their laws; the ids are binned to 8 to keep cells full."""
    order = np.argsort(np.argsort(-exact))
    bins = np.minimum(order, 7)
    marginal = np.bincount(bins, weights=exact)
    cells = np.bincount(bins[first.ravel()] * 8 + bins[second.ravel()], minlength=64)
    expected = np.outer(marginal, marginal).ravel() * first.size
    return float(chi2.sf(((cells - expected) ** 2 / expected).sum(), 63))


def test_successive_positions_are_independent() -> None:
    ids, exact = drawn(SETTINGS["T=1"]), np.array(law(ROW.tolist(), SETTINGS["T=1"]))
    for lag in (1, 2, 3, 8, 16, 64):
        assert pairs_p_value(ids[:, :-lag], ids[:, lag:], exact) > P_REFUSED, f"lag {lag}"


def test_neighbouring_seeds_are_independent() -> None:
    exact = np.array(law(ROW.tolist(), SETTINGS["T=1"]))
    for step in (1, 1 << 31, 1 << 32, 1 << 63):
        seeds = [k * (step if step == 1 else 1) + 1000 for k in range(N_SEEDS)]
        there = drawn(SETTINGS["T=1"], seeds=[seed ^ step for seed in seeds])
        assert pairs_p_value(drawn(SETTINGS["T=1"], seeds=seeds), there, exact) > P_REFUSED, f"seed ^ {step:#x}"


def test_noise_is_uncorrelated_along_every_axis() -> None:
    noise = gumbel(np.arange(60, dtype=np.uint64)[:, None, None], np.arange(60)[:, None], np.arange(60))
    centred = (noise - noise.mean()) / noise.std()
    for axis in range(3):
        for lag in (1, 2, 4, 8, 16, 32):
            ahead = np.roll(centred, -lag, axis=axis)
            assert abs((centred * ahead).mean()) * np.sqrt(centred.size) < 5, f"axis {axis}, lag {lag}"


def test_noise_has_the_moments_of_a_gumbel() -> None:
    noise = gumbel(3, np.arange(1000)[:, None], np.arange(1000))
    assert noise.mean() == pytest.approx(np.euler_gamma, abs=5 * np.pi / np.sqrt(6) / 1000)
    assert noise.var() == pytest.approx(np.pi**2 / 6, rel=0.01)


# --- the measure can fail --------------------------------------------------------------------------------------------


def noise_of(rows: npt.NDArray[np.float32], positions: Ids, sampling: Sampling) -> npt.NDArray[np.float64]:
    return gumbel(sampling.seed, positions[:, None], np.arange(rows.shape[1]))


def winners(sums: npt.NDArray[np.float64]) -> Ids:
    ids: Ids = sums.argmax(axis=1)
    return ids


def uniform_of_eight_bits(rows: npt.NDArray[np.float32], positions: Ids, sampling: Sampling) -> Ids:
    hashed = gumbel_hash(sampling.seed, positions[:, None], np.arange(rows.shape[1])) >> 24
    return winners(filter_logits(rows, sampling) - np.log(-np.log1p(-(hashed + 0.5) / 256)))


def positions_used_again(rows: npt.NDArray[np.float32], positions: Ids, sampling: Sampling) -> Ids:
    return draw(rows, positions % 50, sampling)


def temperature_forgotten(rows: npt.NDArray[np.float32], positions: Ids, sampling: Sampling) -> Ids:
    return winners(filter_logits(rows, sampling) * sampling.temperature + noise_of(rows, positions, sampling))


def filtered_after_the_noise(rows: npt.NDArray[np.float32], positions: Ids, sampling: Sampling) -> Ids:
    noisy = (rows + sampling.temperature * noise_of(rows, positions, sampling)).astype(np.float32)
    return winners(filter_logits(noisy, sampling))


def one_more_than_top_k(rows: npt.NDArray[np.float32], positions: Ids, sampling: Sampling) -> Ids:
    return draw(rows, positions, sampling.model_copy(update={"top_k": sampling.top_k + 1}))


def noise_of_the_neighbouring_id(rows: npt.NDArray[np.float32], positions: Ids, sampling: Sampling) -> Ids:
    shared = noise_of(rows, positions, sampling).repeat(2, axis=1)[:, : rows.shape[1]]  # ids 2i and 2i + 1 share noise
    return winners(filter_logits(rows, sampling) + shared)


@pytest.mark.parametrize(
    ("biased", "name"),
    [
        (uniform_of_eight_bits, "T=1"),
        (positions_used_again, "T=1"),
        (temperature_forgotten, "T=0.7 top_p=0.9"),
        (filtered_after_the_noise, "T=0.7 top_p=0.9"),
        (one_more_than_top_k, "T=1 top_k=20"),
        (noise_of_the_neighbouring_id, "T=1"),
    ],
)
def test_a_biased_draw_is_refused(biased: Drawer, name: str) -> None:
    assert p_value(drawn(SETTINGS[name], biased), law(ROW.tolist(), SETTINGS[name])) < P_REFUSED


def test_noise_that_depends_on_the_neighbour_is_refused() -> None:
    ids, exact = drawn(SETTINGS["T=1"]), np.array(law(ROW.tolist(), SETTINGS["T=1"]))
    sticky = np.where(np.arange(ids.shape[1]) % 50 == 0, np.roll(ids, 1, axis=1), ids)  # one in 50 repeats the last
    assert pairs_p_value(sticky[:, :-1], sticky[:, 1:], exact) < P_REFUSED
