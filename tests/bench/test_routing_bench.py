"""`bench routing` on a small scale: the phases run, the oracle is one, and the report hangs together."""

from __future__ import annotations

from typing import Any

import pytest

from pilotfish.bench import routing
from pilotfish.bench.routing import Sizes, oracle
from pilotfish.bench.routing_trace import Measured

TARGETS = ["cached_share_of_oracle", "predicted_equal", "p95_vs_least_loaded", "short_vs_least_loaded"]


def test_the_oracle_reuses_everything_that_came_before() -> None:
    block = list(range(routing.BLOCK))
    first, second = [*block, 1], [*block, 1, 2, *block]
    one = Measured(prompts=[first], whole={0: [*first, 2, 3]})
    found = [one, Measured(prompts=[second], whole={0: second})]
    assert oracle(found) == routing.BLOCK / (len(first) + len(second))


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    patch = pytest.MonkeyPatch()
    patch.setattr(routing, "QUICK", Sizes(6, 1, 3, 1, 20))
    try:
        return routing.run(quick=True).as_dict()
    finally:
        patch.undo()


@pytest.mark.slow
def test_the_report_has_the_targets_that_are_followed_over_time(report: dict[str, Any]) -> None:
    found = {one["name"]: one for one in report["targets"]}
    assert list(found) == TARGETS
    assert found["predicted_equal"]["value"] == 1
    assert found["predicted_equal"]["met"] is None, "too few to say"
    assert 0.5 < found["cached_share_of_oracle"]["value"] < 1.1


@pytest.mark.slow
def test_both_ways_to_route_served_the_same_conversations(report: dict[str, Any]) -> None:
    figures = report["figures"]
    assert figures["prefix"]["n"] == figures["least_loaded"]["n"] == 60
    assert figures["serial"]["predicted"] == 30
    assert figures["prefix"]["cached_share"] <= figures["oracle_cached_share"] * 1.1
