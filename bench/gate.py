"""`bench gate`: what the gate keeps on the device, what that costs in tokens and answers, whether its promise holds.

Three parts on the demo pair at T = 0 and 0.7, llama.cpp on both sides. Recorded, once: the target's texts of
calibration questions (made afresh, none of them evaluated) and of the evaluation file, and the draft led along them.
Replayed: every strategy, random splits for the confidence, a shift from arithmetic to code. Live: gated mode through
Redis over the evaluation file, with what the calibration part taught.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from pilotfish.bench.conditions import conditions, load_average
from pilotfish.bench.gate_record import Recorded, record
from pilotfish.bench.gate_replay import (
    BUDGETS,
    Counted,
    budget_figures,
    calibration_figures,
    hindsight,
    shift_figures,
    split_figures,
)
from pilotfish.bench.questions import calibration, evaluation, spread
from pilotfish.bench.report import Report, Target, target
from pilotfish.edge_agent.confidence import DEFAULT, Ensemble, strategies
from pilotfish.edge_agent.gate import CONFIDENCE

T = TypeVar("T")
GOAL_BUDGET = 0.02  # the one DESIGN section 11 names
STRICT = 0.005
TOKENS_ENOUGH, HARMFUL_ENOUGH, SPLITS_ENOUGH = 5_000, 20, 300
AUDITS_GOAL = 100


@dataclass(frozen=True, slots=True)
class Sizes:
    """Requests of each part, random splits, and the temperatures at which all of it is done."""

    calibration: int = 400
    evaluation: int = 400
    live: tuple[int, ...] = (400, 200)  # at each temperature
    splits: int = 300
    live_budgets: tuple[float, ...] = BUDGETS
    temperatures: tuple[float, ...] = (0.0, 0.7)


QUICK = Sizes(60, 60, (20,), 60, (GOAL_BUDGET,), (0.0,))


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

    sizes, seconds = QUICK if quick else Sizes(), dict[str, float]()
    stated = conditions(
        ("llama-cpp-python",), models={"target": "demo target f32", "draft": "demo draft f32"},
        strategy=DEFAULT, confidence=CONFIDENCE, sizes=asdict(sizes), draft_tokens=gate_live.DRAFT_TOKENS,
    )  # fmt: skip
    rows = evaluation(pair.EVAL_FILE)
    asked, learnt = spread(rows, sizes.evaluation), calibration(sizes.calibration, rows)

    def recorded(temperature: float) -> Recording:
        found = record(pair.target_gguf(), pair.draft_gguf(), learnt + asked, temperature)
        return Recording(list(strategies()), found[: len(learnt)], found[len(learnt) :])

    recordings = timed(seconds, "recording", lambda: {one: recorded(one) for one in sizes.temperatures})
    replayed = timed(seconds, "replay", lambda: {at: replay(one, sizes) for at, one in recordings.items()})
    evidence = {at: counted(one, DEFAULT).evidence(np.arange(len(one.learnt))).sums() for at, one in recordings.items()}
    lived = {at: asked[:count] for at, count in zip(sizes.temperatures, sizes.live, strict=True)}
    models = pair.target_gguf(), pair.draft_gguf(), strategies()[DEFAULT]
    live = timed(seconds, "live", lambda: gate_live.measure(lived, evidence, *models, sizes.live_budgets))
    stated |= {"load_average_after": load_average(), "seconds": seconds}
    figures = {f"T={at:g}": {"replay": replayed[at], "live": live[at]} for at in sizes.temperatures}
    return Report("gate", stated, figures, targets(list(replayed.values()), list(live.values())))


def timed(seconds: dict[str, float], part: str, work: Callable[[], T]) -> T:
    """Do it, and note how long it took."""
    began = time.perf_counter()
    found = work()
    seconds[part] = round(time.perf_counter() - began, 1)
    return found


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
        "share_of_hindsight_by_calibration_requests": {
            str(size): {
                f"{budget:g}": split_figures(counts, size, budget, sizes.splits)["share_of_hindsight"]
                for budget in BUDGETS
            }
            for size in (50, 100, 250, 400) if size <= len(learnt)
        },
        "calibration": calibration_figures(
            (joined(own[: len(learnt)]), labels), (on_asked[DEFAULT], agreed)
        ),
        "shift": {f"{budget:g}": shift_figures(recording.all, own, budget) for budget in BUDGETS},
    }  # fmt: skip


def targets(replayed: Sequence[dict[str, Any]], live: Sequence[dict[str, Any]]) -> list[Target]:
    """DESIGN section 11's names at a budget of 2 %, then what holds at every budget; the worst of all temperatures."""
    goal, strict = f"{GOAL_BUDGET:g}", f"gated {STRICT:g}"
    gated = [one[f"gated {goal}"] for one in live]
    enough = min(one["tokens"]["asked"] for one in replayed) >= TOKENS_ENOUGH
    ratios = [one[strict]["accuracy"] / one["cloud_only"]["accuracy"] for one in live if strict in one]
    over = [
        one["disagreement"] / float(name.split()[1])
        for run in live for name, one in run.items() if name.startswith("gated")
    ]  # fmt: skip
    splits = [one for run in replayed for one in run["splits"].values()]
    shifts = [one for run in replayed for one in run["shift"].values() if one["harmful"] >= HARMFUL_ENOUGH]
    unseen = [one for one in shifts if one["noticed"] < 0.9 * one["harmful"]]
    noticed = None if unseen or not shifts else max(one["audits_p90"] for one in shifts)
    return [
        target("unverified_share", min(one["unverified_share"] for one in gated), "of tokens", "> 0"),
        target("never_sent_share", min(one["never_sent_share"] for one in gated), "of tokens", "> 0"),
        target(
            "share_of_hindsight", min(one["budgets"][goal]["share_of_hindsight"] or 0.0 for one in replayed),
            "", ">= 0.9", enough=enough,
        ),
        target(
            "share_of_hindsight_any_budget", min(one["share_of_hindsight"] for one in splits), "mean of splits",
            ">= 0.9", enough=enough,
        ),
        target("disagreement", max(one["disagreement"] for one in gated), "of tokens", f"<= {goal}", enough=enough),
        target("disagreement_of_budget", max(over), "of any budget", "<= 1", enough=enough),
        target(
            "budget_passed", max(one["passed_share"] for one in splits), "of splits", f"<= {1 - CONFIDENCE:.2f}",
            enough=all(one["splits"] >= SPLITS_ENOUGH for one in splits),
        ),
        target(
            "accuracy_ratio",
            min(one["accuracy"] / base["cloud_only"]["accuracy"] for one, base in zip(gated, live, strict=True)),
            "", ">= 0", enough=False,
        ),
        target("accuracy_ratio_at_0.005", min(ratios, default=None), "", ">= 0.98", enough=enough),
        target("shift_noticed_within", noticed, "audits", f"<= {AUDITS_GOAL}"),
    ]  # fmt: skip
