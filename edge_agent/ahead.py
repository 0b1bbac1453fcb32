"""What was drafted beyond the committed end, sent or not, with the score of each id.

The session knows what is in flight; this knows what was drafted at all. So a draft outlives a verdict that confirms it,
an epoch that a time-out ended, and a window that was full. Each commit is compared with it: that is where the labels
come from which teach what a score is worth. Pure: no clock, no I/O.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple


class Label(NamedTuple):
    """A score, and whether the target drew the id it was given for."""

    score: float
    agreed: bool


@dataclass(slots=True)
class Ahead:
    """Drafted ids from the committed end on, their scores, and the chance of each to be right if all before it are."""

    ids: list[int] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    chances: list[float] = field(default_factory=list)

    def extend(self, ids: Sequence[int], scores: Sequence[float], chances: Sequence[float]) -> None:
        """More was drafted behind what there is."""
        self.ids += ids
        self.scores += scores
        self.chances += chances

    def commit(self, ids: Sequence[int]) -> list[Label]:
        """These ids are final now. Returns a label for each that was drafted, up to the first that was drafted wrong.

        What stood behind a wrong one continues another text, and is forgotten.
        """
        drafted = zip(self.scores, self.ids, ids, strict=False)
        labels = [Label(score, ours == final) for score, ours, final in drafted]
        wrong = next((at for at, label in enumerate(labels) if not label.agreed), None)
        self._drop(len(ids) if wrong is None else len(self.ids))
        return labels if wrong is None else labels[: wrong + 1]

    def clear(self) -> None:
        """The text went another way."""
        self._drop(len(self.ids))

    def _drop(self, count: int) -> None:
        del self.ids[:count], self.scores[:count], self.chances[:count]
