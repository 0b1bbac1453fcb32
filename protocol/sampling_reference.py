"""The coupled draw in plain Python, one id at a time: the definition to read, and the measure of the fast versions.

Same rules as `sampling.py`, written without its shortcuts; nothing but the tests, the oracle and readers should use it.
It shares no code with the fast versions, and knows neither numpy nor torch.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence

from pilotfish.protocol.messages import Sampling

MASK_32 = 0xFFFFFFFF


def rotate(word: int, bits: int) -> int:
    """Rotate a 32-bit word to the left."""
    return ((word << bits) | (word >> (32 - bits))) & MASK_32


def murmur3(words: Sequence[int]) -> int:
    """MurmurHash3_x86_32 of 32-bit words, hash seed 0 (Appleby; public domain)."""
    h = 0
    for word in words:
        k = rotate((word & MASK_32) * 0xCC9E2D51 & MASK_32, 15) * 0x1B873593 & MASK_32
        h = (rotate(h ^ k, 13) * 5 + 0xE6546B64) & MASK_32
    h ^= 4 * len(words)
    h = (h ^ (h >> 16)) * 0x85EBCA6B & MASK_32
    h = (h ^ (h >> 13)) * 0xC2B2AE35 & MASK_32
    return h ^ (h >> 16)


def gumbel_reference(seed: int, position: int, token: int) -> float:
    """Standard Gumbel noise of (seed, position, id)."""
    u = (murmur3([seed & MASK_32, seed >> 32, position, token]) + 0.5) / 2**32
    return -math.log(-math.log1p(-u))


def float32(value: float) -> float:
    """A parameter as float32 holds it."""
    rounded: float = struct.unpack("f", struct.pack("f", value))[0]
    return rounded


def survivors(logits: Sequence[float], sampling: Sampling) -> list[int]:
    """The ids that min-p, top-k and top-p keep, ascending. T > 0; logits are finite or -inf."""
    scaled = [x / float32(sampling.temperature) for x in logits]
    kept = [i for i in range(len(scaled)) if scaled[i] > -math.inf]
    if float32(sampling.min_p) > 0:
        bound = max(scaled) + math.log(float32(sampling.min_p))
        kept = [i for i in kept if scaled[i] >= bound]
    if 0 < sampling.top_k < len(kept):
        kth = sorted((scaled[i] for i in kept), reverse=True)[sampling.top_k - 1]
        kept = [i for i in kept if scaled[i] >= kth]
    if float32(sampling.top_p) < 1:
        last = last_of_nucleus([scaled[i] for i in kept], float32(sampling.top_p))
        kept = [i for i in kept if scaled[i] >= last]
    return kept


def last_of_nucleus(scaled: Sequence[float], top_p: float) -> float:
    """Walk the values downwards; the one at which their mass reaches top_p of the total."""
    descending = sorted(scaled, reverse=True)
    weights = [math.exp(x - descending[0]) for x in descending]
    needed, mass = top_p * math.fsum(weights), 0.0
    for value, weight in zip(descending, weights, strict=True):
        mass += weight
        if mass >= needed:
            return value
    return descending[-1]


def law(logits: Sequence[float], sampling: Sampling) -> list[float]:
    """The exact probability of every id under `draw`, over seeds: the softmax of what the filters keep."""
    if float32(sampling.temperature) == 0:
        winner = draw_reference(logits, 0, sampling)
        return [float(i == winner) for i in range(len(logits))]
    top, kept = max(logits), set(survivors(logits, sampling))
    weights = [math.exp((x - top) / float32(sampling.temperature)) if i in kept else 0.0 for i, x in enumerate(logits)]
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def draw_reference(logits: Sequence[float], position: int, sampling: Sampling) -> int:
    """The token drawn at a position. Raises ValueError for NaN, +inf or nothing but -inf."""
    if any(math.isnan(x) or x == math.inf for x in logits) or max(logits) == -math.inf:
        raise ValueError("the logits hold NaN or +inf, or only -inf: check the model and its numerics")
    temperature = float32(sampling.temperature)
    if temperature == 0:
        return max(range(len(logits)), key=lambda i: logits[i])  # max() takes the first of equals
    sums = {
        i: logits[i] / temperature + gumbel_reference(sampling.seed, position, i) for i in survivors(logits, sampling)
    }
    return max(sums, key=lambda i: sums[i])
