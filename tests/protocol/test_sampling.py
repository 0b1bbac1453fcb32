"""The coupled draw in numpy: pinned vectors, the rules of ties and filters, agreement with the reference."""

from __future__ import annotations

import ast
import importlib.util
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pilotfish.protocol.messages import MAX_CONTEXT, SEED_MAX, Sampling
from pilotfish.protocol.sampling import draw, filter_logits, gumbel, gumbel_hash, log_probabilities, perturbed
from pilotfish.protocol.sampling_reference import draw_reference, gumbel_reference, murmur3, survivors

PINNED_NOISE = [  # seed, position, id, murmur3, gumbel
    (0, 0, 0, 2167721464, 0.3529450019741913),
    (0, 0, 1, 10027521, 6.058697262852313),
    (1, 0, 0, 2451737883, 0.16732482134506757),
    (0, 1, 0, 223774489, 2.9279257555522733),
    (2**64 - 1, 2**18 - 1, 151935, 2380196672, 0.21338370349724894),
    (0x0123456789ABCDEF, 1000, 42, 3282417314, -0.36808998417827454),
    (1 << 32, 7, 4095, 3891281351, -0.8605928079204328),
]

# A row of 16 logits drawn at positions 0..23 with seed 2024; 0.25 is exact in float32.
PINNED_ROW = np.array([0.25 * (5 * i % 16) for i in range(16)], np.float32)
PINNED_DRAWS = {
    "T=0": (
        Sampling(temperature=0.0, seed=2024),
        [3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3],
    ),
    "T=1": (
        Sampling(temperature=1.0, seed=2024),
        [6, 6, 3, 12, 11, 3, 5, 3, 3, 9, 6, 6, 9, 6, 8, 15, 2, 3, 5, 6, 3, 6, 6, 14],
    ),
    "T=0.7 top_p=0.9": (
        Sampling(temperature=0.7, top_p=0.9, seed=2024),
        [6, 6, 3, 12, 3, 3, 5, 3, 3, 9, 6, 6, 9, 6, 6, 15, 2, 3, 5, 6, 3, 6, 6, 15],
    ),
    "T=1 top_k=4": (
        Sampling(temperature=1.0, top_k=4, seed=2024),
        [6, 6, 3, 12, 3, 3, 3, 3, 3, 9, 6, 6, 9, 6, 6, 3, 6, 3, 9, 6, 3, 6, 6, 6],
    ),
    "T=1.3 min_p=0.3": (
        Sampling(temperature=1.3, min_p=0.3, seed=2024),
        [6, 6, 3, 12, 3, 3, 5, 3, 12, 9, 6, 6, 9, 6, 6, 15, 2, 3, 5, 6, 3, 9, 6, 15],
    ),
    "everything": (
        Sampling(temperature=1.5, top_k=6, top_p=0.8, min_p=0.1, seed=2024),
        [6, 6, 3, 12, 3, 3, 3, 3, 12, 9, 6, 6, 9, 6, 6, 15, 6, 3, 15, 6, 3, 9, 6, 15],
    ),
}

# --- pinned vectors --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "expected"), [(b"\0" * 4, 0x2362F9DE), (b"!Ce\x87", 0xF55B516B), (b"test", 0xBA6BD213)]
)
def test_the_reference_is_murmur3_as_published(data: bytes, expected: int) -> None:
    assert murmur3([int.from_bytes(data, "little")]) == expected  # hash seed 0: the vectors that go round on the web


@pytest.mark.parametrize(("seed", "position", "token", "hashed", "noise"), PINNED_NOISE)
def test_the_noise_is_pinned(seed: int, position: int, token: int, hashed: int, noise: float) -> None:
    assert gumbel_hash(seed, position, token) == hashed
    assert float(gumbel(seed, position, token)) == pytest.approx(noise, abs=1e-12)
    assert gumbel_reference(seed, position, token) == pytest.approx(noise, abs=1e-12)


@pytest.mark.parametrize("name", PINNED_DRAWS)
def test_draws_are_pinned(name: str) -> None:
    sampling, expected = PINNED_DRAWS[name]
    rows = np.tile(PINNED_ROW, (24, 1))
    assert draw(rows, range(24), sampling).tolist() == expected


class Word(np.ndarray[Any, Any]):
    """An array that answers Triton's `.to`."""

    def to(self, dtype: Any) -> Any:
        return self.astype(dtype)


