"""The gate on recorded requests: any threshold, any split, as often as wanted. Pure; a request is the unit of a split.

Replay sees the target's own text. A live gate also commits wrong tokens and goes on behind them, which only a live run
can show (`gate_live.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pilotfish.bench.gate_record import Recorded
from pilotfish.bench.questions import CODE
from pilotfish.edge_agent.calibration import BINS, Calibration, Labelled, bins_of, brier, ece, reliability
from pilotfish.edge_agent.gate import Evidence, Watch, bound_from, from_above, threshold

BUDGETS = (0.005, 0.01, 0.02, 0.05)
AUDITS_MOST = 200
HARM = 2.0  # times the budget: what a shift must do to count as one
SHIFT_FROM = frozenset({"add", "subtract", "running_sum", "times"})


@dataclass(frozen=True, slots=True)
class Counted:
    """Requests as counts by bin of one strategy's score, each [requests, BINS]: tokens, and wrong ones among them."""

    seen: NDArray[np.int64]
    wrong: NDArray[np.int64]

    @classmethod
    def of(cls, requests: Sequence[Recorded], scores: Sequence[NDArray[np.float64]]) -> Counted:
        """`scores` [tokens] of each request."""
        bins = [bins_of(one) for one in scores]
        wrong = [at[~request.agreed] for at, request in zip(bins, requests, strict=True)]
        return cls(
            *(np.array([np.bincount(at, minlength=BINS) for at in one]).reshape(-1, BINS) for one in (bins, wrong))
        )

    def evidence(self, chosen: NDArray[np.int64]) -> Evidence:
        """What a gate has learnt from some of them."""
        seen, wrong = self.seen[chosen].sum(0).astype(float), self.wrong[chosen].sum(0).astype(float)
        squared = (from_above(self.wrong[chosen].astype(float)) ** 2).sum(0)
        return Evidence(seen, wrong, squared, np.array([float(len(chosen))]))

    def curve(self, chosen: NDArray[np.int64]) -> NDArray[np.float64]:
        """(unverified share, disagreement) on some of them by threshold: [2, BINS + 1]; the last commits nothing."""
        tokens = self.seen[chosen].sum()
        sums = np.array([self.seen[chosen].sum(0), self.wrong[chosen].sum(0)])
        return np.column_stack([from_above(sums / tokens), np.zeros(2)])


def hindsight(
    scores: NDArray[np.float64], agreed: NDArray[np.bool_], budget: float, tokens: int | None = None
) -> float:
    """The largest share that a threshold can leave within the budget; of more `tokens` where some have no label."""
    tokens = len(agreed) if tokens is None else tokens
    order = np.argsort(-scores, kind="stable")
    wrong = np.cumsum(~agreed[order])
    last_of_equals = np.append(np.diff(scores[order]) != 0, True)
    fits = np.flatnonzero((wrong <= budget * tokens) & last_of_equals)
    return float(fits[-1] + 1) / tokens if len(fits) else 0.0


def budget_figures(
    counts: Counted, learnt: NDArray[np.int64], asked: NDArray[np.int64], scores: NDArray[np.float64],
    agreed: NDArray[np.bool_], budget: float,
) -> dict[str, Any]:  # fmt: skip
    """A threshold learnt on some requests, measured on others, beside the best one that hindsight could choose."""
    evidence = counts.evidence(learnt)
    bin = threshold(evidence, budget)
    share, disagreement = counts.curve(asked)[:, bin].tolist()
    best = hindsight(scores, agreed, budget)
    return {
        "unverified_share": share, "disagreement": disagreement, "hindsight_share": best,
        "share_of_hindsight": share / best if best else None,
        "bound_when_learnt": bound_from(evidence, bin),
    }  # fmt: skip


