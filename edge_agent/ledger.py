"""What one generation drafted, scored and learnt of it: the labels, and what an audit has still to ask for. Pure.

A label is whether the target drew what the draft had drawn at the same place, on the committed prefix. Verdicts label
what was verified; tokens committed by the gate get theirs from an audit or never. A position without a draft (the
token after a full acceptance) has no label and needs none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from pilotfish.edge_agent.calibration import Labelled
from pilotfish.edge_agent.session import Committed


@dataclass(slots=True)
class Proposal:
    """A drafted token at a position: its score, and once it is committed, how and with which label."""

    id: int
    score: float
    local: bool = False
    agreed: bool | None = None


@dataclass(slots=True)
class Ledger:
    """By position in the sequence. `committed` must be told of every committed token, in order."""

    end: int  # length of the committed ids
    proposals: dict[int, Proposal] = field(default_factory=dict)

    def drafted(self, base: int, ids: Sequence[int], scores: Sequence[float]) -> None:
        """The draft goes on from `base` with these ids; what was proposed there before is forgotten."""
        self._forget(base)
        for offset, (token, score) in enumerate(zip(ids, scores, strict=False)):  # no score, no label
            self.proposals[base + offset] = Proposal(token, score)

    def committed(self, tokens: Sequence[Committed]) -> list[Labelled]:
        """Tokens became final; returns the labels that come with them, up to the first draft that was wrong.

        A draft that went another way says nothing of what comes after.
        """
        labels: list[Labelled] = []
        for token in tokens:
            found = self.proposals.get(self.end)
            if found and token.origin == "local":
                found.local = True
            elif found:
                found.agreed = found.id == token.id
                labels.append(Labelled(found.score, found.agreed))
            if found and found.id != token.id:
                self._forget(self.end + 1)
            self.end += 1
        return labels

    def _forget(self, place: int) -> None:
        """What was proposed from here on; proposals beyond the committed end leave no gaps."""
        while self.proposals.pop(place, None):
            place += 1

    def skip(self, count: int) -> None:
        """Tokens that were committed without a decision; they take no part in what is learnt."""
        self._forget(self.end)
        self.end += count

    def unscored(self, longest: int) -> list[tuple[int, int]]:
        """Spans [start, end) of at most `longest` positions that hold every local token without a label."""
        places = sorted(place for place, one in self.proposals.items() if place < self.end and _blind(one))
        spans: list[tuple[int, int]] = []
        for place in places:
            if spans and place < spans[-1][0] + longest:
                spans[-1] = (spans[-1][0], place + 1)
            else:
                spans.append((place, place + 1))
        return spans

    def scored(self, base: int, draws: Sequence[int]) -> None:
        """The target's draws for [base, base + len(draws)), each on the committed prefix before it."""
        for offset, drawn in enumerate(draws):
            found = self.proposals.get(base + offset)
            if found and base + offset < self.end and _blind(found):
                found.agreed = found.id == drawn

    def labels(self) -> list[Labelled]:
        """Every committed token with a label, in order."""
        known = sorted(
            ((place, one) for place, one in self.proposals.items() if place < self.end), key=lambda pair: pair[0]
        )
        return [Labelled(one.score, one.agreed, one.local) for _, one in known if one.agreed is not None]

    @property
    def local(self) -> int:
        """Tokens the gate committed."""
        return sum(one.local for place, one in self.proposals.items() if place < self.end)

    @property
    def complete(self) -> bool:
        """Whether every committed draft has its label."""
        return all(one.agreed is not None for place, one in self.proposals.items() if place < self.end)


def _blind(proposal: Proposal) -> bool:
    return proposal.local and proposal.agreed is None
