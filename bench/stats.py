"""Percentiles of latencies, without numpy: the command line imports this package."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, median


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` (0 to 1) of the sample lies, linear between neighbours. ValueError if empty."""
    if not values:
        raise ValueError("there is no percentile of an empty sample")
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """A sample of seconds as a person reads it, in milliseconds."""
    found = {f"p{share * 100:g}_ms": percentile(seconds, share) for share in (0.1, 0.5, 0.9, 0.99)}
    found |= {"mean_ms": fmean(seconds), "max_ms": max(seconds)}
    return {"n": len(seconds), **{name: round(value * 1000, 4) for name, value in found.items()}}


def median_ratio(subject: Sequence[Sequence[float]], baseline: Sequence[Sequence[float]], share: float = 0.5) -> float:
    """Median over pairs of neighbouring blocks of a percentile's ratio: drift hits both of a pair alike."""
    pairs = zip(subject, baseline, strict=True)
    return median(percentile(ours, share) / percentile(theirs, share) for ours, theirs in pairs)
