"""Virtual token counters: who always waits is served by weight, and who was idle gets no credit for it."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from pilotfish.protocol.fair_share import FairShare, reserved

ROWS = st.integers(1, 300)


def served(shares: FairShare, costs: dict[str, int], turns: int, at_once: int) -> Counter[str]:
    """Rows of each tenant, all of which always wait, after so many turns."""
    rows: Counter[str] = Counter()
    for _ in range(turns):
        for tenant in shares.turns(costs, at_once):
            shares.charge(tenant, costs[tenant])
            rows[tenant] += costs[tenant]
    return rows


@given(st.dictionaries(st.sampled_from("abcdef"), ROWS, min_size=2), st.integers(1, 8))
def test_tenants_that_always_wait_are_served_the_same_up_to_their_largest_jobs(
    costs: dict[str, int], at_once: int
) -> None:
    rows = served(FairShare(lambda _: 1.0), costs, 40, at_once)
    slack = 2 * max(costs.values()) + at_once * max(costs.values())
    assert max(rows[t] for t in costs) - min(rows[t] for t in costs) <= slack


@given(st.floats(0.25, 8), ROWS)
def test_what_one_is_served_follows_its_weight(weight: float, cost: int) -> None:
    shares = FairShare({"a": weight, "b": 1.0}.__getitem__)
    rows = served(shares, {"a": cost, "b": cost}, 800, 1)
    assert abs(rows["a"] - weight * rows["b"]) <= (1 + weight) * 2 * cost


def test_silence_earns_nothing() -> None:
    shares = FairShare(lambda _: 1.0)
    for _ in range(100):
        shares.charge("busy", 10)
    shares.lift("late", ["busy"])
    assert served(shares, {"busy": 10, "late": 10}, 20, 1) == Counter(busy=100, late=100)


def test_a_tenant_lifted_beside_nobody_keeps_its_counter() -> None:
    shares = FairShare(lambda _: 1.0)
    shares.charge("a", 50)
    shares.lift("a", [])
    shares.lift("b", ["a"])
    assert shares.order(["a", "b"]) == ["b", "a"], "of two that are equal, who was served longest ago comes first"
    shares.charge("b", 1)
    assert shares.order(["a", "b"]) == ["a", "b"]


def test_who_left_is_forgotten() -> None:
    shares = FairShare(lambda _: 1.0)
    shares.charge("gone", 50)
    shares.keep(["here"])
    assert shares.order(["gone", "here"]) == ["gone", "here"]


@given(st.integers(1, 512), st.integers(0, 500))
def test_some_places_are_kept_as_long_as_somebody_has_none(places: int, idle: int) -> None:
    kept = reserved(places, idle)
    assert kept <= idle
    assert (kept > 0) == (idle > 0)
    assert kept <= max(1, places // 8)
