"""The two tiers as one cache: what serves what, and what is counted."""

from __future__ import annotations

from pathlib import Path

import pytest

from pilotfish.cache.edge_cache import WORTH, EdgeCache, Statistics, worthwhile
from pilotfish.cache.model_build import ModelBuild
from pilotfish.cache.prefix_map import pack
from pilotfish.cache.state_folder import StateFolder
from pilotfish.cache.state_lru import SLACK, cost

BUILD = ModelBuild(weights="a" * 64, kv="f16", engine="llama-cpp-python 0.3.36")
TALK = list(range(100))


def state_of(ids: list[int]) -> memoryview:
    return memoryview(pack(ids) * 50)


def folder(path: Path) -> StateFolder:
    return StateFolder(path / "kv", BUILD, model="tiny", context=4096, budget_bytes=10**9)


def save(cache: EdgeCache, ids: list[int], *, closing: bool = True) -> bool:
    """Whether the state was read."""
    read: list[bool] = []

    def state() -> memoryview:
        read.append(True)
        return state_of(ids)

    cache.save(ids, state, closing=closing)
    return bool(read)


@pytest.mark.parametrize(
    "asked",
    [[*TALK, 500, 501], TALK[:60], TALK, [*TALK[:40], *range(700, 800)]],
    ids=["the next turn", "a regeneration", "the same once more", "a shared system prompt"],
)
def test_a_stored_conversation_serves(asked: list[int]) -> None:
    cache = EdgeCache(10**8)
    save(cache, TALK)
    save(cache, list(range(900, 1000)))
    found = cache.find(asked)
    assert found == (pack(TALK), state_of(TALK))


def test_what_shares_too_little_is_computed() -> None:
    cache = EdgeCache(10**8)
    save(cache, list(range(3000)))
    assert cache.find([*range(SLACK), 9000, 9001]) is None
    assert cache.find([*range(SLACK + 1), 9000, 9001]) is None  # 3000 ids for 17
    assert cache.find([*range(100), 9000, 9001])
    assert [worthwhile(100, 100 * WORTH + n) for n in (0, 1)] == [True, False]


def test_a_state_is_read_only_if_no_other_serves_for_it() -> None:
    cache = EdgeCache(10**8)
    assert save(cache, TALK)
    assert not save(cache, TALK)
    assert not save(cache, TALK[:50])
    assert not save(cache, list(range(700, 700 + SLACK)))
    assert save(cache, [*TALK, *range(300, 330)])
    assert cache.statistics.states == 1


def test_statistics() -> None:
    cache = EdgeCache(3 * cost(pack(TALK), state_of(TALK)))
    cache.count(0)
    cache.count(70)
    cache.count(30)
    for start in range(4):
        save(cache, [1000 * start + one for one in TALK])
    assert cache.statistics == Statistics(2, 1, 100, 1, 3, 3 * cost(pack(TALK), state_of(TALK)))
    cache.close()
    assert (cache.statistics.states, cache.statistics.bytes) == (0, 0)


# --- with a folder -------------------------------------------------------------------------------------------


def test_closed_sessions_are_found_after_a_restart_and_then_lie_in_memory(tmp_path: Path) -> None:
    before = EdgeCache(10**8, folder(tmp_path))
    save(before, TALK)
    save(before, list(range(500, 600)), closing=False)
    before.close()
    after = EdgeCache(10**8, folder(tmp_path))
    assert after.find(list(range(500, 600))) is None
    assert after.find(TALK) == (pack(TALK), state_of(TALK))
    assert after.statistics.states == 1
    for file in (tmp_path / "kv").iterdir():
        file.unlink()
    assert after.find(TALK)
    after.close()


def test_a_state_in_memory_goes_to_disk_when_its_session_closes(tmp_path: Path) -> None:
    cache = EdgeCache(10**8, folder(tmp_path))
    assert save(cache, TALK, closing=False)
    assert save(cache, TALK)
    assert not save(cache, TALK)
    cache.close()
    assert len(list((tmp_path / "kv").iterdir())) == 1


def test_the_tier_that_shares_more_is_asked_and_the_other_stands_in(tmp_path: Path) -> None:
    first = EdgeCache(10**8, folder(tmp_path))
    save(first, TALK)
    first.close()
    cache = EdgeCache(10**8, folder(tmp_path))
    short = [*TALK[:50], *range(800, 840)]
    save(cache, short, closing=False)
    assert cache.shared(TALK) == 100
    (file,) = (tmp_path / "kv").iterdir()
    file.write_bytes(file.read_bytes()[:-1] + b"x")  # damaged: memory has half of it
    assert cache.find(TALK) == (pack(short), state_of(short))
    assert cache.find([*TALK[:50], 1]) == (pack(short), state_of(short))
    cache.close()


def test_memory_too_small_for_a_state_still_restores_it_from_disk(tmp_path: Path) -> None:
    first = EdgeCache(10**8, folder(tmp_path))
    save(first, TALK)
    first.close()
    cache = EdgeCache(1000, folder(tmp_path))
    assert cache.find(TALK) == (pack(TALK), state_of(TALK))
    assert cache.statistics.states == 0
    cache.drop(pack(TALK))
    assert cache.find(TALK) is None
    assert list((tmp_path / "kv").iterdir()) == []
    cache.close()
