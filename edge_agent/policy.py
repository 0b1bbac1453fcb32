"""How far to draft, when to send, and whether to draft at all. Pure: no clock, no I/O, no model.

A generation is a renewal process: a round costs time and commits tokens, and speed is E[tokens] / E[time]. Such a ratio
is largest for the policy that maximises E[tokens] - rate * E[time] at the rate it thereby reaches (Dinkelbach 1967, "On
nonlinear fractional programming"; for renewal processes Ross 1970, "Applied probability models", ch. 7). Hence the
stop rule, which has nothing to tune: one more token is worth drafting while

    P(all drafted so far are right) * P(the next one is)  >=  rate * (t_d + c_row)

with the rate just measured, the drafter's ms per token, and the price of a row that the worker sends. The rate of *any*
policy is at most the best one, so a rate that lags is too low and drafts too long, never stuck: the next measurement is
higher, and so on (Dinkelbach's iteration, superlinear). It falls as the round trip grows, so drafts lengthen by
themselves.

With a window the drafter does not wait for verdicts. Its time is then free while one is away, and what is left to
decide is how many ids to send at once: a rejection is known t_d later for each id that a batch is held back for, but a
job costs the engine a pass. A batch leaves when what holding it is expected to have cost reaches the price of a job
(the balance of the economic order quantity, Harris 1913).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from math import prod
from operator import mul
from typing import Protocol

from pilotfish.edge_agent.calibration import Labelled

FIRST_RATE = 0.5  # before anything is measured: draft while the whole draft is more likely right than not
MEMORY = 10.0  # rounds that an average looks back on
TRIALS = 4  # cycles of drafting before the cloud may take over, and each time before it does so again
STRETCH, STRETCH_MAX = 16, 1024  # tokens the cloud writes by itself; doubled while drafting still measures slower


@dataclass(slots=True)
class Ratio:
    """Sum of amounts over sum of weights, each forgotten over about `memory` additions."""

    memory: float = MEMORY
    amount: float = 0.0
    weight: float = 0.0

    def add(self, amount: float, weight: float = 1.0) -> None:
        """One observation."""
        self.fade(1 - 1 / self.memory)
        self.amount += amount
        self.weight += weight

    def fade(self, keep: float) -> None:
        """Trust what was observed less."""
        self.amount *= keep
        self.weight *= keep

    def value(self, default: float) -> float:
        """`default` before anything was observed."""
        return self.amount / self.weight if self.weight else default


@dataclass(slots=True)
class Pace:
    """What an agent has measured of itself and one target; its generations share it, most are too short to learn alone.

    Times are ms. Prefill counts nowhere: it is paid once whatever the policy does.
    """

    token: Ratio = field(default_factory=Ratio)  # t_d: ms of the drafter per token
    trip: Ratio = field(default_factory=Ratio)  # ms between a job and its verdict that the engine did not take
    job: Ratio = field(default_factory=Ratio)  # ms of the engine per job, rows aside
    step: Ratio = field(default_factory=Ratio)  # ms of the engine per token when it continues by itself
    drafts: Ratio = field(default_factory=lambda: Ratio(2 * MEMORY))  # tokens committed per ms by drafting
    right: Ratio = field(default_factory=lambda: Ratio(20 * MEMORY))  # drafts that were right, of those judged
    row_ms: float = 0.0  # price of a row, as the worker said last
    trials: int = TRIALS  # cycles of drafting to come before the cloud may write by itself
    stretch: int = STRETCH
    ceded: int = 0  # tokens the cloud still writes by itself before drafting is tried again

    @property
    def token_ms(self) -> float:
        """t_d."""
        return self.token.value(1.0)

    @property
    def row_cost(self) -> float:
        """What one more drafted token costs, in ms; a drafter that looks things up may take no time at all."""
        return max(1e-3, self.token_ms + self.row_ms)

    @property
    def rate(self) -> float:
        """Tokens committed per ms of drafting; at least what rounds without any draft are known to reach."""
        if not self.trip.weight:
            return self.drafts.value(FIRST_RATE / self.row_cost)
        undrafted = 1 / max(1e-3, self.trip.value(0.0) + self.job.value(0.0) + self.row_ms)
        return max(self.drafts.value(0.0), undrafted)

    @property
    def hope(self) -> float:
        """Chance that a token not yet drafted will be right; what was not tried for long is thought well of."""
        return (self.right.amount + 1) / (self.right.weight + 1)

    # --- what was measured -----------------------------------------------------------------------------------

    def drafted(self, tokens: int, ms: float) -> None:
        """The drafter took so long for so many."""
        if tokens:
            self.token.add(ms, tokens)

    def verified(self, rows: int, engine_ms: float, trip_ms: float, row_ms: float) -> None:
        """A verdict came: engine time without prefill, and everything else between the job and it."""
        self.row_ms = row_ms
        self.job.add(max(0.0, engine_ms - rows * row_ms))
        self.trip.add(max(0.0, trip_ms))

    def cycle(self, tokens: int, ms: float) -> None:
        """Drafting committed these between two moments with nothing in flight: there the process renews itself."""
        self.drafts.add(tokens, max(ms, 1e-3))
        self.trials = max(0, self.trials - 1)

    def judged(self, labels: Sequence[Labelled]) -> None:
        """Which of the drafted tokens were right, as far as a verdict said; call it for every verdict."""
        self.right.add(sum(label.agreed for label in labels), len(labels))

    def continued(self, tokens: int, engine_ms: float) -> None:
        """The cloud wrote these by itself."""
        if tokens:
            self.step.add(engine_ms, tokens)

    # --- draft, or let the cloud write ------------------------------------------------------------------------

    def alone_rate(self, tokens: int) -> float:
        """Tokens per ms if the cloud writes so many by itself: measured, else as a round's engine time suggests."""
        step = self.step.value(self.job.value(0.0) + self.row_ms)
        return tokens / max(1e-6, self.trip.value(0.0) + tokens * step)

    def cedes(self, remaining: int) -> int:
        """How many tokens the cloud should write by itself now; 0 while drafting measures faster."""
        if not self.ceded and not self.trials:
            if self.alone_rate(min(self.stretch, remaining)) > self.rate:
                self.ceded, self.trials = self.stretch, TRIALS
                self.stretch = min(STRETCH_MAX, 2 * self.stretch)
                self.drafts.fade(0.5)  # what is tried next shall count
            else:
                self.stretch = STRETCH
        return min(self.ceded, remaining) if min(self.ceded, remaining) > 1 else 0

    def wrote(self, tokens: int) -> None:
        """The cloud wrote these of what was left to it."""
        self.ceded -= tokens
        self.ceded *= self.ceded > 1  # a single token is no stretch


