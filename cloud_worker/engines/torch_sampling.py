"""The coupled draw on tensors, for an engine whose batch mixes requests: every row has its own parameters.

The twin of `protocol/sampling.py`, where the definition stands: the same hash integers, Gumbel noise within 1e-12, the
same draws. CPU and CUDA, no loop over rows. This module does not know requests, drafts or vLLM; `vllm_runner.py` does.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

MASK_32 = 0xFFFFFFFF
UNDRAWABLE = -1  # the "draw" of a row with NaN or +inf, or nothing but -inf: the engine must fail that request
CHUNK_ELEMENTS = {"cpu": 1 << 16, "cuda": 1 << 22}  # rows x vocab at once: in the CPU's cache; 32 MiB a GPU temporary


def gumbel_hash(seeds: Tensor, positions: Tensor, ids: Tensor) -> Tensor:
    """murmur3 of (seed, position, id), int64 in [0, 2^32). int64 arguments broadcast; a seed is the bits of uint64."""
    state = _row_states(seeds, positions)
    return _finish(_absorb(state, _key(ids & MASK_32)))


def gumbel(seeds: Tensor, positions: Tensor, ids: Tensor) -> Tensor:
    """Standard Gumbel noise of (seed, position, id), float64; the arguments broadcast."""
    return _noise(gumbel_hash(seeds, positions, ids))


def _key(word: Tensor) -> Tensor:
    """The half of a murmur3 step that does not depend on the state. A product may wrap: its low 32 bits are right."""
    k = (word * 0xCC9E2D51) & MASK_32
    return (((k << 15) | (k >> 17)) * 0x1B873593) & MASK_32


def _absorb(state: Tensor | int, key: Tensor) -> Tensor:
    """The other half: mix a key into the state."""
    h = key ^ state
    low = h >> 19
    return (
        h.bitwise_left_shift_(13).bitwise_or_(low).bitwise_and_(MASK_32).mul_(5).add_(0xE6546B64).bitwise_and_(MASK_32)
    )


def _finish(h: Tensor) -> Tensor:
    """murmur3's finalisation, in place."""
    h.bitwise_xor_(16)
    h.bitwise_xor_(h >> 16).mul_(0x85EBCA6B).bitwise_and_(MASK_32)
    h.bitwise_xor_(h >> 13).mul_(0xC2B2AE35).bitwise_and_(MASK_32)
    return h.bitwise_xor_(h >> 16)


def _noise(r: Tensor) -> Tensor:
    """-log(-log(1 - u)) for u = (r + 0.5) / 2^32, float64."""
    u = r.double().add_(0.5).mul_(-(2.0**-32))
    return u.log1p_().neg_().log_().neg_()


def _row_states(seeds: Tensor, positions: Tensor) -> Tensor:
    """The state after seed and position."""
    state = _absorb(_absorb(0, _key(seeds & MASK_32)), _key((seeds >> 32) & MASK_32))
    return _absorb(state, _key(positions & MASK_32))


@lru_cache(maxsize=8)
def _id_keys(vocab: int, device: torch.device) -> Tensor:
    """The keys of all ids [vocab]: the same for every request, so computed once."""
    return _key(torch.arange(vocab, dtype=torch.int64, device=device))