def vllm_hash() -> Any:
    """`murmur3_hash32` of the vLLM that is installed: its Triton source, run on numpy, without importing it."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("vLLM is not installed")
    source = Path(spec.submodule_search_locations[0], "v1/worker/gpu/sample/gumbel.py").read_text()
    kept = [n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef) and "murmur3" in n.name]
    names: dict[str, Any] = {
        "tl": SimpleNamespace(
            constexpr=int, **{t: getattr(np, t) for t in ("int32", "int64", "uint32", "uint64", "float32")}
        ),
        "triton": SimpleNamespace(jit=lambda function: function),
    }
    exec(compile(ast.Module(list[ast.stmt](kept), []), "gumbel.py", "exec"), names)  # noqa: S102  the source is vLLM's own
    return names["murmur3_hash32"], names["murmur3_uniform32"]


def test_the_integers_are_those_of_vllms_gpu_sampler() -> None:
    hash32, uniform32 = vllm_hash()
    rng = np.random.default_rng(1)
    seeds = rng.integers(0, 2**64, 4096, dtype=np.uint64)
    positions, ids = rng.integers(0, MAX_CONTEXT, 4096), rng.integers(0, 152_000, 4096)
    words = [array.view(Word) for array in (seeds.view(np.int64), positions, ids)]
    ours = gumbel_hash(seeds, positions, ids)
    assert np.array_equal(hash32(*words), ours)
    assert np.allclose(uniform32(*words), (ours + 0.5) * 2.0**-32, rtol=2e-7, atol=0)


# --- the hash --------------------------------------------------------------------------------------------------------


@given(seed=st.integers(0, SEED_MAX), position=st.integers(0, MAX_CONTEXT), token=st.integers(0, 2**31 - 1))
def test_noise_equals_the_reference(seed: int, position: int, token: int) -> None:
    words = [seed & 0xFFFFFFFF, seed >> 32, position, token]
    assert int(gumbel_hash(seed, position, token)) == murmur3(words)
    assert float(gumbel(seed, position, token)) == pytest.approx(gumbel_reference(seed, position, token), abs=1e-12)


def test_arguments_broadcast() -> None:
    seeds, positions, ids = np.arange(2, dtype=np.uint64)[:, None, None], np.arange(3)[:, None], np.arange(4)
    block = gumbel_hash(seeds, positions, ids)
    assert block.shape == (2, 3, 4)
    assert block.dtype == np.uint32
    assert block[1, 2, 3] == gumbel_hash(1, 2, 3)
    assert gumbel(0, 0, 0).shape == ()


def test_a_seed_may_come_as_the_bits_of_a_signed_integer() -> None:
    assert gumbel_hash(np.array([-1]), 3, 4)[0] == gumbel_hash(SEED_MAX, 3, 4)


def test_ids_of_one_row_never_share_an_integer() -> None:
    hashed = gumbel_hash(99, 12, np.arange(1 << 18))  # every step of murmur3 is a bijection of the last word
    assert len(np.unique(hashed)) == 1 << 18


def test_noise_stays_within_its_bounds() -> None:
    noise = gumbel(5, np.arange(64)[:, None], np.arange(4096))
    assert -math.log(33 * math.log(2)) <= noise.min() <= noise.max() <= 33 * math.log(2)


# --- T = 0 and ties --------------------------------------------------------------------------------------------------


def one(row: list[float], sampling: Sampling, position: int = 0) -> int:
    return int(draw(np.array([row], np.float32), [position], sampling)[0])


def kept(row: list[float], **filters: Any) -> list[int]:
    filtered = filter_logits(np.array([row], np.float32), Sampling(temperature=1.0, **filters))
    assert survivors(row, Sampling(temperature=1.0, **filters)) == np.flatnonzero(np.isfinite(filtered[0])).tolist()
    return survivors(row, Sampling(temperature=1.0, **filters))


def test_at_temperature_zero_the_lowest_id_wins_a_tie_whatever_seed_and_filters_say() -> None:
    assert one([1, 7, 7, 7], Sampling()) == 1
    assert one([1, 7, 7, 7], Sampling(top_k=1, top_p=0.1, min_p=1.0, seed=12345), position=9) == 1


def test_a_temperature_that_float32_cannot_hold_is_zero() -> None:
    assert one([1, 7, 7, 7], Sampling(temperature=1e-60)) == 1


def test_a_tiny_temperature_is_argmax_and_breaks_ties_by_noise() -> None:
    assert {one([1, 7, 7, 7], Sampling(temperature=1e-6), position=p) for p in range(50)} == {1, 2, 3}
    assert {one([1, 7, 7, 7], Sampling(temperature=1e-30), position=p) for p in range(50)} == {1}  # noise < one ulp


def test_top_k_keeps_what_ties_with_the_kth() -> None:
    assert kept([3, 1, 2, 2, 2, 0], top_k=1) == [0]
    assert kept([3, 1, 2, 2, 2, 0], top_k=2) == [0, 2, 3, 4]
    assert kept([3, 1, 2, 2, 2, 0], top_k=4) == [0, 2, 3, 4]
    assert kept([3, 1, 2, 2, 2, 0], top_k=5) == [0, 1, 2, 3, 4]
    assert kept([3, 1, 2], top_k=0) == kept([3, 1, 2], top_k=3) == kept([3, 1, 2], top_k=2**31 - 1) == [0, 1, 2]


def test_top_p_keeps_the_smallest_set_that_reaches_p_and_its_ties() -> None:
    quarters = [math.log(x) for x in (0.5, 0.25, 0.125, 0.125)]
    assert kept(quarters, top_p=0.49) == [0]
    assert kept(quarters, top_p=0.51) == [0, 1]
    assert kept(quarters, top_p=0.74) == [0, 1]
    assert kept(quarters, top_p=0.76) == [0, 1, 2, 3]  # 2 alone would reach it: 3 is as likely
    assert kept([0.0] * 5, top_p=0.01) == [0, 1, 2, 3, 4]
    assert kept(quarters, top_p=1e-60) == [0]


def test_min_p_measures_against_the_most_likely_id() -> None:
    row = [math.log(x) for x in (0.5, 0.3, 0.15, 0.05)]
    assert kept(row, min_p=0.29) == [0, 1, 2]
    assert kept(row, min_p=0.31) == [0, 1]
    assert kept([2.0, 5.0, 5.0, 1.0], min_p=1.0) == [1, 2]


def test_min_p_comes_before_top_p() -> None:
    row = [math.log(x) for x in (0.4, 0.2, 0.2 - 1e-4, 0.1, 0.1)]
    assert kept(row, min_p=0.3, top_p=0.74) == [0, 1]  # 0.6 of the 0.8 that min-p leaves reach 0.74
    assert kept(row, top_p=0.74) == [0, 1, 2]


def test_filters_never_empty_a_row() -> None:
    rows = np.random.default_rng(2).normal(size=(64, 50)).astype(np.float32) * 10
    strictest = Sampling(temperature=0.01, top_k=1, top_p=1e-7, min_p=1.0)
    assert np.isfinite(filter_logits(rows, strictest)).sum(axis=1).tolist() == [1] * 64
    assert draw(rows, np.arange(64), strictest).tolist() == rows.argmax(axis=1).tolist()


# --- what cannot be drawn --------------------------------------------------------------------------------------------

SETTINGS = [
    Sampling(),
    Sampling(temperature=1.0),
    Sampling(temperature=0.7, top_p=0.9),
    Sampling(temperature=1.0, top_k=3),
    Sampling(temperature=1.3, min_p=0.05),
]


@pytest.mark.parametrize("sampling", SETTINGS)
@pytest.mark.parametrize("row", [[0, math.nan, 1, 2], [0, math.inf, 1, 2], [-math.inf] * 4, [math.inf, math.inf, 0, 0]])
def test_a_broken_row_is_refused_with_a_sentence(row: list[float], sampling: Sampling) -> None:
    with pytest.raises(ValueError, match="NaN or"):
        one(row, sampling)
    with pytest.raises(ValueError, match="NaN or"):
        draw_reference(row, 0, sampling)
    with pytest.raises(ValueError, match="NaN or"):
        perturbed(np.array([row], np.float32), [0], sampling)


@pytest.mark.parametrize("sampling", SETTINGS)
def test_minus_infinity_is_an_id_that_is_never_drawn(sampling: Sampling) -> None:
    rows = np.tile(np.array([-np.inf, 0.0, -np.inf, 0.5], np.float32), (200, 1))
    assert set(draw(rows, np.arange(200), sampling).tolist()) <= {1, 3}


def test_the_wrong_shape_or_type_is_refused() -> None:
    with pytest.raises(ValueError, match="pass float32"):
        draw(np.zeros((1, 4)), [0], Sampling())  # type: ignore[arg-type]  # float64: a double rounding would hide here
    with pytest.raises(ValueError, match="pass float32"):
        draw(np.zeros(4, np.float32), [0], Sampling())
    with pytest.raises(ValueError, match="one per row"):
        draw(np.zeros((2, 4), np.float32), [0], Sampling(temperature=1.0))


def test_no_rows_no_draws() -> None:
    for sampling in SETTINGS:
        assert draw(np.zeros((0, 4), np.float32), [], sampling).shape == (0,)


# --- draw is perturbed, and both are the reference -------------------------------------------------------------------

samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.01, 0.3, 0.7, 1.0, 1.3, 5.0, 100.0]),
    top_k=st.sampled_from([0, 0, 1, 2, 5, 1000]),
    top_p=st.sampled_from([1.0, 1.0, 0.999, 0.9, 0.5, 0.1]),
    min_p=st.sampled_from([0.0, 0.0, 0.02, 0.3, 1.0]),
    seed=st.integers(0, SEED_MAX),
)
logit = st.one_of(
    st.floats(-30, 30, width=32),
    st.integers(-3, 3).map(float),  # many ties
    st.just(-math.inf),
)
lists = st.lists(logit, min_size=1, max_size=24).filter(lambda row: max(row) > -math.inf)


@settings(max_examples=300)
@given(row=lists, position=st.integers(0, MAX_CONTEXT), sampling=samplings)
def test_draw_equals_the_reference(row: list[float], position: int, sampling: Sampling) -> None:
    logits = np.array([row], np.float32)
    assert draw(logits, [position], sampling)[0] == draw_reference(logits[0].tolist(), position, sampling)
    assert draw(logits, [position], sampling)[0] == perturbed(logits, [position], sampling).argmax()


@settings(max_examples=200)
@given(row=lists, sampling=samplings, order=st.randoms(use_true_random=False))
def test_filters_depend_on_values_and_not_on_their_order(row: list[float], sampling: Sampling, order: Any) -> None:
    shuffled = list(range(len(row)))
    order.shuffle(shuffled)
    logits = np.array([row], np.float32)
    assert np.array_equal(filter_logits(logits, sampling)[:, shuffled], filter_logits(logits[:, shuffled], sampling))


@pytest.mark.parametrize(
    "sampling", [*SETTINGS, Sampling(temperature=0.7, top_k=40, top_p=0.9, min_p=0.01, seed=SEED_MAX)]
)
def test_a_row_draws_the_same_alone_and_in_company(sampling: Sampling) -> None:
    rows = np.random.default_rng(3).normal(size=(30, 4096)).astype(np.float32) * 3  # several blocks
    positions = np.arange(500, 530)
    together = draw(rows, positions, sampling)
    assert together.tolist() == [int(draw(rows[i : i + 1], positions[i : i + 1], sampling)[0]) for i in range(30)]
    assert np.array_equal(together, perturbed(rows, positions, sampling).argmax(axis=1))
    backwards = draw(rows[::-1], positions[::-1], sampling)  # not contiguous
    assert np.array_equal(together, backwards[::-1])


def test_perturbed_is_logits_over_t_plus_noise() -> None:
    rows = np.random.default_rng(4).normal(size=(3, 100)).astype(np.float32)
    sampling = Sampling(temperature=0.7, seed=77)
    expected = rows / np.float64(np.float32(0.7)) + gumbel(77, np.array([4, 5, 6])[:, None], np.arange(100))
    assert np.array_equal(perturbed(rows, [4, 5, 6], sampling), expected)
    assert np.array_equal(perturbed(rows, [4, 5, 6], Sampling()), rows)


def test_logits_are_not_changed() -> None:
    rows = np.random.default_rng(5).normal(size=(2, 100)).astype(np.float32)
    before = rows.copy()
    for sampling in SETTINGS:
        draw(rows, [1, 2], sampling)
        filter_logits(rows, sampling)[:] = 0
        perturbed(rows, [1, 2], sampling)[:] = 0
    assert np.array_equal(rows, before)


# --- how likely a draw was -----------------------------------------------------------------------------------


@given(st.lists(st.floats(-80, 80, width=32), min_size=2, max_size=30), st.data())
def test_log_probabilities_are_those_of_a_softmax(row: list[float], data: st.DataObject) -> None:
    token = data.draw(st.integers(0, len(row) - 1))
    (told,) = log_probabilities(np.array([row], np.float32), [token])
    assert told == pytest.approx(row[token] - max(row) - math.log(sum(math.exp(x - max(row)) for x in row)), abs=1e-9)
    assert told <= 0


def test_log_probabilities_of_rows_are_each_their_own() -> None:
    rows = np.array([[0, 0], [5, -math.inf]], np.float32)
    assert log_probabilities(rows, [1, 0]) == pytest.approx([-math.log(2), 0.0])
