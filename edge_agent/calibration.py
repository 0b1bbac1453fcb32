"""What a score is worth: score -> probability that the target agrees, learnt from verdicts as they come.

One map per (draft, target, temperature, strategy); the stop rule asks it how far to draft. Scores fall into bins that
are even in log-odds, because the surest scores crowd near 1; per bin only sums are kept, so that maps of several agents
add up. The estimate is isotonic regression over the bins (pool adjacent violators: surer scores are right at least as
often), each pooled block drawn towards one half by PRIOR virtual labels. So a cold map answers 0.5 and a warm one what
was seen. A label may stand for several unlabelled tokens (an audit at share q has weight 1 / q); blocks then count by
Kish's effective size. Labels past a round's first mismatch do not exist, and need not: those prefixes were never
committed.
Pure: no clock, no I/O. Measures: ECE, Guo et al. 2017; Brier 1950.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import floor, log, log1p

import numpy as np
from numpy.typing import NDArray

from pilotfish.edge_agent.confidence import log_odds

Floats = NDArray[np.float64]
Sums = dict[str, Floats]  # what is learnt, by name; two agents' add up

LOWEST, HIGHEST, BINS = -4.0, 12.0, 64  # log-odds of the first edge and the last, and how many bins between them
PRIOR = 4.0
COLD = 0.5


def bin_of(score: float) -> int:
    """The bin of a score in [0, 1]; those beyond the ends fall into the first and the last."""
    inside = min(max(score, 2e-9), 1 - 2e-9)  # without numpy: this runs for every token
    place = floor((log(inside) - log1p(-inside) - LOWEST) / (HIGHEST - LOWEST) * BINS)
    return min(max(place, 0), BINS - 1)


def bins_of(scores: Floats) -> NDArray[np.int64]:
    """The same for many."""
    places = np.floor((log_odds(scores) - LOWEST) / (HIGHEST - LOWEST) * BINS)
    return np.clip(places, 0, BINS - 1).astype(np.int64)


def lower_edge(number: int) -> float:
    """The lowest score of a bin; 0 for the first."""
    if number <= 0:
        return 0.0
    return float(1 / (1 + np.exp(-(LOWEST + (HIGHEST - LOWEST) * number / BINS))))


@dataclass(frozen=True, slots=True)
class Labelled:
    """A drafted token whose label is known; `local`: it was committed without the cloud."""

    score: float
    agreed: bool
    local: bool = False


@dataclass(slots=True)
class Calibration:
    """Sums per bin, each [BINS]: of weights, of their squares, and of the weights whose draft was right."""

    weight: Floats = field(default_factory=lambda: np.zeros(BINS))
    square: Floats = field(default_factory=lambda: np.zeros(BINS))
    agreed: Floats = field(default_factory=lambda: np.zeros(BINS))
    _curve: list[float] | None = None

    def observe(self, score: float, agreed: bool, weight: float = 1.0) -> None:
        """One label: the target drew the token that the draft had scored so, or another."""
        at = bin_of(score)
        self.square[at] += weight * weight  # before the weight: the drafter's thread may be reading
        self.weight[at] += weight
        self.agreed[at] += weight * agreed
        self._curve = None

    def acceptance(self, score: float) -> float:
        """The probability that the target agrees; monotone in the score."""
        curve = self._curve
        if curve is None:
            curve = self._curve = self.curve().tolist()
        return curve[bin_of(score)]

    def curve(self) -> Floats:
        """The acceptance of every bin, [BINS]. A bin without labels has what the nearest surer-than-nothing one has."""
        out = np.full(BINS, np.nan)
        for first, last, weight, square, agreed in self._blocks():
            seen = weight * weight / square
            out[first : last + 1] = (seen * agreed / weight + PRIOR * COLD) / (seen + PRIOR)
        if np.isnan(out).all():
            return np.full(BINS, COLD)
        first_seen = int(np.flatnonzero(~np.isnan(out))[0])
        out[:first_seen] = min(COLD, out[first_seen])
        for at in range(first_seen, BINS):
            out[at] = out[at - 1] if np.isnan(out[at]) else out[at]
        return np.maximum.accumulate(out)

    def _blocks(self) -> list[tuple[int, int, float, float, float]]:
        """Pool adjacent violators: (first bin, last bin, weight, squares, agreed) with rising shares of agreement."""
        blocks: list[tuple[int, int, float, float, float]] = []
        for at in np.flatnonzero(self.weight > 0).tolist():
            blocks.append((at, at, float(self.weight[at]), float(self.square[at]), float(self.agreed[at])))
            while len(blocks) > 1 and blocks[-2][4] * blocks[-1][2] >= blocks[-1][4] * blocks[-2][2]:
                right, left = blocks.pop(), blocks.pop()
                blocks.append((left[0], right[1], left[2] + right[2], left[3] + right[3], left[4] + right[4]))
        return blocks

    # --- keeping ---------------------------------------------------------------------------------------------

    def sums(self) -> Sums:
        """What a store keeps."""
        return {"weight": self.weight.copy(), "square": self.square.copy(), "agreed": self.agreed.copy()}

    def add(self, sums: Sums) -> None:
        """Take in what another agent, or an earlier run, has learnt."""
        self.weight += sums["weight"]
        self.square += sums["square"]
        self.agreed += sums["agreed"]
        self._curve = None

    @property
    def labels(self) -> float:
        """Kish's effective number of labels: that of equally weighted ones with the same variance."""
        squares = float(self.square.sum())
        return float(self.weight.sum()) ** 2 / squares if squares else 0.0


# --- how good a map is, on labels it has not seen ----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Reliability:
    """One bar of a reliability diagram."""

    predicted: float
    observed: float
    labels: int


def reliability(predicted: Floats, agreed: NDArray[np.bool_], bars: int = 10) -> list[Reliability]:
    """Predictions in [0, 1] against what happened, in `bars` even groups; empty ones are left out."""
    group = np.minimum((predicted * bars).astype(int), bars - 1)
    found = []
    for number in range(bars):
        inside = group == number
        if inside.any():
            found.append(Reliability(float(predicted[inside].mean()), float(agreed[inside].mean()), int(inside.sum())))
    return found


def ece(bars: Sequence[Reliability]) -> float:
    """Expected calibration error: the mean distance of predicted and observed, by labels."""
    total = sum(bar.labels for bar in bars)
    return sum(bar.labels * abs(bar.predicted - bar.observed) for bar in bars) / total if total else 0.0


def brier(predicted: Floats, agreed: NDArray[np.bool_]) -> float:
    """The mean squared error of the predictions; 0.25 is what a coin reaches."""
    return float(np.mean((predicted - agreed) ** 2)) if len(predicted) else 0.0
