"""What vLLM's engine, scheduler and runner tell each other of one request. Imports nothing of vLLM.

Engine and scheduler share a `Round`. The runners may live in other processes (tensor parallelism): they get an `Asked`
for every request of a step and give a `Drawn` back, both made to be copied.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from pilotfish.cloud_worker.engines.base import VerifyEvent, VerifyRequest
from pilotfish.protocol.messages import Sampling

_UNDRAWABLE: Final = "The target's logits were not finite, so nothing can be drawn; check its weights and dtype."


@dataclass(frozen=True, slots=True)
class Asked:
    """How to draw. A scored request's draft is the session's text: all of it is accepted, its draws come apart."""

    sampling: Sampling
    score: bool = False
    logprobs: bool = False


@dataclass(slots=True)
class Drawn:
    """Besides the ids of one step: `undrawable` if a row of logits was NaN or infinite; the rest if asked for."""

    undrawable: bool = False
    likely: list[float] = field(default_factory=list)  # log-probabilities of the draws
    scores: list[int] = field(default_factory=list)  # every draw of a scored request


@dataclass(slots=True)
class Round:
    """One request: what to attach, when to stop, what it cost.

    The scheduler empties `draft` when it attaches it, counts `rows`, `steps` and `cached` since the last event, and
    leaves what the runner said of the last step in `drawn`.
    """

    request_id: str
    session: str
    asked: Asked
    draft: list[int]
    continue_tokens: int
    stop_ids: frozenset[int]
    parked_at: float = 0.0  # when its session began to wait for the next round, monotonic seconds
    drawn: Drawn = field(default_factory=Drawn)
    verified: bool = False
    undrawable: bool = False
    rows: int = 0
    steps: int = 0
    cached: int = 0

    @classmethod
    def of(cls, request: VerifyRequest) -> Round:
        """A copy: vLLM and the scheduler change what they are given."""
        return cls(
            request.request_id,
            request.session,
            Asked(request.sampling, request.score, request.logprobs),
            list(request.draft),
            request.continue_tokens,
            frozenset(request.stop_ids),
        )

    def hear(self, drawn: Drawn) -> None:
        """A step's word of the runner; one row that could not be drawn spoils the round."""
        self.drawn = drawn
        self.undrawable |= drawn.undrawable

    def is_over(self, draws: list[int]) -> bool:
        """Whether nothing may follow a step that drew `draws`: the round itself, or one token of the continuation."""
        left = self.continue_tokens - (len(draws) if self.verified else 0)
        return left <= 0 or self.undrawable or not self.stop_ids.isdisjoint(draws)

    def event(self, draws: list[int], done: bool) -> VerifyEvent:
        """The event of a step's draws, with what was spent since the last one."""
        rows, steps, cached = self.rows, self.steps, self.cached
        self.rows = self.steps = self.cached = 0
        if self.undrawable or not draws:
            return VerifyEvent(self.request_id, [], 0, rows, steps, cached, error=_UNDRAWABLE)
        accepted = 0 if self.verified else len(draws) - 1
        if self.asked.score:
            drafted, draws = draws[:-1], self.drawn.scores
            accepted = next((i for i, (a, b) in enumerate(zip(drafted, draws, strict=False)) if a != b), len(drafted))
        if self.verified:
            self.continue_tokens -= len(draws)
        self.verified = True
        likely = self.drawn.likely[: len(draws)]
        return VerifyEvent(self.request_id, draws, accepted, rows, steps, cached, done, logprobs=likely)
