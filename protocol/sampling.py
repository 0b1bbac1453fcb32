"""The coupled draw: every token, on the edge and in the cloud, is the argmax of filtered logits / T plus hashed noise.

    token(position) = argmax over ids of  filter(logits / T)[id] + gumbel(seed, position, id)

`position` is the absolute index in the sequence of the token being drawn: after a prompt of n tokens the first draw is
at n. The noise depends on nothing else, so two models that read the same prefix agree or differ by ids alone.
Background: Gumbel-max sampling; Daliri et al. 2024, "Coupling without communication and drafter-invariant
speculative decoding".

The definition (`sampling_reference.py` is the same in plain Python, to read; `torch_sampling.py` the cloud's twin):

1. T, top_p and min_p are rounded to float32 first, as vLLM stores them. Logits are float32, all else is float64.
2. T = 0: the highest logit, the lowest id on ties. Filters and seed have no effect.
3. T > 0: logits / T, then min-p, then top-k, then top-p, the order of vLLM 0.32 (both of its model runners).
   Every filter is a threshold on the value: ids with equal logits stay or go together, whatever the order of a sort.
   - min-p keeps the ids with  logit / T >= max / T + log(min_p).
   - top-k keeps the ids whose logit is >= the k-th highest one, counted with repeats: what ties with the k-th stays.
   - top-p renormalises over what min-p and top-k kept, walks the values downwards until their mass is >= p of the
     total, and keeps the ids whose logit is >= the last value walked: the smallest set that reaches p, and its ties.
   top_k = 0, top_p = 1, min_p = 0 switch a filter off. The maximum passes every filter, so none empties a row.
4. The noise: r = murmur3 of four 32-bit words (seed low, seed high, position, id); u = (r + 0.5) / 2^32;
   gumbel = -log(-log(1 - u)). The large values, which win, come from u near 0, where u is finest.
5. The highest sum wins, the lowest id on exact ties.
6. A logit of -inf is an id that cannot be drawn. NaN, +inf or a row of nothing but -inf raise ValueError.

Beside vLLM 0.32.0 (`vllm/v1/worker/gpu/sample/gumbel.py`, `sampler.py`, model runner V2). The same: `murmur3_hash32`
with domain 0, bit for bit (the length 16 is xored in before the finalisation); u and the way round of the logarithms;
the order of the filters, and which side of a threshold stays. Different: (a) vLLM hands its kernel the position of the
last token read (`positions[logits_indices]`), so the noise of its token n is that of our token n - 1: one seed gives
other text there; (b) its noise, division and softmax are fp32, and its fp64 switch hashes 53 bits instead; (c) which of
several equal logits pass top-p depends on its sort. Its V1 runner and its CPU sampler use other noise altogether.

This module does not know models, text, drafts or rounds; it keeps nothing between calls but tables of constants.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from pilotfish.protocol.messages import Sampling

Float32s = npt.NDArray[np.float32]
Float64s = npt.NDArray[np.float64]
Int64s = npt.NDArray[np.int64]
Uint32s = npt.NDArray[np.uint32]

MASK_32 = 0xFFFFFFFF
BLOCK_ELEMENTS = 1 << 15  # rows x vocab handled at once: the temporaries of one block stay in the cache

_C1, _C2, _C3 = np.uint32(0xCC9E2D51), np.uint32(0x1B873593), np.uint32(0xE6546B64)
_F1, _F2 = np.uint32(0x85EBCA6B), np.uint32(0xC2B2AE35)
_LENGTH = np.uint32(16)


# --- the noise -----------------------------------------------------------------------------------------------


def gumbel_hash(seed: int | npt.NDArray[Any], positions: npt.ArrayLike, ids: npt.ArrayLike) -> Uint32s:
    """murmur3 of (seed, position, id) as uint32; the three arguments broadcast.

    Positions and ids are taken modulo 2^32. An array of seeds has dtype uint64, or int64 for its bit pattern.
    """
    seeds, where, tokens = _bits(seed), _bits(positions), _bits(ids)
    shape = np.broadcast_shapes(seeds.shape, where.shape, tokens.shape)
    h = _absorb(np.zeros(1, np.uint32), _key(_low(np.atleast_1d(seeds))))
    h = _absorb(h, _key(_low(np.atleast_1d(seeds >> np.uint64(32)))))
    h = _absorb(h, _key(_low(np.atleast_1d(where))))
    return _finish(_absorb(h, _key(_low(np.atleast_1d(tokens))))).reshape(shape)


def gumbel(seed: int | npt.NDArray[Any], positions: npt.ArrayLike, ids: npt.ArrayLike) -> Float64s:
    """Standard Gumbel noise of (seed, position, id), float64 in [-3.14, 22.88]; the arguments broadcast."""
    return _noise(gumbel_hash(seed, positions, ids))


def _bits(values: Any) -> npt.NDArray[np.uint64]:
    """Integers of any kind as their 64-bit pattern."""
    array = np.asarray(values)
    signed: bool = array.dtype.kind == "i"
    return array.astype(np.int64).view(np.uint64) if signed else array.astype(np.uint64)


def _low(words: npt.NDArray[np.uint64]) -> Uint32s:
    return (words & np.uint64(MASK_32)).astype(np.uint32)


def _key(word: Uint32s) -> Uint32s:
    """The half of a murmur3 step that does not depend on the state."""
    k: Uint32s = word * _C1
    rotated: Uint32s = (k << np.uint32(15)) | (k >> np.uint32(17))
    return rotated * _C2


def _absorb(state: Uint32s, key: Uint32s) -> Uint32s:
    """The other half: mix a key into the state."""
    return _advance(state ^ key)


def _advance(h: Uint32s) -> Uint32s:
    """What follows the xor of state and key, in place."""
    low = h >> 19
    h <<= 13
    h |= low
    h *= np.uint32(5)
    h += _C3
    return h


def _finish(h: Uint32s) -> Uint32s:
    """murmur3's finalisation, in place."""
    h ^= _LENGTH
    h ^= h >> 16
    h *= _F1
    h ^= h >> 13
    h *= _F2
    h ^= h >> 16
    return h


