"""States in memory: found by prefix, evicted by use, counted in bytes that the process really gives and takes."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pilotfish.cache.prefix_map import length, pack
from pilotfish.cache.state_lru import ENTRY_BYTES, SLACK, StateLru, cost
from pilotfish.cache.state_memory import allocate

PAGE = os.sysconf("SC_PAGE_SIZE")


def key(start: int, n: int = 100) -> bytes:
    return pack(range(start, start + n))


def state(pages: int = 1) -> memoryview:
    return memoryview(bytes(pages * PAGE))


COST = cost(key(0), state())


def filled(room: int, *starts: int) -> StateLru:
    found = StateLru(room * COST)
    for start in starts:
        assert found.put(key(start), state())
    return found


def starts(cache: StateLru) -> set[int]:
    return {start for start in range(0, 100_000, 1000) if key(start) in cache}


def test_the_least_recently_used_state_makes_room() -> None:
    cache = filled(3, 1000, 2000, 3000)
    assert cache.get(key(1000)) is not None
    cache.put(key(4000), state())
    assert starts(cache) == {1000, 3000, 4000}
    assert cache.covers(key(3000))
    cache.put(key(5000), state())
    assert starts(cache) == {3000, 4000, 5000}
    assert (cache.evictions, len(cache), cache.bytes) == (2, 3, 3 * COST)


def test_a_state_larger_than_the_budget_is_not_kept_and_evicts_nothing() -> None:
    cache = filled(2, 1000)
    assert not cache.put(key(2000), state(pages=3))
    assert (starts(cache), cache.evictions) == ({1000}, 0)


def test_a_longer_state_replaces_the_one_it_begins_with() -> None:
    cache = filled(9, 1000, 5000)
    rejected = pack([*range(1000, 1100), *range(9000, 9000 + SLACK)])  # a draft's tail that was not accepted
    cache.put(rejected, state())
    longer = key(1000, 300)
    cache.put(longer, state())
    assert len(cache) == 2
    assert cache.covers(key(1000))
    assert cache.covers(rejected)
    assert cache.bytes == COST + cost(longer, state())
    assert cache.evictions == 0


def test_another_answer_to_the_same_prompt_is_another_state() -> None:
    cache = filled(9, 1000)
    cache.put(pack([*range(1000, 1050), *range(50)]), state())
    assert len(cache) == 2


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(SLACK + 1, 60), st.integers(1, 3)), max_size=30))
def test_bytes_are_the_sum_and_never_above_the_budget(puts: list[tuple[int, int, int]]) -> None:
    cache = StateLru(5 * COST)
    kept: dict[bytes, int] = {}
    for start, n, pages in puts:
        one = key(1000 * start, n)
        if cache.put(one, state(pages)):
            kept[one] = cost(one, state(pages))
        kept = {name: size for name, size in kept.items() if name in cache}
        assert cache.bytes == sum(kept.values()) <= cache.budget_bytes
        assert len(cache) == len(kept)
        found = cache.longest(one)
        assert found is None or cache.get(found.key) is not None
        assert all(length(name) > SLACK for name in kept)
    cache.clear()
    assert (cache.bytes, len(cache)) == (0, 0)


def test_an_entry_counts_its_pages_its_ids_and_its_objects() -> None:
    assert cost(key(0), memoryview(b"x")) == PAGE + 400 + ENTRY_BYTES
    assert allocate(10).nbytes == 10
    assert bytes(allocate(3)) == b"\0\0\0"


GROWTH = """
import random, sys
import numpy as np
from pilotfish.cache.prefix_map import pack
from pilotfish.cache.state_lru import StateLru
from pilotfish.cache.state_memory import allocate

def rss():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

def put(n):
    state = allocate(random.randrange(100_000, 3_000_000))
    np.frombuffer(state, np.uint8).fill(1)
    cache.put(pack(random.sample(range(100_000), len(state) // 1000)), state)

random.seed(1)
cache = StateLru(100_000_000)
put(0)
cache.clear()
before = rss()
for n in range(50 if sys.argv[1] == "filling" else 400):
    put(n)
print(cache.bytes, rss() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_bytes_counted_are_the_growth_of_the_process() -> None:
    """Within 5 %, while it fills and after many times its size has come and gone."""
    for phase in ("filling", "churning"):
        ran = subprocess.run([sys.executable, "-c", GROWTH, phase], capture_output=True, text=True, check=True)
        counted, grown = map(int, ran.stdout.split())
        assert counted > 60_000_000
        assert abs(counted - grown) < 0.05 * grown, f"{phase}: {counted} bytes counted, {grown} grown"
