"""Intervals: a paired bootstrap over prompts and seeds (percentiles, 95 %; Efron & Tibshirani 1993, ch. 8).

A prompt is drawn with all its seeds, because answers to one prompt resemble each other, and a seed with all its
prompts, because its agents learnt from the same lessons and the same coins: the two-way bootstrap of Owen (2007), which
errs on the wide side. With one seed there is nothing to draw, and what its agents happened to learn is in no interval.
Both sides of a comparison get the same draws. A comparison whose interval holds "equal" is called "no difference",
whatever the estimate is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from pilotfish.bench.ablation.measures import Measure, Record

RESAMPLES: Final = 2000
SEED: Final = 20_26
FEWEST: Final = 5  # prompts below which no interval is told
LEVELS = (2.5, 97.5)

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate and its 95 % interval, None where there are too few prompts for one."""

    value: float
    low: float | None = None
    high: float | None = None

    def holds(self, value: float) -> bool:
        """Whether the interval cannot exclude it."""
        return self.low is None or self.high is None or self.low <= value <= self.high


@dataclass(frozen=True, slots=True)
class Sums:
    """One figure of some requests, by prompt and seed: what is summed, and by what it is divided."""

    over: Floats  # [prompts, seeds]
    under: Floats  # [prompts, seeds]

    @property
    def prompts(self) -> int:
        """How many."""
        return int(self.over.shape[0])

    @property
    def value(self) -> float | None:
        """None if there is nothing to divide by."""
        under = float(self.under.sum())
        return float(self.over.sum()) / under if under > 0 else None

    def resampled(self) -> Floats:
        """[RESAMPLES] values, nan where a resample has nothing to divide by."""
        prompts, seeds = drawn(self.prompts, SEED), drawn(int(self.over.shape[1]), SEED + 1)
        with np.errstate(divide="ignore", invalid="ignore"):
            found: Floats = ((prompts @ self.over) * seeds).sum(axis=1) / ((prompts @ self.under) * seeds).sum(axis=1)
        return found

    def interval(self) -> Interval | None:
        """The figure, None if there is none."""
        return None if self.value is None else spread(self.value, self.resampled(), self.prompts)


@cache
def drawn(count: int, seed: int) -> Floats:
    """[RESAMPLES, count]: how often each is in each resample; the same for everyone who has as many."""
    chances = np.full(count, 1 / count)
    return np.random.default_rng(seed).multinomial(count, chances, RESAMPLES).astype(np.float64)


def spread(value: float, resampled: Floats, prompts: int) -> Interval:
    """An estimate with the percentiles of its resamples."""
    known = resampled[np.isfinite(resampled)]
    if prompts < FEWEST or not len(known):
        return Interval(value)
    low, high = np.percentile(known, LEVELS)
    return Interval(value, float(low), float(high))


def sums(records: Iterable[Record], measure: Measure) -> Sums:
    """Of one variant."""
    return _by_prompt_and_seed([r for r in records if measure.applies(r)], measure.over, measure.under)


def _by_prompt_and_seed(records: Sequence[Record], over: Callable[[Any], float], under: Callable[[Any], float]) -> Sums:
    prompts = {prompt: place for place, prompt in enumerate(sorted({r["prompt"] for r in records}))}
    seeds = {seed: place for place, seed in enumerate(sorted({r["seed"] for r in records}))}
    above, below = np.zeros((len(prompts), len(seeds))), np.zeros((len(prompts), len(seeds)))
    for record in records:
        place = prompts[record["prompt"]], seeds[record["seed"]]
        above[place] += over(record)
        below[place] += under(record)
    return Sums(above, below)


# --- comparisons ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Comparison:
    """One side against the other: a ratio, or for shares a difference. `verdict` is for people."""

    interval: Interval
    equal: float  # 1 for a ratio, 0 for a difference
    pairs: int
    better: str

    @property
    def verdict(self) -> str:
        """better, worse, higher, lower; "no difference"; "too few prompts"."""
        if self.interval.low is None:
            return "too few prompts"
        if self.interval.holds(self.equal):
            return "no difference"
        word = "higher" if self.interval.value > self.equal else "lower"
        return word if not self.better else "better" if word == self.better else "worse"


def compare(ours: Iterable[Record], theirs: Iterable[Record], measure: Measure) -> Comparison | None:
    """`ours` against `theirs` over the prompts and seeds that both have; None if there are none."""
    one, other = paired(ours, theirs, measure)
    mine, yours = (
        _by_prompt_and_seed(one, measure.over, measure.under),
        _by_prompt_and_seed(other, measure.over, measure.under),
    )
    if mine.value is None or yours.value is None or (not measure.share and yours.value == 0):
        return None
    a, b = mine.resampled(), yours.resampled()
    if measure.share:
        value, resampled, equal = mine.value - yours.value, a - b, 0.0
    else:
        with np.errstate(divide="ignore", invalid="ignore"):
            value, resampled, equal = mine.value / yours.value, a / b, 1.0
    return Comparison(spread(value, resampled, mine.prompts), equal, len(one), measure.better)


def paired(ours: Iterable[Record], theirs: Iterable[Record], measure: Measure) -> tuple[list[Record], list[Record]]:
    """The requests of both sides that have a partner: same prompt, seed and RTT."""
    mine = {(r["prompt"], r["seed"], r["rtt_ms"]): r for r in ours if measure.applies(r)}
    yours = {(r["prompt"], r["seed"], r["rtt_ms"]): r for r in theirs if measure.applies(r)}
    both = sorted(mine.keys() & yours.keys())
    return [mine[key] for key in both], [yours[key] for key in both]


# --- where two lines cross -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class BreakEven:
    """RTT at which two variants are equally fast; `interval` None if they do not cross between those measured.

    `share`: of the resamples, those in which they cross.
    """

    interval: Interval | None
    share: float


def break_even(rtts: Sequence[float], ours: Sequence[Sums], theirs: Sequence[Sums]) -> BreakEven:
    """Of two lines of ms per token over the RTT, straight between neighbours."""
    prompts = min(one.prompts for one in (*ours, *theirs))
    here = crossing(rtts, [_value(a) - _value(b) for a, b in zip(ours, theirs, strict=True)])
    gaps = np.stack([a.resampled() - b.resampled() for a, b in zip(ours, theirs, strict=True)], axis=1)
    found = np.array([np.nan if (at := crossing(rtts, row)) is None else at for row in gaps])
    return BreakEven(None if here is None else spread(here, found, prompts), float(np.isfinite(found).mean()))


def _value(one: Sums) -> float:
    return float("nan") if one.value is None else one.value


def crossing(places: Sequence[float], gaps: Sequence[float] | Floats) -> float | None:
    """Where a gap first changes its sign, None if it does not."""
    for (x0, y0), (x1, y1) in zip(
        zip(places, gaps, strict=True), list(zip(places, gaps, strict=True))[1:], strict=False
    ):
        if y0 == 0:
            return float(x0)
        if y0 * y1 < 0:
            return float(x0 + (x1 - x0) * y0 / (y0 - y1))
    return float(places[-1]) if len(places) and gaps[-1] == 0 else None