@dataclass(frozen=True, slots=True)
class _Params:
    """The parameters of some rows, each [rows] on the CPU, so that deciding what to skip never waits for a GPU."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor

    @classmethod
    def of(cls, vocab: int, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> _Params:
        """Round as the definition says, and switch off (k = vocab, p = 1, min_p = 0) every filter of a T = 0 row."""
        temperature, top_p, min_p = (p.to("cpu", torch.float32).double() for p in (temperature, top_p, min_p))
        top_k = top_k.to("cpu", torch.int64)
        off = temperature == 0
        top_k = torch.where(off | (top_k <= 0), vocab, top_k).clamp(max=vocab)
        return cls(temperature, top_k, top_p.masked_fill(off, 1.0), min_p.masked_fill(off, 0.0))

    def __getitem__(self, rows: slice | Tensor) -> _Params:
        return _Params(self.temperature[rows], self.top_k[rows], self.top_p[rows], self.min_p[rows])


def draw_rows(
    logits: Tensor, seeds: Tensor, positions: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor
) -> Tensor:
    """The token drawn from each row of logits [rows, vocab] float32; int64 [rows] on their device.

    Logits are not changed. The other arguments are [rows]: seeds int64 (the bits of a uint64), positions and top_k
    integers, the rest floats, which are rounded to float32. They may be on either device; on the CPU they cost no
    synchronisation. A row that nothing can be drawn from yields UNDRAWABLE: the caller must look for it.
    """
    if logits.dim() != 2 or logits.dtype != torch.float32:
        raise ValueError(f"logits are {logits.dtype} {list(logits.shape)}: pass float32 [rows, vocab]")
    params = _Params.of(logits.shape[1], temperature, top_k, top_p, min_p)
    if not params.temperature.any():
        return _drawn(logits)
    states = _row_states(seeds.long(), positions.long()).to(logits.device)
    size = max(1, CHUNK_ELEMENTS[logits.device.type] // logits.shape[1])
    chunks = [slice(start, start + size) for start in range(0, len(logits), size)]
    return torch.cat([_drawn(_perturbed(logits[c], states[c], params[c])) for c in chunks])


def _perturbed(logits: Tensor, states: Tensor, params: _Params) -> Tensor:
    """What the draw takes the argmax of, [rows, vocab] float64: the logits themselves in rows with T = 0."""
    vocab, device = logits.shape[1], logits.device
    temperature = params.temperature.to(device)[:, None]
    sums = _noise(_finish(_absorb(states[:, None], _id_keys(vocab, device))))
    sums.mul_(temperature > 0)
    sums += logits / torch.where(temperature > 0, temperature, 1.0)
    filtered = (params.min_p > 0) | (params.top_k < vocab) | (params.top_p < 1)
    if filtered.any():
        sums.masked_fill_(logits < _floor(logits, params), -torch.inf)
    return sums


def _drawn(sums: Tensor) -> Tensor:
    """Argmax of each row, the lowest id on ties; UNDRAWABLE where the maximum is not finite (a NaN wins a maximum)."""
    highest, winners = sums.max(dim=-1)
    return torch.where(highest.isfinite(), winners, UNDRAWABLE)


# --- the filters: the lowest logit that stays, [rows, 1]; only the rows that ask for one pay for it -------------------


def _floor(logits: Tensor, params: _Params) -> Tensor:
    """The lowest logit that min-p, top-k and top-p keep."""
    floor = logits.new_full((len(logits), 1), -torch.inf)
    for asks, raise_floor in (
        (params.min_p > 0, _min_p_floor),
        (params.top_k < logits.shape[1], _top_k_floor),
        (params.top_p < 1, _nucleus_floor),
    ):
        if asks.any():
            rows = asks.nonzero().squeeze(1)
            there = rows.to(logits.device)
            floor[there] = raise_floor(logits[there], floor[there], params[rows])
    return floor


def _min_p_floor(rows: Tensor, floor: Tensor, params: _Params) -> Tensor:
    temperature, log_min_p = params.temperature.to(rows.device)[:, None], params.min_p.log().to(rows.device)[:, None]
    top = rows.amax(dim=-1, keepdim=True)
    likely = rows / temperature >= top / temperature + log_min_p
    return torch.where(likely, rows, top).amin(dim=-1, keepdim=True)


def _top_k_floor(rows: Tensor, floor: Tensor, params: _Params) -> Tensor:
    values = rows.topk(int(params.top_k.max()), dim=-1).values
    return torch.maximum(floor, values.gather(1, (params.top_k - 1).to(rows.device)[:, None]))


def _nucleus_floor(rows: Tensor, floor: Tensor, params: _Params) -> Tensor:
    """The value at which the mass of the highest logits, among those >= floor, reaches top_p."""
    temperature, top_p = params.temperature.to(rows.device)[:, None], params.top_p.to(rows.device)[:, None]
    values = _descending(rows.masked_fill(rows < floor, -torch.inf))
    mass = ((values.double() - values[:, :1].double()) / temperature).exp_().cumsum(dim=-1)
    last = (mass < top_p * mass[:, -1:]).sum(dim=-1, keepdim=True)
    return values.gather(1, last.clamp_(max=rows.shape[1] - 1))


def _descending(values: Tensor) -> Tensor:
    """Each row sorted, NaN first. On the CPU by numpy, ten times as fast as torch, which sorts the indices as well."""
    if values.device.type == "cpu":
        return torch.from_numpy(np.sort(values.numpy(), axis=-1)).flip(-1)
    return values.sort(dim=-1, descending=True).values