def _noise(r: Uint32s) -> Float64s:
    """-log(-log(1 - u)) for u = (r + 0.5) / 2^32; every step but the logarithms is exact in float64."""
    u = r.astype(np.float64)
    u += 0.5
    u *= -(2.0**-32)
    np.log1p(u, out=u)
    np.negative(u, out=u)
    np.log(u, out=u)
    return np.negative(u, out=u)


@lru_cache(maxsize=8)
def _id_keys(vocab: int) -> Uint32s:
    """The keys of all ids [vocab]: the same for every request, so computed once."""
    keys = _key(np.arange(vocab, dtype=np.uint32))
    keys.flags.writeable = False
    return keys


@lru_cache(maxsize=1024)
def _seed_state(seed: int) -> Uint32s:
    """The state after the two words of a seed, [1]."""
    words = np.array([seed & MASK_32, seed >> 32], np.uint32)
    state = _absorb(_absorb(np.zeros(1, np.uint32), _key(words[:1])), _key(words[1:]))
    state.flags.writeable = False
    return state


# --- the filters ---------------------------------------------------------------------------------------------


def filter_logits(logits: Float32s, sampling: Sampling) -> Float64s:
    """logits / T with -inf where a filter removed the id, [rows, vocab] float64. At T = 0 the logits as they are."""
    rows = _rows(logits)
    temperature = _single(sampling.temperature)
    if temperature == 0:
        return rows.astype(np.float64)
    scaled = rows / np.float64(temperature)
    scaled[rows < _floor(rows, _highest(rows), sampling)] = -np.inf
    return scaled


def _floor(rows: Float32s, top: Float32s, sampling: Sampling) -> Float32s:
    """The lowest logit that min-p, top-k and top-p keep, [rows, 1]; a filter is fully described by it."""
    temperature, top_p, min_p = _single(sampling.temperature), _single(sampling.top_p), _single(sampling.min_p)
    floor = np.full_like(top, -np.inf)
    if min_p > 0:
        likely = rows / np.float64(temperature) >= top / np.float64(temperature) + np.log(min_p)
        floor = np.where(likely, rows, top).min(axis=-1, keepdims=True)
    if 0 < sampling.top_k < rows.shape[1]:
        place = rows.shape[1] - sampling.top_k
        floor = np.maximum(floor, np.partition(rows, place, axis=-1)[:, place : place + 1])
    return np.maximum(floor, _nucleus_floor(rows, top, floor, temperature, top_p)) if top_p < 1 else floor


def _nucleus_floor(rows: Float32s, top: Float32s, floor: Float32s, temperature: float, top_p: float) -> Float32s:
    """The value at which the mass of the highest logits, among those >= floor, reaches top_p; [rows, 1]."""
    kept = np.where(rows >= floor, rows, np.float32(-np.inf))
    values = np.sort(kept, axis=-1)[:, ::-1]
    mass = np.cumsum(np.exp((values - top.astype(np.float64)) / temperature), axis=-1)
    last = np.count_nonzero(mass < top_p * mass[:, -1:], axis=-1, keepdims=True)
    return np.take_along_axis(values, last, axis=-1)


