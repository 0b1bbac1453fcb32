"""The fleet's model keeps the laws of queues, and says what can be worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pilotfish.bench.fleet_model import BUSY_SHARE, Costs, Fleet, background, saturation, simulate, sized

COSTS = Costs(redis_ms=0.2, worker_ms=0.6, step_ms=8, row_ms=0.05, draft_ms=12, hop_ms=0.5, batch=16)
some = st.builds(
    Costs,
    redis_ms=st.floats(0.01, 2), worker_ms=st.floats(0.01, 2), step_ms=st.floats(0.5, 30), row_ms=st.floats(0.001, 0.5),
    draft_ms=st.floats(0.5, 40), hop_ms=st.floats(0, 3), redis_edge_ms=st.floats(0, 0.5), k=st.integers(0, 8),
    alpha=st.floats(0, 1), batch=st.integers(1, 64),
)  # fmt: skip
fleets = st.tuples(st.integers(1, 60), st.integers(1, 4), st.integers(1, 4), st.floats(0, 80)).map(
    lambda drawn: Fleet(drawn[0], max(drawn[1], drawn[2]), drawn[2], drawn[3])
)


@settings(max_examples=25)
@given(some, fleets, st.integers(0, 99))
def test_the_laws_of_queues_hold(costs: Costs, fleet: Fleet, seed: int) -> None:
    found = simulate(costs, fleet, seed)
    per_ms = found.rounds_per_s / 1000
    assert found.in_trip == pytest.approx(per_ms * found.trip_ms, rel=0.05), "Little's law"
    assert all(0 <= share <= 1 for share in found.busy.values())
    assert found.p50_ms <= found.p99_ms
    least = costs.alone_ms + fleet.rtt_ms
    assert found.p50_ms >= least * 0.999
    assert found.rounds_per_s <= 1000 * fleet.edges / (0.8 * costs.draft_ms + least) * 1.001
    engines = fleet.workers * 1000 / costs.engine_ms(costs.batch)
    assert found.rounds_per_s <= engines * 1.05, "no engine does more than full steps"
    assert found.tokens_per_s == pytest.approx(found.rounds_per_s * costs.tokens, rel=0.1)


def test_one_edge_alone_takes_what_its_parts_take() -> None:
    found = simulate(COSTS, Fleet(1))
    assert found.p50_ms == pytest.approx(COSTS.alone_ms)
    assert found.cycle_ms == pytest.approx(COSTS.alone_ms + COSTS.draft_ms, rel=0.02)


def test_a_seed_replays() -> None:
    assert simulate(COSTS, Fleet(20), 1) == simulate(COSTS, Fleet(20), 1) != simulate(COSTS, Fleet(20), 2)


def test_more_of_anything_is_not_less() -> None:
    by_edges = [simulate(COSTS, Fleet(edges)).rounds_per_s for edges in (1, 4, 16, 64, 256)]
    assert by_edges == sorted(by_edges)
    by_workers = [simulate(COSTS, Fleet(256, workers)).rounds_per_s for workers in (1, 2, 4, 8)]
    assert by_workers == sorted(by_workers)
    waits = [simulate(COSTS, Fleet(edges)).p50_ms for edges in (1, 16, 256)]
    assert waits == sorted(waits)


@pytest.mark.parametrize(
    ("costs", "limit"),
    [
        (replace(COSTS, step_ms=80), "engine"),
        (replace(COSTS, worker_ms=8, step_ms=1), "worker"),
        (replace(COSTS, redis_ms=8, step_ms=1), "redis"),
    ],
)
def test_the_busiest_part_is_the_one_that_saturates_first(costs: Costs, limit: str) -> None:
    first = min(saturation(costs), key=saturation(costs).__getitem__)
    found = simulate(costs, Fleet(200))
    assert found.limit == first == limit
    assert found.busy[limit] > 0.95


@settings(max_examples=30)
@given(some, st.sampled_from([10, 300, 5_000]), st.floats(0, 80))
def test_a_fleet_is_sized_so_that_no_part_is_too_busy(costs: Costs, edges: int, rtt_ms: float) -> None:
    fleet = sized(costs, edges, rtt_ms)
    assert 1 <= fleet.shards <= fleet.workers
    assert background(costs, fleet) < BUSY_SHARE
    at_most = saturation(costs, rtt_ms)
    assert edges / fleet.workers <= BUSY_SHARE * min(at_most["worker"], at_most["engine"]) + 1


def test_edges_that_cost_a_core_by_being_there_are_named() -> None:
    with pytest.raises(ValueError, match="1000 edges on 1 Redis cost more"):
        simulate(replace(COSTS, redis_edge_ms=1.0), Fleet(1_000))
    with pytest.raises(ValueError, match="each shard needs a worker"):
        Fleet(10, workers=1, shards=2)
