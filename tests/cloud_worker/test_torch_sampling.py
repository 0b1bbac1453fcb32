"""The torch twin of the coupled draw: the same integers, the same noise, the same tokens as numpy, row by row."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pilotfish.protocol import sampling as numpy_sampling
from pilotfish.protocol.messages import MAX_CONTEXT, SEED_MAX, Sampling

torch = pytest.importorskip("torch")
torch_sampling = pytest.importorskip("pilotfish.cloud_worker.engines.torch_sampling")
pytestmark = pytest.mark.torch

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
on_every_device = pytest.mark.parametrize("device", DEVICES)


def signed(seeds: npt.NDArray[np.uint64]) -> Any:
    """Seeds as torch holds them: int64 with the same bits."""
    return torch.from_numpy(seeds.view(np.int64))


def params(batch: list[Sampling], float_type: Any = None) -> dict[str, Any]:
    """The tensors of a batch, one row a request."""
    floats = {name: [getattr(s, name) for s in batch] for name in ("temperature", "top_p", "min_p")}
    return {
        "seeds": signed(np.array([s.seed for s in batch], np.uint64)),
        "top_k": torch.tensor([s.top_k for s in batch], dtype=torch.int32),
        **{name: torch.tensor(values, dtype=float_type or torch.float64) for name, values in floats.items()},
    }


def draw_rows(rows: npt.NDArray[np.float32], positions: Any, batch: list[Sampling], device: str = "cpu") -> list[int]:
    """`draw_rows` on numpy arrays; logits on the device, parameters on the CPU."""
    logits = torch.from_numpy(np.ascontiguousarray(rows)).to(device)
    drawn = torch_sampling.draw_rows(logits, positions=torch.as_tensor(positions), **params(batch))
    assert drawn.dtype == torch.int64
    assert drawn.device.type == device
    tokens: list[int] = drawn.tolist()
    return tokens


def draw_one_by_one(rows: npt.NDArray[np.float32], positions: Any, batch: list[Sampling]) -> list[int]:
    """The same by numpy, each row with its own request."""
    return [int(numpy_sampling.draw(rows[i : i + 1], positions[i : i + 1], s)[0]) for i, s in enumerate(batch)]


GRID = [
    Sampling(temperature=t, top_k=k, top_p=p, min_p=m)
    for t, k, p, m in itertools.product((0.0, 0.7, 1.0, 1.6), (0, 5), (1.0, 0.9), (0.0, 0.05))
]


def mixed_batch(n_rows: int, seed: int) -> list[Sampling]:
    """Requests of every setting, each with its own seed."""
    seeds = np.random.default_rng(seed).integers(0, 2**64, n_rows, dtype=np.uint64).tolist()
    return [GRID[i % len(GRID)].model_copy(update={"seed": s}) for i, s in enumerate(seeds)]


# --- noise -----------------------------------------------------------------------------------------------------------


@on_every_device
def test_a_million_hash_integers_are_identical_and_noise_agrees(device: str) -> None:
    rng = np.random.default_rng(1)
    seeds = rng.integers(0, 2**64, 1 << 20, dtype=np.uint64)
    positions, ids = rng.integers(0, MAX_CONTEXT, 1 << 20), rng.integers(0, 2**31, 1 << 20)
    tensors = [t.to(device) for t in (signed(seeds), torch.from_numpy(positions), torch.from_numpy(ids))]
    hashed = torch_sampling.gumbel_hash(*tensors).cpu().numpy()
    assert np.array_equal(hashed, numpy_sampling.gumbel_hash(seeds, positions, ids))
    noise = torch_sampling.gumbel(*tensors).cpu().numpy()
    assert np.abs(noise - numpy_sampling.gumbel(seeds, positions, ids)).max() <= 1e-12


@on_every_device
def test_noise_agrees_at_the_ends_of_the_hash(device: str) -> None:
    hashed = np.array([0, 1, 2, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1], np.uint32)
    noise = torch_sampling._noise(torch.from_numpy(hashed.astype(np.int64)).to(device)).cpu().numpy()
    assert np.abs(noise - numpy_sampling._noise(hashed)).max() <= 1e-12


@given(seed=st.integers(0, SEED_MAX), position=st.integers(0, MAX_CONTEXT), token=st.integers(0, 2**31 - 1))
def test_any_integer_is_identical(seed: int, position: int, token: int) -> None:
    seeds = np.array([seed], np.uint64)
    hashed = torch_sampling.gumbel_hash(signed(seeds), torch.tensor([position]), torch.tensor([token]))
    assert int(hashed[0]) == int(numpy_sampling.gumbel_hash(seed, position, token))


# --- draws -----------------------------------------------------------------------------------------------------------


@on_every_device
def test_a_million_draws_are_equal(device: str) -> None:
    groups, each, vocab = 128, 8192, 16  # 128 requests, every setting 8 times; 2^20 rows
    rng = np.random.default_rng(2)
    batch = mixed_batch(groups, seed=3)
    rows = (rng.normal(size=(groups * each, vocab)) * 3).astype(np.float32)
    rows[::4] = rows[::4].round()  # a quarter of the rows full of ties
    positions = rng.integers(0, MAX_CONTEXT, groups * each)
    ours = np.concatenate(
        [numpy_sampling.draw(rows[i::groups], positions[i::groups], sampling) for i, sampling in enumerate(batch)]
    )
    expected = ours.reshape(groups, each).T.ravel()  # row r belongs to request r % groups: a batch that mixes
    tensors = {name: tensor.repeat(each) for name, tensor in params(batch).items()}
    logits = torch.from_numpy(rows).to(device)
    drawn = torch_sampling.draw_rows(logits, positions=torch.from_numpy(positions), **tensors).cpu().numpy()
    assert (drawn != expected).sum() == 0


@on_every_device
@pytest.mark.parametrize(("n_rows", "vocab"), [(160, 4096), (32, 32_000), (16, 151_936)])
def test_wide_rows_are_equal(n_rows: int, vocab: int, device: str) -> None:
    rows = (np.random.default_rng(vocab).normal(size=(n_rows, vocab)) * 2.5).astype(np.float32)
    batch, positions = mixed_batch(n_rows, seed=vocab), np.arange(n_rows)
    assert draw_rows(rows, positions, batch, device) == draw_one_by_one(rows, positions, batch)


logit = st.one_of(st.floats(-30, 30, width=32), st.integers(-3, 3).map(float), st.just(-np.inf))
samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.01, 0.7, 1.0, 5.0, 100.0]),
    top_k=st.sampled_from([0, 1, 2, 5, 2**31 - 1]),
    top_p=st.sampled_from([1.0, 0.999, 0.9, 0.5, 0.1]),
    min_p=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
    seed=st.integers(0, SEED_MAX),
)
batches = st.integers(1, 12).flatmap(
    lambda vocab: st.lists(
        st.tuples(
            st.lists(logit, min_size=vocab, max_size=vocab).filter(lambda row: max(row) > -np.inf),
            st.integers(0, MAX_CONTEXT),
            samplings,
        ),
        min_size=1,
        max_size=6,
    )
)


@settings(max_examples=200)
@given(batch=batches)
def test_any_batch_is_equal(batch: list[tuple[list[float], int, Sampling]]) -> None:
    rows = np.array([row for row, _, _ in batch], np.float32)
    positions, requests = np.array([position for _, position, _ in batch]), [sampling for _, _, sampling in batch]
    assert draw_rows(rows, positions, requests) == draw_one_by_one(rows, positions, requests)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.random.default_rng(4).normal(size=(37, 50)).astype(np.float32)
    batch, positions = mixed_batch(37, seed=5), np.arange(37)
    whole = draw_rows(rows, positions, batch)
    monkeypatch.setitem(torch_sampling.CHUNK_ELEMENTS, "cpu", 50 * 4)
    assert draw_rows(rows, positions, batch) == whole
    monkeypatch.setitem(torch_sampling.CHUNK_ELEMENTS, "cpu", 1)
    assert draw_rows(rows, positions, batch) == whole


def test_parameters_may_be_float32_or_float64() -> None:
    rows = torch.from_numpy(np.random.default_rng(6).normal(size=(64, 500)).astype(np.float32))
    batch, positions = mixed_batch(64, seed=7), torch.arange(64)
    single, double = (params(batch, float_type) for float_type in (torch.float32, torch.float64))
    drawn = [torch_sampling.draw_rows(rows, positions=positions, **p).tolist() for p in (single, double)]
    assert drawn[0] == drawn[1]


def test_rows_without_filters_are_never_sorted(monkeypatch: pytest.MonkeyPatch) -> None:
    def sorted_after_all(*_: Any) -> None:
        raise AssertionError("a filter ran for rows that have none")

    monkeypatch.setattr(torch_sampling, "_floor", sorted_after_all)
    rows = np.random.default_rng(8).normal(size=(3, 50)).astype(np.float32)
    filters = {"top_k": 3, "top_p": 0.5, "min_p": 0.5}
    greedy, plain, everything = Sampling(**filters), Sampling(temperature=1.0), Sampling(temperature=1.0, top_k=50)
    draw_rows(rows, np.arange(3), [greedy, plain, everything])  # T = 0 ignores filters, k = vocab is none
    with pytest.raises(AssertionError, match="a filter ran"):
        draw_rows(rows, np.arange(3), [greedy, plain, Sampling(temperature=1.0, top_k=49)])


# --- edges -----------------------------------------------------------------------------------------------------------


@on_every_device
@pytest.mark.parametrize(
    "company", [Sampling(), Sampling(temperature=1.0), Sampling(temperature=1.0, top_k=2, top_p=0.9, min_p=0.1)]
)
def test_a_broken_row_is_undrawable_and_harms_no_other(company: Sampling, device: str) -> None:
    nan, inf = np.nan, np.inf
    rows = np.array(
        [[0, nan, 1], [0, inf, 1], [-inf, -inf, -inf], [inf, inf, nan], [0, 1, 2], [-inf, 3, -inf]], np.float32
    )
    positions, batch = np.arange(6), [company] * 6
    drawn = draw_rows(rows, positions, batch, device)
    assert drawn[:4] == [torch_sampling.UNDRAWABLE] * 4
    assert drawn[4:] == draw_one_by_one(rows[4:], positions[4:], batch[4:])


@on_every_device
def test_the_lowest_id_wins_an_exact_tie(device: str) -> None:
    rows = np.zeros((4, 40_000), np.float32)
    rows[:, [7, 70, 7_000, 39_999]] = 5
    assert draw_rows(rows, np.arange(4), [Sampling()] * 4, device) == [7] * 4
    tiny = Sampling(temperature=1e-30)  # the noise is below one ulp of logit / T
    assert draw_rows(rows, np.arange(4), [tiny] * 4, device) == [7] * 4


def test_logits_stay_as_they_are_and_may_be_a_view() -> None:
    logits = torch.randn(6, 80)[::2, ::2]
    before, batch = logits.clone(), mixed_batch(3, seed=9)
    drawn = torch_sampling.draw_rows(logits, positions=torch.arange(3), **params(batch))
    assert torch.equal(logits, before)
    assert drawn.tolist() == draw_one_by_one(before.numpy(), np.arange(3), batch)


def test_no_rows_no_draws() -> None:
    assert draw_rows(np.zeros((0, 8), np.float32), np.zeros(0, np.int64), []) == []


def test_half_precision_is_refused() -> None:
    with pytest.raises(ValueError, match="pass float32"):
        torch_sampling.draw_rows(torch.zeros(1, 4).bfloat16(), positions=torch.arange(1), **params([Sampling()]))


def test_inference_mode_changes_nothing() -> None:
    rows = np.random.default_rng(10).normal(size=(32, 123)).astype(np.float32)
    batch, positions = mixed_batch(32, seed=11), np.arange(32)
    with torch.inference_mode():
        inside = draw_rows(rows, positions, batch)
    assert draw_rows(rows, positions, batch) == inside