def _single(parameter: float) -> float:
    """A parameter as float32 holds it."""
    return float(np.float32(parameter))


def _rows(logits: Float32s) -> Float32s:
    if logits.ndim != 2 or logits.dtype != np.float32:
        raise ValueError(f"logits are {logits.dtype} {list(logits.shape)}: pass float32 [rows, vocab]")
    return logits


def _highest(rows: Float32s) -> Float32s:
    """The maximum of each row, [rows, 1]; refuses a row nothing can be drawn from."""
    top: Float32s = rows.max(axis=-1, keepdims=True)
    _refuse_undrawable(top)
    return top


def _refuse_undrawable(top: npt.NDArray[Any]) -> None:
    if not np.isfinite(top).all():
        raise ValueError("a row of logits holds NaN or +inf, or only -inf: check the model and its numerics")


# --- the draw ------------------------------------------------------------------------------------------------


def perturbed(logits: Float32s, positions: npt.ArrayLike, sampling: Sampling) -> Float64s:
    """What `draw` takes the argmax of, [rows, vocab] float64; -inf where filtered. The raw logits at T = 0.

    The difference of two entries of a row, in units of logit / T, is the gap by which one id won over the other.
    A filter has an edge of its own: an id that last-bit differences moved across it is -inf here, and has no gap.
    """
    rows = _rows(logits)
    top = _highest(rows)
    temperature = _single(sampling.temperature)
    if temperature == 0:
        return rows.astype(np.float64)
    states = _row_states(sampling.seed, positions)
    if states.shape != top.shape:
        raise ValueError(f"{len(states)} positions for {len(rows)} rows of logits: pass one per row")
    if not _filters(sampling):
        return rows / np.float64(temperature) + _noise(_finish(_absorb(states, _id_keys(rows.shape[1]))))
    return _perturbed_survivors(rows, states, temperature, _floor(rows, top, sampling))


def _perturbed_survivors(rows: Float32s, states: Uint32s, temperature: float, floor: Float32s) -> Float64s:
    """logits / T + noise for the ids >= floor only: hashing is most of the work, and few ids survive a filter."""
    survivors = np.flatnonzero(rows >= floor)
    hashes = _advance((states ^ _id_keys(rows.shape[1])).reshape(-1)[survivors])
    sums = np.full(rows.shape, -np.inf)
    sums.reshape(-1)[survivors] = rows.reshape(-1)[survivors] / np.float64(temperature) + _noise(_finish(hashes))
    return sums


def draw(logits: Float32s, positions: npt.ArrayLike, sampling: Sampling) -> Int64s:
    """The token drawn from each row: logits [rows, vocab] float32, positions [rows] -> ids [rows] int64.

    Raises ValueError for a row that holds NaN or +inf, or nothing but -inf.
    """
    rows = _rows(logits)
    if _single(sampling.temperature) == 0:
        winners: Int64s = rows.argmax(axis=-1)  # a NaN wins an argmax
        _refuse_undrawable(rows[np.arange(len(rows)), winners])
        return winners
    size = max(1, BLOCK_ELEMENTS // rows.shape[1])
    if len(rows) <= size:
        drawn: Int64s = perturbed(rows, positions, sampling).argmax(axis=-1)
        return drawn
    where = np.asarray(positions)
    blocks = [slice(start, start + size) for start in range(0, len(rows), size)]
    return np.concatenate([perturbed(rows[b], where[b], sampling).argmax(axis=-1) for b in blocks])


def log_probabilities(logits: Float32s, ids: npt.ArrayLike) -> list[float]:
    """log softmax of each row of raw logits [rows, vocab] at its id [rows]: temperature 1, no filter, float64."""
    rows = _rows(logits).astype(np.float64)
    shifted = rows - _highest(_rows(logits))
    likely = shifted[np.arange(len(rows)), np.asarray(ids)] - np.log(np.exp(shifted).sum(axis=-1))
    return [min(0.0, float(value)) for value in likely]


def _row_states(seed: int, positions: npt.ArrayLike) -> Uint32s:
    """The state after seed and position, [rows, 1]."""
    return _absorb(_seed_state(seed), _key(_low(_bits(positions))))[:, None]


def _filters(sampling: Sampling) -> bool:
    """Whether any filter is on."""
    return sampling.top_k > 0 or _single(sampling.top_p) < 1 or _single(sampling.min_p) > 0
