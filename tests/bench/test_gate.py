"""The replay of `bench gate` counts right, and sees a gate that does not hold: a benchmark that can fail."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from pilotfish.bench import gate, gate_replay
from pilotfish.bench.gate_live import disagreement_bound
from pilotfish.bench.gate_record import Recorded
from pilotfish.bench.gate_replay import Counted, budget_figures, hindsight, shift_figures, split_figures
from pilotfish.bench.questions import CODE, Question, spread
from pilotfish.bench.recording import Asked, EveryScore, follow
from pilotfish.cloud_worker.engines.fake import fake_target
from pilotfish.edge_agent.calibration import BINS, bin_of
from pilotfish.edge_agent.confidence import strategies
from pilotfish.edge_agent.drafters.fake import FakeDrafter
from pilotfish.protocol.messages import Sampling


def requests(count: int, *, wrong: float = 0.3, seed: int = 0, families: tuple[str, ...] = ("add",)) -> list[Recorded]:
    """20 tokens each: a score in [0, 1], and a draft that is wrong more often the lower it is."""
    rng, found = np.random.default_rng(seed), []
    for number in range(count):
        scores = rng.uniform(size=(20, 1))
        agreed = rng.uniform(size=20) > wrong * (1 - scores[:, 0]) ** 2
        question = Question(families[number % len(families)], f"{number}", None)
        found.append(Recorded(question, (1,), tuple(range(20)), scores, agreed))
    return found


def columns(recorded: list[Recorded]) -> list[np.ndarray]:
    return [one.scores[:, 0] for one in recorded]


def test_hindsight_takes_all_it_can() -> None:
    scores, agreed = np.array([0.9, 0.8, 0.7, 0.7, 0.1]), np.array([True, False, True, False, True])
    assert [hindsight(scores, agreed, budget) for budget in (0.0, 0.2, 0.4)] == [0.2, 0.4, 1.0]
    assert hindsight(np.array([0.5, 0.5]), np.array([True, False]), 0.4) == 0  # equals go together
    assert hindsight(scores, agreed, 0.1, tokens=10) == 0.2  # half of them had no label


def test_clustered_errors_widen_the_bound_on_a_live_disagreement() -> None:
    spread_out, clustered = [1] * 10 + [0] * 90, [10] + [0] * 99
    assert 0.005 < disagreement_bound(spread_out, 2000) < disagreement_bound(clustered, 2000) < 0.1
    assert disagreement_bound([0] * 100, 2000) < 0.005
    assert disagreement_bound([], 0) == 1


def test_a_draft_is_led_along_a_text_and_every_strategy_has_its_say() -> None:
    text = [7, 8, 9]
    said = follow(FakeDrafter(fake_target, alpha=1.0), Asked((1, 2), 9), text)
    assert list(said.ids) == [fake_target([1, 2, *text[:at]], 2 + at, Sampling()) for at in range(3)]
    every = EveryScore(list(strategies().values()), "margin")
    row = np.array([0.0, 2.0, 1.0], np.float32)
    assert every(row, 1, 5, Sampling()) == strategies()["margin"].score(row, 1, 5, Sampling())
    assert every.take().shape == (1, len(strategies()))
    assert every.take().shape == (0, len(strategies()))


def test_counts_by_bin() -> None:
    recorded = requests(5)
    counts = Counted.of(recorded, columns(recorded))
    assert counts.seen.shape == (5, BINS)
    assert counts.seen.sum() == 100
    first = recorded[0]
    at = bin_of(float(first.scores[3, 0]))
    assert counts.seen[0, at] == sum(bin_of(float(score)) == at for score in first.scores[:, 0])
    assert counts.wrong[0].sum() == (~first.agreed).sum()
    curve = counts.curve(np.arange(5))
    assert curve[:, 0] == pytest.approx([1.0, sum((~one.agreed).sum() for one in recorded) / 100])
    assert curve[:, BINS].tolist() == [0, 0]


def test_a_learnt_threshold_keeps_its_budget_and_most_of_hindsight() -> None:
    recorded = requests(400)
    counts = Counted.of(recorded, columns(recorded))
    asked = np.arange(200, 400)
    scores = np.concatenate(columns(recorded)[200:])
    agreed = np.concatenate([one.agreed for one in recorded[200:]])
    found = budget_figures(counts, np.arange(200), asked, scores, agreed, 0.02)
    assert found["disagreement"] <= found["bound_when_learnt"] <= 0.02
    assert 0.8 < found["share_of_hindsight"] <= 1
    splits = split_figures(counts, 200, 0.02, 100)
    assert splits["passed_share"] <= 0.05


def test_a_gate_that_promises_too_much_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate_replay, "threshold", lambda *_: 0)
    recorded = requests(200)
    assert split_figures(Counted.of(recorded, columns(recorded)), 100, 0.02, 20)["passed_share"] == 1


def test_a_shift_is_noticed_and_its_absence_is_not() -> None:
    calm = requests(600, families=("add", "subtract"))
    code = [replace(one, question=Question(CODE, "c", None)) for one in requests(100, wrong=3.0, seed=1)]
    found = shift_figures(calm + code, columns(calm + code), 0.02, runs=10)
    assert (found["harmful"], found["noticed"], found["false_alarms"]) == (10, 10, 0)
    assert found["audits_most"] < 60
    assert found["disagreement_on_code"] > 0.04


def test_families_take_turns() -> None:
    rows = [Question(family, f"{family}{i}", "") for family in "abc" for i in range(5)]
    chosen = spread(rows, 6)
    assert sorted(row.family for row in chosen) == list("aabbcc")
    assert chosen == spread(rows, 6)


def test_the_targets_are_the_worst_of_all_temperatures_and_budgets() -> None:
    live = {"accuracy": 0.9, "unverified_share": 0.8, "never_sent_share": 0.4, "disagreement": 0.004}
    replayed = {
        "tokens": {"asked": 9000},
        "budgets": {f"{budget:g}": {"share_of_hindsight": 0.95} for budget in gate_replay.BUDGETS},
        "shift": {
            "0.02": {"audits_p90": 20.0, "harmful": 30, "noticed": 30},
            "0.05": {"audits_p90": None, "harmful": 0, "noticed": 0},
        },
        "splits": {"0.02": {"passed_share": 0.01, "splits": 300, "share_of_hindsight": 0.95}},
    }
    run = {"cloud_only": live, "gated 0.02": live, "gated 0.005": live}
    found = {one.name: one for one in gate.targets([replayed], [run])}
    assert {name: one.met for name, one in found.items()} == {
        "unverified_share": True, "never_sent_share": True, "share_of_hindsight": True,
        "share_of_hindsight_any_budget": True, "disagreement": True, "disagreement_of_budget": True,
        "accuracy_ratio": None, "accuracy_ratio_at_0.005": True, "budget_passed": True, "shift_noticed_within": True,
    }  # fmt: skip
    worse = {**run, "gated 0.005": {**live, "accuracy": 0.8, "disagreement": 0.006}}
    late = {**replayed, "shift": {"0.02": {"audits_p90": 20.0, "harmful": 30, "noticed": 20}}}
    found = {one.name: one for one in gate.targets([replayed, late], [run, worse])}
    assert (found["accuracy_ratio_at_0.005"].met, found["disagreement_of_budget"].met) == (False, False)
    assert found["shift_noticed_within"].met is None, "not noticed often enough to say when"
