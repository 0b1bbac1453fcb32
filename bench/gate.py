"""`bench gate`: what the gate keeps on the device, what that costs in tokens and answers, whether its promise holds.

Three parts on the demo pair at T = 0, llama.cpp on both sides. Recorded: the target's texts of calibration questions
(made afresh, none of them evaluated) and of the evaluation file, teacher-forced through the draft. Replayed: every
strategy, random splits for the confidence, a shift from arithmetic to code. Live: gated mode through Redis.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pilotfish.bench.conditions import conditions, load_average
from pilotfish.bench.gate_record import Question, Recorded, Recorder, calibration, evaluation, spread
from pilotfish.bench.gate_replay import (
    BUDGETS,
    Counted,
    budget_figures,
    calibration_figures,
    hindsight,
    shift_figures,
    split_figures,
)
from pilotfish.bench.report import Report, Target, target
from pilotfish.edge_agent.calibration import Sums
from pilotfish.edge_agent.confidence import DEFAULT, Ensemble, strategies
from pilotfish.edge_agent.gate import CONFIDENCE

GOAL_BUDGET = 0.02  # the one DESIGN section 11 names
TOKENS_ENOUGH = 5_000


@dataclass(frozen=True, slots=True)
class Sizes:
    """Requests of each part, and random splits."""

    calibration: int = 400
    evaluation: int = 400
    live: int = 60
    splits: int = 300
    live_budgets: tuple[float, ...] = BUDGETS


QUICK = Sizes(100, 100, 30, 60, (GOAL_BUDGET,))


@dataclass(frozen=True, slots=True)
class Recording:
    """Calibration requests, then evaluation requests; `names` are the columns of their scores."""

    names: list[str]
    learnt: list[Recorded]
    asked: list[Recorded]

    @property
    def all(self) -> list[Recorded]:
        """Both."""
        return self.learnt + self.asked

    def scores(self, name: str) -> list[NDArray[np.float64]]:
        """One strategy's scores [tokens] of every request; the ensemble's weights come from the calibration part."""
        if name != Ensemble.name:
            at = self.names.index(name)
            return [one.scores[:, at] for one in self.all]
        fitted = self.ensemble()
        return [fitted.combined(one.scores) for one in self.all]

    def ensemble(self) -> Ensemble:
        """All strategies, weighted by what the calibration part says."""
        together, agreed = joined([one.scores for one in self.learnt]), joined([one.agreed for one in self.learnt])
        return Ensemble(list(strategies().values())).fitted(together, agreed)


def joined(parts: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """One array of all requests' tokens."""
    return np.concatenate(parts)


def run(*, quick: bool = False) -> Report:
    """The whole benchmark."""
    from pilotfish.bench import gate_live
    from pilotfish.demo import pair

    sizes = QUICK if quick else Sizes()
    stated = conditions(
        ("llama-cpp-python",), models={"target": "demo target f32", "draft": "demo draft f32"}, temperature=0.0,
        strategy=DEFAULT, confidence=CONFIDENCE, sizes=asdict(sizes), draft_tokens=gate_live.DRAFT_TOKENS,
    )  # fmt: skip
    rows = evaluation(pair.EVAL_FILE)
    asked, learnt = spread(rows, sizes.evaluation), calibration(sizes.calibration, rows)
    recording = record(learnt, asked)
    replayed = replay(recording, sizes)
    evidence = counted(recording, DEFAULT).evidence(np.arange(len(recording.learnt))).sums()
    live = _live(asked[: sizes.live], evidence, sizes.live_budgets)
    stated["load_average_after"] = load_average()
    return Report("gate", stated, {"replay": replayed, "live": live}, targets(replayed, live))


def _live(questions: Sequence[Question], evidence: Sums, budgets: Sequence[float]) -> dict[str, Any]:
    from pilotfish.bench import gate_live
    from pilotfish.demo import pair

    chosen = strategies()[DEFAULT]
    return gate_live.measure(questions, evidence, pair.target_gguf(), pair.draft_gguf(), chosen, budgets)


