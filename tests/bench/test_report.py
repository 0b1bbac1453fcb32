"""The shape every benchmark's report has, and where benchmarks are found."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from pilotfish.bench import registry
from pilotfish.bench.conditions import conditions
from pilotfish.bench.report import SCHEMA, Report, reaches, target
from pilotfish.bench.stats import median_ratio, percentile, spread
from pilotfish.protocol.errors import UsageError


@pytest.mark.parametrize(
    ("value", "goal", "met"),
    [(1.4, "<= 1.4", True), (1.41, "<= 1.4", False), (20_000, ">= 20000", True), (0, "== 0", True), (1, "< 1", False)],
)
def test_a_goal_is_a_comparison_that_people_and_programs_read(value: float, goal: str, met: bool) -> None:
    assert reaches(value, goal) is met


def test_a_goal_of_another_form_is_refused() -> None:
    with pytest.raises(ValueError, match="a goal is a comparison"):
        reaches(1, "about 3")


def test_a_small_sample_decides_nothing() -> None:
    assert target("p99_ms", 2.0, "ms", "<= 3", enough=False).met is None
    assert target("p99_ms", None, "ms", "<= 3").met is None
    assert target("p99_ms", 2.0, "ms", "<= 3").met is True


def test_a_report_is_one_json_object() -> None:
    report = Report("x", conditions(), {"a": 1}, [target("t", 1, "s", "<= 2")]).as_dict()
    assert json.loads(json.dumps(report)) == report
    assert list(report) == ["schema", "name", "conditions", "figures", "targets"]
    assert report["schema"] == SCHEMA
    assert report["targets"] == [{"name": "t", "value": 1, "unit": "s", "goal": "<= 2", "met": True}]


def test_conditions_say_what_ran_where() -> None:
    found = conditions(("numpy", "no such package"), models=["m"])
    assert {"python", "packages", "system", "cpu", "cores", "load_average", "models"} <= found.keys()
    assert {"pilotfish", "redis", "arq", "numpy"} <= found["packages"].keys()
    assert "no such package" not in found["packages"]


def test_every_benchmark_can_be_found_and_says_what_it_is() -> None:
    assert registry.NAMES.keys() == registry.SUMMARIES.keys()
    for place in registry.NAMES.values():
        module, _, function = place.partition(":")
        code = f"import {module} as m; assert callable(m.{function}) and m.__doc__"
        subprocess.run([sys.executable, "-c", code], check=True)


def test_the_list_of_benchmarks_loads_none_of_them() -> None:
    code = "import sys, pilotfish.bench.registry; assert not {'numpy', 'redis', 'arq', 'asyncio'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_unknown_benchmark_names_the_known_ones() -> None:
    with pytest.raises(UsageError, match="there is no benchmark 'speed': choose .*broker"):
        registry.run("speed")


def test_percentiles_lie_between_their_neighbours() -> None:
    assert percentile([4, 1, 3, 2], 0.5) == 2.5
    assert [percentile([5.0], share) for share in (0, 0.5, 1)] == [5.0] * 3
    assert percentile(list(range(101)), 0.99) == 99
    with pytest.raises(ValueError, match="empty sample"):
        percentile([], 0.5)


def test_a_spread_is_in_milliseconds() -> None:
    assert spread([0.001, 0.003])["p50_ms"] == 2
    assert spread([0.001, 0.003])["n"] == 2


def test_the_ratio_of_paired_blocks_ignores_a_drift_that_hits_both() -> None:
    ours, echo = [[2.0, 2.0], [20.0, 20.0], [4.0, 4.0]], [[1.0, 1.0], [10.0, 10.0], [2.0, 2.0]]
    assert median_ratio(ours, echo) == 2