def split_figures(counts: Counted, learn: int, budget: float, splits: int, seed: int = 1) -> dict[str, Any]:
    """Random splits: how often what was measured passed the budget, and what was kept of hindsight (in whole bins)."""
    rng, total = np.random.default_rng(seed), len(counts.seen)
    passed, shares, kept = 0, [], []
    for _ in range(splits):
        order = rng.permutation(total)
        learnt, asked = order[:learn], order[learn:]
        curve = counts.curve(asked)
        share, disagreement = curve[:, threshold(counts.evidence(learnt), budget)].tolist()
        best = curve[0, curve[1] <= budget].max()
        passed += disagreement > budget
        shares.append(share)
        kept.append(share / best if best else 1.0)
    return {
        "splits": splits, "learnt_from": learn, "asked": total - learn, "passed_share": passed / splits,
        "unverified_share": float(np.mean(shares)), "share_of_hindsight": float(np.mean(kept)),
    }  # fmt: skip


def calibration_figures(
    learnt: tuple[NDArray[np.float64], NDArray[np.bool_]], asked: tuple[NDArray[np.float64], NDArray[np.bool_]]
) -> dict[str, Any]:
    """A map learnt on some tokens, judged on others; the raw score as a probability is the baseline."""
    found = Calibration()
    for score, agreed in zip(*learnt, strict=True):
        found.observe(float(score), bool(agreed))
    scores, right = asked
    predicted = np.array([found.acceptance(float(score)) for score in scores])
    bars = reliability(predicted, right)
    return {
        "ece": ece(bars), "brier": brier(predicted, right),
        "raw_ece": ece(reliability(scores, right)), "raw_brier": brier(scores, right),
        "reliability": [[round(bar.predicted, 3), round(bar.observed, 3), bar.labels] for bar in bars],
    }  # fmt: skip


def shift_figures(
    requests: Sequence[Recorded], scores: Sequence[NDArray[np.float64]], budget: float, runs: int = 50
) -> dict[str, Any]:
    """Learnt on half of the arithmetic; then audits of the other half, then of code: how many until the alarm.

    Where the budget nearly holds on code there is little to notice: `harmful` counts the runs that pass HARM times it.
    """
    before = np.array([i for i, one in enumerate(requests) if one.question.family in SHIFT_FROM])
    after = np.array([i for i, one in enumerate(requests) if one.question.family == CODE])
    counts, rng = Counted.of(requests, scores), np.random.default_rng(2)
    needed, false, harm = list[int | None](), 0, list[float]()
    for _ in range(runs):
        order = rng.permutation(before)
        bin = threshold(counts.evidence(order[: len(order) // 2]), budget)
        watch = Watch(budget)
        watch.observe(token for i in order[len(order) // 2 :] for token in _audited(requests[i], scores[i], bin))
        false += watch.alarmed
        harm.append(float(counts.curve(after)[1, bin]))
        if harm[-1] > HARM * budget:
            needed.append(_audits_until(watch, requests, scores, bin, rng.choice(after, AUDITS_MOST)))
    found = [one for one in needed if one is not None]
    return {
        "learnt_from_requests": len(before) // 2, "audited_before": len(before) - len(before) // 2,
        "false_alarms": false, "runs": runs, "disagreement_on_code": float(np.mean(harm)), "harmful": len(needed),
        "noticed": len(found), "audits_median": float(np.median(found)) if found else None,
        "audits_p90": float(np.quantile(found, 0.9)) if found else None, "audits_most": max(found, default=None),
    }  # fmt: skip


def _audited(request: Recorded, scores: NDArray[np.float64], bin: int) -> list[Labelled]:
    local = bins_of(scores) >= bin
    return [Labelled(*one) for one in zip(scores.tolist(), request.agreed.tolist(), local.tolist(), strict=True)]


def _audits_until(
    watch: Watch,
    requests: Sequence[Recorded],
    scores: Sequence[NDArray[np.float64]],
    bin: int,
    order: NDArray[np.int64],
) -> int | None:
    for audits, i in enumerate(order.tolist(), 1):
        watch.observe(_audited(requests[i], scores[i], bin))
        if watch.alarmed:
            return audits
    return None
