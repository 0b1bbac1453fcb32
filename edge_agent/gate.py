"""When a drafted token may be committed without the cloud, so that the loss stays within a budget. Pure.

The loss, as DESIGN section 8 defines it: locally committed tokens that differ from the target's draw on the committed
prefix, over all emitted tokens. The gate commits tokens that score at least a threshold; the choice of the threshold
is the promise. It is Learn-then-Test (Angelopoulos, Bates, Candes, Jordan & Lei 2021) with a betting e-process in the
manner of Waudby-Smith & Ramdas (2024). For a threshold let X_t = 1 if token t scores at least that and the draft was
wrong, p_t the chance of it given everything before t. For every bet 0 < c < 1

    M_t = product over tokens of  (1 - c)^X e^(c p)     is a supermartingale, because 1 - c p <= e^(-c p).

If the tokens' mean chance were over the budget b, then e^(c b n) (1 - c)^wrong <= M_n; so by Ville's inequality this
wealth, averaged over several bets, passes 1 / (1 - confidence) with a probability of at most 1 - confidence, at any
time, whatever the tokens depend on: prompts, prefixes, each other, earlier decisions. Thresholds are nested, so one
test goes from the surest bin down and stops at the first failure. Errors come in clusters (a request that repeats
itself repeats its mistake), and the next requests will have other clusters; so the wealth must pass that bound to the
power of the dispersion, the variance of errors per request over their mean, where it is above 1. Asking for more wealth
keeps the promise, and makes it hold for what will be measured too (`bench gate`, random splits).

What the promise covers: the labelled tokens' chance of disagreement, with the stated confidence. That later requests
behave like the labelled ones is not promised by anyone; it is watched. A share of requests, chosen by a coin before
anything of them is known, is audited: all their local tokens are scored by the target afterwards. Audited requests
are the only ones of an open gate that count as evidence: all of their tokens have labels, while a request that was
verified in full because it was hard has labels too, and would flatter the figure. The gate's own commits are thus
part of what it learns from. `Watch` tests the audited tokens against the budget with an e-detector (Shin, Ramdas &
Rinaldo 2023, Shiryaev-Roberts form); an alarm shuts the gate and forgets, and everything is verified until new
evidence opens it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import exp, inf, log, log1p

import numpy as np

from pilotfish.edge_agent.calibration import BINS, Floats, Labelled, Sums, bin_of

CONFIDENCE = 0.95
BETS = tuple(0.9 / 1.5**i for i in range(12))  # 0.9 ... 0.01: best for few errors, and for hundreds
FALSE_ALARM_EVERY = 200  # disagreements within the budget, on average, at the least
ODDS = (1.0, 2.0, 4.0, 8.0)  # the watch's bets: best when the disagreement is 2, 3, 5, 9 times the budget


@dataclass(slots=True)
class Evidence:
    """Tokens of requests all of whose drafted tokens have labels: how many, and how many wrong, by bin of the score.

    `squared`: the sum over requests of (wrong tokens that score at least the bin) squared.
    """

    seen: Floats = field(default_factory=lambda: np.zeros(BINS))
    wrong: Floats = field(default_factory=lambda: np.zeros(BINS))
    squared: Floats = field(default_factory=lambda: np.zeros(BINS))
    requests: Floats = field(default_factory=lambda: np.zeros(1))

    def observe(self, tokens: Iterable[Labelled]) -> None:
        """One request."""
        wrong = np.zeros(BINS)
        for token in tokens:
            at = bin_of(token.score)
            self.seen[at] += 1
            wrong[at] += not token.agreed
        self.wrong += wrong
        self.squared += from_above(wrong) ** 2
        self.requests += 1

    @property
    def tokens(self) -> int:
        """Labelled tokens."""
        return int(self.seen.sum())

    def wrong_from(self, bin: int) -> int:
        """Wrong tokens that score at least the bin."""
        return int(self.wrong[bin:].sum())

    def dispersion(self, bin: int) -> float:
        """Variance of the wrong tokens per request over their mean, at least 1 (which is Poisson's)."""
        mean = self.wrong_from(bin) / max(1.0, float(self.requests[0]))
        return max(1.0, float(self.squared[bin]) / float(self.requests[0]) / mean - mean) if mean else 1.0

    def share_from(self, bin: int) -> float:
        """The share of tokens that score at least the bin: what a gate with this threshold leaves unverified."""
        return float(self.seen[bin:].sum()) / self.tokens if self.tokens else 0.0

    def sums(self) -> Sums:
        """What a store keeps."""
        return {name: getattr(self, name).copy() for name in ("seen", "wrong", "squared", "requests")}

    def add(self, sums: Sums) -> None:
        """Take in what another agent, or an earlier run, has seen."""
        for name, mine in (("seen", self.seen), ("wrong", self.wrong), ("squared", self.squared)):
            mine += sums[name]
        self.requests += sums["requests"]


def from_above(by_bin: Floats) -> Floats:
    """Sums over each bin and all above it, along the last axis."""
    found: Floats = np.cumsum(by_bin[..., ::-1], axis=-1)[..., ::-1]
    return found


# --- the threshold -------------------------------------------------------------------------------------------


def log_wealth(wrong: int, tokens: int, budget: float) -> float:
    """Log of the mean over BETS of e^(c budget tokens) (1 - c)^wrong: how strongly `wrong` speaks for the budget."""
    each = [bet * budget * tokens + wrong * log1p(-bet) for bet in BETS]
    top = max(each)
    return top + log(sum(exp(one - top) for one in each) / len(each))


def upper_bound(wrong: int, tokens: int, confidence: float = CONFIDENCE, dispersion: float = 1.0) -> float:
    """The smallest rate of disagreement the labels speak against, in [0, 1]: an anytime-valid upper bound."""
    needed = -log(1 - confidence) * dispersion
    if tokens == 0 or log_wealth(wrong, tokens, 1.0) < needed:
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if log_wealth(wrong, tokens, middle) < needed else (low, middle)
    return high


def bound_from(evidence: Evidence, bin: int, confidence: float = CONFIDENCE) -> float:
    """The same for a gate that commits from a bin on; 0 for one that commits nothing."""
    if bin >= BINS:
        return 0.0
    return upper_bound(evidence.wrong_from(bin), evidence.tokens, confidence, evidence.dispersion(bin))


def threshold(evidence: Evidence, budget: float, confidence: float = CONFIDENCE) -> int:
    """The lowest bin from which on tokens may be committed; BINS when none may."""
    lowest, wrong = BINS, 0
    for at in range(BINS - 1, -1, -1):
        wrong += int(evidence.wrong[at])
        if log_wealth(wrong, evidence.tokens, budget) < -log(1 - confidence) * evidence.dispersion(at):
            break
        lowest = at
    return lowest


# --- the watch -----------------------------------------------------------------------------------------------


class Watch:
    """Notices that audited tokens disagree more often than the budget allows, whenever that begins.

    `level` is the mean of Shiryaev-Roberts e-processes, R = (R + 1) (1 + odds (X - budget)); while the chance of a
    disagreement stays within the budget, it takes at least `limit` tokens on average to reach `limit`.
    """

    def __init__(self, budget: float) -> None:
        self.budget = budget
        self.limit = FALSE_ALARM_EVERY / budget if budget else 1.0
        self._bets = np.array([odds for odds in ODDS if odds * budget < 1] or [0.5 / budget])
        self._levels = np.zeros(len(self._bets))

    @property
    def level(self) -> float:
        """How much speaks for a change."""
        return float(self._levels.mean())

    @property
    def suspicious(self) -> bool:
        """Half way (in logarithms) to an alarm: audit everything now."""
        return self.level > float(self.limit**0.5)

    @property
    def alarmed(self) -> bool:
        """The budget is being passed."""
        return self.level >= self.limit

    def observe(self, tokens: Iterable[Labelled]) -> None:
        """All tokens of an audited request, in order."""
        for token in tokens:
            lost = token.local and not token.agreed
            self._levels = (self._levels + 1) * (1 + self._bets * (lost - self.budget))


# --- the decision --------------------------------------------------------------------------------------------


class Gate:
    """One budget's decisions on shared evidence."""

    def __init__(self, evidence: Evidence, budget: float, confidence: float = CONFIDENCE) -> None:
        self.evidence, self.budget, self.confidence = evidence, budget, confidence
        self.watch = Watch(budget)
        self.threshold = BINS
        self.refresh()

    def refresh(self) -> None:
        """Choose the threshold anew: evidence has come, or is gone."""
        self.threshold = threshold(self.evidence, self.budget, self.confidence) if self.budget > 0 else BINS

    @property
    def open(self) -> bool:
        """Whether anything may be committed locally."""
        return self.threshold < BINS

    def sure(self, score: float) -> bool:
        """Whether a token with this score may be committed."""
        return self.open and bin_of(score) >= self.threshold

    def split(self, scores: Sequence[float]) -> tuple[int, int]:
        """(tokens to commit, tokens to verify after them): the sure ones at the front, then the run of unsure ones.

        What follows is dropped: the verdict draws the next token anyway, and behind it sure ones may be committed.
        """
        commit = next((i for i, score in enumerate(scores) if not self.sure(score)), len(scores))
        rest = scores[commit:]
        return commit, next((i for i, score in enumerate(rest) if self.sure(score)), len(rest))

    def audit_share(self, base: float) -> float:
        """The chance of the next request to be audited."""
        return 1.0 if self.watch.suspicious else base


# --- what to expect ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Expectation:
    """What a budget buys on the evidence so far; intervals at the gate's confidence."""

    budget: float
    bin: int
    unverified: float
    unverified_low: float
    unverified_high: float
    disagreement: float
    disagreement_high: float


def expect(evidence: Evidence, budget: float, confidence: float = CONFIDENCE) -> Expectation:
    """The share is Wilson's interval with each request as one observation, which is wide: tokens of one are alike."""
    at = threshold(evidence, budget, confidence)
    share = evidence.share_from(at)
    low, high = wilson(share, float(evidence.requests[0]))
    wrong = evidence.wrong_from(at)
    rate = wrong / evidence.tokens if evidence.tokens else 0.0
    return Expectation(budget, at, share, low, high, rate, bound_from(evidence, at, confidence))


def budget_for(evidence: Evidence, unverified: float, confidence: float = CONFIDENCE) -> float:
    """The smallest budget that leaves at least this share unverified; inf if no budget below 1 does."""
    worst = 0.0
    for at in range(BINS - 1, -1, -1):
        worst = max(worst, bound_from(evidence, at, confidence))  # the gate stops at the first bin beyond its budget
        if evidence.share_from(at) >= unverified:
            return worst if worst < 1 else inf
    return inf


def wilson(share: float, trials: float, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95 % interval of a share (Wilson 1927); (0, 1) without trials."""
    if trials <= 0:
        return 0.0, 1.0
    middle = share + z * z / (2 * trials)
    half = z * (share * (1 - share) / trials + z * z / (4 * trials * trials)) ** 0.5
    return max(0.0, (middle - half) / (1 + z * z / trials)), min(1.0, (middle + half) / (1 + z * z / trials))