class Policy(Protocol):
    """What a generation asks after each token.

    `flying` and `batch`: the chances of ids in flight, and of those not yet sent, each given that all before are right.
    """

    def goes_on(self, flying: Sequence[float], batch: Sequence[float]) -> bool:
        """Whether to draft one more token behind the batch."""
        ...

    def due(self, flying: Sequence[float], batch: Sequence[float]) -> bool:
        """Whether to send a batch that could still grow."""
        ...


@dataclass(frozen=True, slots=True)
class StopRule:
    """Draft while it pays. `window` > 1: drafting goes on while verdicts are away."""

    pace: Pace
    window: int = 1

    def goes_on(self, flying: Sequence[float], batch: Sequence[float]) -> bool:
        """See the module docstring; while a verdict is away, or a batch about to leave, the drafter's time is free."""
        pace, begun = self.pace, bool(flying or batch)
        if pace.trials and not begun:
            return True  # or what drafting is worth could never be learnt anew
        free = self.window > 1 and begun
        cost = pace.row_ms if free else pace.row_cost
        return prod(flying) * prod(batch) * pace.hope >= pace.rate * cost

    def due(self, flying: Sequence[float], batch: Sequence[float]) -> bool:
        """When holding the batch has cost what a job costs; never so often that the window fills before a verdict."""
        if self.window == 1:
            return False
        pace = self.pace
        held = pace.row_cost * sum(1 - chance for chance in accumulate(batch, mul))
        fair_share = (pace.trip.value(0.0) + pace.job.value(0.0)) / self.window
        return held >= pace.job.value(pace.token_ms) and len(batch) * pace.token_ms >= fair_share


@dataclass(frozen=True, slots=True)
class FixedDraft:
    """K tokens each round, whatever they are worth: the baseline."""

    k: int

    def goes_on(self, flying: Sequence[float], batch: Sequence[float]) -> bool:
        """See `Policy.goes_on`."""
        return len(batch) < self.k

    def due(self, flying: Sequence[float], batch: Sequence[float]) -> bool:
        """See `Policy.due`."""
        return len(batch) >= self.k
