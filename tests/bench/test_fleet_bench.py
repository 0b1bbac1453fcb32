"""How `bench fleet` gets from measured windows to costs, and that a real fleet comes out as it says."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from pilotfish.bench.fleet import advice, check, engines, table, told
from pilotfish.bench.fleet_costs import CALIBRATED_AT, Measured, Presence, calibrate, derived, line
from pilotfish.bench.fleet_model import Costs, Fleet, simulate

COSTS = Costs(redis_ms=0.2, worker_ms=0.6, step_ms=8, row_ms=0.05, draft_ms=12, hop_ms=0.5)
THERE = Presence(edge_ms_per_s=0.2, worker_ms_per_s=2.0, commands_per_s=8, connections=3, kilobytes=60)


def test_an_engines_price_is_a_line() -> None:
    assert list(line([(5, 10.0), (80, 17.5)])) == pytest.approx([9.5, 0.1])
    assert line([(5, 10.0), (80, 9.0)]) == (10.0, 0.0)


def test_costs_are_those_the_windows_were_made_of() -> None:
    """Windows as a fleet of known costs would give them: beats are not counted twice, waiting is what is left."""
    true = replace(COSTS, redis_edge_ms=0.2, redis_worker_ms=2.0)
    rate = simulate(true, Fleet(CALIBRATED_AT)).rounds_per_s
    beats = (CALIBRATED_AT * 0.2 + 2.0) / rate
    alone = Measured(1, 1000 / (true.draft_ms + true.alone_ms), 9, 1, 1, 0, true.draft_ms, 0.75)
    many = Measured(CALIBRATED_AT, rate, 8, true.redis_ms + beats, true.worker_ms, 0, true.draft_ms, 0.75)
    found = derived(alone, many, THERE, true.step_ms, true.row_ms)
    assert vars_of(found) == pytest.approx(vars_of(true))


def vars_of(costs: Costs) -> dict[str, float]:
    return {name: getattr(costs, name) for name in ("redis_ms", "worker_ms", "hop_ms", "redis_edge_ms", "row_ms")}


def test_a_prediction_is_held_against_what_was_measured() -> None:
    said = simulate(COSTS, Fleet(16)).rounds_per_s
    told_of = check(COSTS, Measured(16, said / 1.1, 8, 0.2, 0.6, 0, 12, 0.75))
    assert told_of["error"] == pytest.approx(0.1, abs=0.01)
    assert told_of["counts"]
    full = check(COSTS, Measured(16, said / 2, 8, 0.2, 0.6, 1e6, 12, 0.75))
    assert not full["counts"], "the machine had no core left for it"


def test_a_fleet_of_the_right_size_keeps_up_and_one_of_each_does_not() -> None:
    rows = table(COSTS, (2_000,))
    alone, right = rows["one_of_each"]["2000"], rows["sized"]["2000"]
    assert right["workers"] > 1
    assert right["tokens_per_s"] > 3 * alone["tokens_per_s"]
    assert max(right["busy"].values()) < 0.85 < max(alone["busy"].values())


def test_a_redis_that_has_no_time_left_says_why() -> None:
    assert "1000 edges on 1 Redis" in told(replace(COSTS, redis_edge_ms=1.0), Fleet(1_000))["why"]


def test_what_to_add_first_is_in_the_order_of_saturation() -> None:
    said = advice(engines(COSTS), THERE)
    assert said["engine_8_ms"] == "worker then engine then redis"
    assert said["engine_20_ms"].startswith("engine") or said["engine_20_ms"].startswith("worker")
    assert said["edges_until_maxclients"] == 3_333


@pytest.mark.slow
def test_a_real_fleet_is_predicted() -> None:
    costs, there, (real,) = asyncio.run(calibrate(0.8, (4,)))
    assert costs.redis_ms > 0
    assert costs.worker_ms > 0
    assert there.connections >= 1
    assert abs(check(costs, real)["error"]) < 0.5, "on a busy machine; `bench fleet` states its error"