def record(learnt: Sequence[Question], asked: Sequence[Question], temperature: float = 0.0) -> Recording:
    """Both parts, with both models open in this process."""
    from pilotfish.bench.gate_record import CONTEXT, SESSIONS
    from pilotfish.cache.llama_context import LlamaModel
    from pilotfish.cloud_worker.engines.llamacpp import LlamaCppVerifier
    from pilotfish.demo import pair

    every = strategies()
    verifier = LlamaCppVerifier(pair.target_gguf(), context=CONTEXT, draft_max=1, max_sessions=SESSIONS, threads=1)
    draft = LlamaModel(pair.draft_gguf())
    recorder = Recorder(verifier, draft, list(every.values()))
    try:
        parts = [list(recorder.record(part, temperature)) for part in (learnt, asked)]
    finally:
        recorder.close()
        draft.close()
        verifier.close()
    return Recording(list(every), *parts)


def counted(recording: Recording, name: str) -> Counted:
    """All requests by bins of one strategy."""
    return Counted.of(recording.all, recording.scores(name))


def replay(recording: Recording, sizes: Sizes) -> dict[str, Any]:
    """Everything that needs no engine."""
    learnt = np.arange(len(recording.learnt))
    asked = np.arange(len(recording.learnt), len(recording.all))
    agreed = joined([one.agreed for one in recording.asked])
    scores = {name: recording.scores(name) for name in [*recording.names, Ensemble.name]}
    own, counts = scores[DEFAULT], counted(recording, DEFAULT)
    on_asked = {name: joined(parts[len(learnt) :]) for name, parts in scores.items()}
    labels = joined([one.agreed for one in recording.learnt])
    return {
        "tokens": {"learnt": len(labels), "asked": len(agreed), "agreement": float(agreed.mean())},
        "hindsight_share": {
            name: {f"{budget:g}": hindsight(one, agreed, budget) for budget in BUDGETS}
            for name, one in on_asked.items()
        },
        "budgets": {
            f"{budget:g}": budget_figures(counts, learnt, asked, on_asked[DEFAULT], agreed, budget)
            for budget in BUDGETS
        },
        "splits": {
            f"{budget:g}": split_figures(counts, len(learnt), budget, sizes.splits) for budget in BUDGETS
        },
        "calibration": calibration_figures(
            (joined(own[: len(learnt)]), labels), (on_asked[DEFAULT], agreed)
        ),
        "shift": shift_figures(recording.all, own, GOAL_BUDGET),
    }  # fmt: skip


def targets(replayed: dict[str, Any], live: dict[str, Any]) -> list[Target]:
    """DESIGN section 11's names, at a budget of 2 %; live where the run is live."""
    gated, baseline = live[f"gated {GOAL_BUDGET:g}"], live["cloud_only"]
    budget = replayed["budgets"][f"{GOAL_BUDGET:g}"]
    tokens = replayed["tokens"]["asked"]
    ratio = gated["accuracy"] / baseline["accuracy"] if baseline["accuracy"] else None
    strict = live.get("gated 0.005")
    found = [
        target("unverified_share", gated["unverified_share"], "of tokens", "> 0"),
        target("never_sent_share", gated["never_sent_share"], "of tokens", "> 0"),
        target("share_of_hindsight", budget["share_of_hindsight"], "", ">= 0.9", enough=tokens >= TOKENS_ENOUGH),
        target(
            "disagreement", gated["disagreement"], "of tokens", f"<= {GOAL_BUDGET:g}", enough=gated["tokens"] >= 1500
        ),
        target("accuracy_ratio", ratio, "", ">= 0", enough=False),
    ]
    if strict and baseline["accuracy"]:
        found.append(target("accuracy_ratio_at_0.005", strict["accuracy"] / baseline["accuracy"], "", ">= 0.98"))
    worst = max(one["passed_share"] for one in replayed["splits"].values())
    enough = all(one["splits"] >= 300 for one in replayed["splits"].values())
    shift = replayed["shift"]
    found.append(target("shift_noticed_within", shift["audits_p90"], "audits", "<= 100", enough=shift["harmful"] >= 20))
    return [*found, target("budget_passed", worst, "of splits", f"<= {1 - CONFIDENCE:.2f}", enough=enough)]
