"""What was drafted beyond the committed end, sent or not, with the chance of each id.

The session knows what is in flight; this knows what was drafted at all. So a draft outlives a verdict that confirms it,
an epoch that a time-out ended, and a window that was full. Pure: no clock, no I/O.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(slots=True)
class Ahead:
    """Drafted ids from the committed end on, and the chance of each to be right if all before it are."""

    ids: list[int] = field(default_factory=list)
    chances: list[float] = field(default_factory=list)

    def extend(self, ids: Sequence[int], chances: Sequence[float]) -> None:
        """More was drafted behind what there is."""
        self.ids += ids
        self.chances += chances

    def commit(self, ids: Sequence[int]) -> None:
        """These ids are final now. What stood behind one that was drafted wrong continues another text."""
        right = all(ours == final for ours, final in zip(self.ids, ids, strict=False))
        self._drop(len(ids) if right else len(self.ids))

    def clear(self) -> None:
        """The text went another way."""
        self._drop(len(self.ids))

    def _drop(self, count: int) -> None:
        del self.ids[:count], self.chances[:count]
