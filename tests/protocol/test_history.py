"""The digest: equal for equal histories, however they came about, and for nothing else."""

from __future__ import annotations

import hashlib
import struct

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pilotfish.protocol.history import DIGEST_BYTES, History
from pilotfish.protocol.messages import MAX_TOKEN_ID, Sampling

SAMPLING = Sampling(temperature=0.7, top_k=40, top_p=0.9, min_p=0.05, seed=2**64 - 1)
IDS = st.lists(st.integers(0, MAX_TOKEN_ID), max_size=30)


@given(IDS, st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30), IDS), max_size=12))
def test_the_digest_of_a_prefix_does_not_depend_on_what_was_asked_before(
    ids: list[int], asked: list[tuple[int, int, list[int]]]
) -> None:
    """Questions go back and forth while the history grows; each answer is that of a fresh history."""
    history = History("t", SAMPLING)
    for length, base, more in asked:
        history.extend(ids[len(history) : length])
        base = min(base, len(history))
        assert history.digest(base, more) == History("t", SAMPLING, [*ids[:base], *more]).digest(base + len(more))


@given(IDS, IDS)
def test_different_ids_have_different_digests(one: list[int], other: list[int]) -> None:
    first, second = (History("t", SAMPLING, ids).digest(len(ids)) for ids in (one, other))
    assert (first == second) == (one == other)
    assert len(first) == DIGEST_BYTES


@pytest.mark.parametrize(
    "change", [{"temperature": 0.8}, {"top_k": 41}, {"top_p": 0.8}, {"min_p": 0.1}, {"seed": 0}], ids=str
)
def test_every_parameter_of_the_draw_is_part_of_the_digest(change: dict[str, float]) -> None:
    other = SAMPLING.model_copy(update=change)
    assert History("t", SAMPLING, [1]).digest(1) != History("t", other, [1]).digest(1)


def test_the_target_is_part_of_the_digest() -> None:
    assert History("t", SAMPLING, [1]).digest(1) != History("u", SAMPLING, [1]).digest(1)


def test_equal_parameters_have_equal_digests_whatever_the_sign_of_zero() -> None:
    plus, minus = Sampling(temperature=0.0, min_p=0.0), Sampling(temperature=-0.0, min_p=-0.0)
    assert plus == minus
    assert History("t", plus, [1]).digest(1) == History("t", minus, [1]).digest(1)


def test_the_digest_is_blake2b_over_a_msgpack_header_and_little_endian_ids() -> None:
    """Anyone may compute it: this is the whole definition, and it is the same on every machine."""
    header = msgpack.packb(["t", 0.7, 0.9, 0.05, 40, 2**64 - 1])
    expected = hashlib.blake2b(header + struct.pack("<3I", 7, 300, 70000), digest_size=16).digest()
    assert History("t", SAMPLING, [7, 300, 70000]).digest(3) == expected


@pytest.mark.parametrize("base", [-1, 4])
def test_a_base_outside_the_history_is_an_error(base: int) -> None:
    with pytest.raises(IndexError, match="outside a history of 3 ids"):
        History("t", SAMPLING, [1, 2, 3]).digest(base)
