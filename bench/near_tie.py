"""When two honest runs may part: the numerical noise of an engine, and whether it explains a difference.

A pass over K + 1 rows and a pass over one row differ in the last bits. Two draws of the same row are *explained* if
each can be had from the row by moving logits against each other by less than 8 times the largest difference measured
in this run (DESIGN §10). Without filters that is the gap between the two perturbed logits; with them it also covers
an id that crosses the edge of a filter, where it has no gap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pilotfish.bench.logit_probe import Answer, Ask, Probe
from pilotfish.protocol.messages import Sampling
from pilotfish.protocol.sampling import Float32s, Float64s, draw, perturbed

FACTOR = 8
K = 8


@dataclass(frozen=True, slots=True)
class Noise:
    """Largest differences of one logit between a round of K + 1 rows and the continuation that draws the same ids."""

    rows: int  # compared each way
    alone: float  # nothing else in the engine
    in_company: float  # the same round beside those of other sessions
    margins: tuple[
        float, ...
    ] = ()  # of each row at T = 1, sorted: how far the second highest perturbed value lies below

    @property
    def bound(self) -> float:
        """Logits further apart than this are no near-tie."""
        return FACTOR * max(self.alone, self.in_company)


def measure(probe: Probe, prefixes: Sequence[tuple[int, ...]]) -> Noise:
    """Over prefixes of the run itself: decode K + 1 tokens one pass each, then verify them as drafts in one pass."""
    decoded = [probe.answers(Ask(f"decode{n}", prefix, (), K))[0] for n, prefix in enumerate(prefixes)]
    rounds = [(prefix, found.draws[:K]) for prefix, found in zip(prefixes, decoded, strict=True)]
    alone = [probe.answers(Ask(f"alone{n}", *one))[0] for n, one in enumerate(rounds)]
    together = probe.answers(*(Ask(f"together{n}", *one) for n, one in enumerate(rounds)))
    margins = sorted(
        _margin(row, len(prefix) + at)
        for prefix, found in zip(prefixes, decoded, strict=True)
        for at, row in enumerate(found.rows)
    )
    return Noise(len(margins), _largest(decoded, alone), _largest(decoded, together), tuple(margins))


def _margin(row: Float32s, position: int) -> float:
    second, first = np.sort(_scores(row, position, Sampling(temperature=1.0, seed=1)))[-2:]
    return float(first - second)


def _largest(some: Sequence[Answer], others: Sequence[Answer]) -> float:
    return max(float(np.abs(a.rows - b.rows).max()) for a, b in zip(some, others, strict=True))


def gap(row: Float32s, position: int, ids: tuple[int, int], sampling: Sampling) -> float:
    """Between the perturbed values of two ids, filters aside, in units of logits; row [vocab]."""
    scores = _scores(row, position, sampling)
    return float(abs(scores[ids[0]] - scores[ids[1]])) * (sampling.temperature or 1.0)


def explained(row: Float32s, position: int, ids: tuple[int, int], sampling: Sampling, bound: float) -> bool:
    """Whether logits that are off by less than `bound` against each other could have drawn either id."""
    return all(_reachable(row, position, token, sampling, bound) for token in ids)


def _reachable(row: Float32s, position: int, token: int, sampling: Sampling, bound: float) -> bool:
    """Raise the wanted id by half the bound, lower by as much whatever beats it, and draw again."""
    scores = _scores(row, position, sampling)
    nudged = row.astype(np.float64)
    nudged[scores > scores[token]] -= bound / 2
    nudged[token] += bound / 2
    drawn = draw(nudged.astype(np.float32)[None], np.array([position]), sampling)
    return int(drawn[0]) == token


def _scores(row: Float32s, position: int, sampling: Sampling) -> Float64s:
    """Perturbed values with every filter off, so that none is -inf."""
    free = sampling.model_copy(update={"top_k": 0, "top_p": 1.0, "min_p": 0.0})
    scores: Float64s = perturbed(row[None], np.array([position]), free)[0]
    return scores
