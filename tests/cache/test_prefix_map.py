"""Which stored key shares most: against a scan of all of them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pilotfish.cache.prefix_map import PrefixMap, Shared, common_prefix, length, pack, unpack

IDS = st.lists(st.sampled_from([0, 1, 2, 255, 256, 2**31 - 1]), max_size=6)  # few values: prefixes are often shared


def test_common_prefix() -> None:
    assert common_prefix([1, 2, 3], [1, 2, 4]) == 2
    assert common_prefix([1, 2], [1, 2, 4]) == 2
    assert common_prefix([], [1]) == common_prefix([2], [1]) == 0
    long = list(range(1000))
    assert all(common_prefix(long, [*long[:i], -1, *long[i + 1 :]]) == i for i in range(1000))


def of(*keys: list[int]) -> PrefixMap:
    found = PrefixMap()
    for ids in keys:
        found.add(pack(ids))
    return found


@given(IDS)
def test_a_key_is_its_ids(ids: list[int]) -> None:
    assert unpack(pack(ids)) == ids
    assert length(pack(ids)) == len(ids)


@given(st.lists(IDS), IDS)
def test_longest_is_what_a_scan_finds(stored: list[list[int]], asked: list[int]) -> None:
    found = of(*stored).longest(pack(asked))
    most = max((common_prefix(ids, asked) for ids in stored), default=0)
    if not most:
        assert found is None
        return
    assert found
    shortest = min(len(ids) for ids in stored if common_prefix(ids, asked) == most)
    assert (found.ids, length(found.key)) == (most, shortest)
    assert unpack(found.key) in stored
    assert common_prefix(unpack(found.key), asked) == most


@given(st.lists(IDS), IDS, st.integers(0, 3))
def test_covers_and_covered_are_what_a_scan_finds(stored: list[list[int]], asked: list[int], slack: int) -> None:
    keys = of(*stored)
    covering = [ids for ids in stored if (n := common_prefix(ids, asked)) and n >= len(asked) - slack]
    assert (keys.covers(pack(asked), slack) is not None) == bool(covering)
    covered = {tuple(ids) for ids in stored if ids != asked and common_prefix(ids, asked) >= len(ids) - slack}
    assert {tuple(unpack(key)) for key in keys.covered(pack(asked), slack)} == covered


@given(st.lists(IDS), st.lists(IDS))
def test_a_map_is_a_sorted_set(added: list[list[int]], removed: list[list[int]]) -> None:
    keys, expected = of(*added), {tuple(ids) for ids in added} - {tuple(ids) for ids in removed}
    for ids in removed:
        keys.discard(pack(ids))
    assert [tuple(unpack(key)) for key in keys] == sorted(expected)
    assert len(keys) == len(expected)
    assert all(pack(ids) in keys for ids in expected)


def test_a_hit_needs_equal_ids_whatever_they_hash_to() -> None:
    keys = of([1, 2, 3])
    assert keys.longest(pack([1, 2, 4])) == Shared(pack([1, 2, 3]), 2)
    assert keys.longest(pack([258])) is None  # 0x00000102 begins like no key, though its bytes stand in one
