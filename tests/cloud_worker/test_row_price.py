"""The price of a row: the slope of engine time over rows."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pilotfish.cloud_worker.row_price import RowPrice


def test_the_slope_is_found_beside_a_pass_that_costs_more() -> None:
    price, dice = RowPrice(), random.Random(1)
    for _ in range(200):
        drafted = dice.randrange(12)
        price.add(drafted + 1, drafted, 4.0 + 0.45 * (drafted + 1) + dice.gauss(0, 0.2))
    assert price.ms == pytest.approx(0.45, rel=0.2)


def test_rounds_of_one_length_say_no_more_than_their_mean() -> None:
    price = RowPrice()
    assert price.ms == 0
    for _ in range(20):
        price.add(5, 4, 10.0)
    assert price.ms == pytest.approx(2.0)


def test_a_prefill_has_another_price() -> None:
    price = RowPrice()
    price.add(5, 4, 10.0)
    before = price.ms
    price.add(4000, 4, 900.0)
    assert price.ms == before


@given(st.lists(st.tuples(st.integers(1, 40), st.floats(0, 100)), min_size=1, max_size=40))
def test_a_price_is_never_below_nothing(rounds: list[tuple[int, float]]) -> None:
    price = RowPrice()
    for rows, ms in rounds:
        price.add(rows, rows - 1, ms)
    assert price.ms >= 0
