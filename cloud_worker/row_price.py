"""What one more drafted row costs the engine, in ms: the price a worker tells its edges. Pure.

The slope of engine time over rows, by least squares over recent rounds, older ones forgotten. One observation is made
up, that no rows take no time: while all rounds are of one length the line goes through it, and the price is the mean.
"""

from __future__ import annotations

from dataclasses import dataclass, field

MEMORY = 64.0  # rounds
PREFILL_ROWS = 64  # a round with more rows beyond its draft is a prefill, which has another price


@dataclass(slots=True)
class RowPrice:
    """Feed it rounds, read `ms`."""

    _sums: list[float] = field(default_factory=lambda: [0.0] * 5)  # of 1, x, y, xx, xy

    def add(self, rows: int, drafted: int, engine_ms: float) -> None:
        """One round: rows computed, ids drafted, ms of the engine."""
        if rows <= drafted + PREFILL_ROWS:
            seen = (1.0, rows, engine_ms, rows * rows, rows * engine_ms)
            self._sums = [old * (1 - 1 / MEMORY) + new for old, new in zip(self._sums, seen, strict=True)]

    @property
    def ms(self) -> float:
        """Never below nothing, never above the mean time per row; 0 before the first round."""
        n, x, y, xx, xy = self._sums
        if not x:
            return 0.0
        slope = ((n + 1) * xy - x * y) / ((n + 1) * xx - x * x)
        return min(max(0.0, slope), y / x)
