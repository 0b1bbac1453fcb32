"""`bench edgecache`: both caches keep the same conversations, and a cache that is none is told from one."""

from __future__ import annotations

from typing import Any

import pytest

from pilotfish.bench import edgecache
from pilotfish.bench.edgecache_side import LENGTHS, SYSTEM, conversations


def figures(ours: float, rival: float, restore_ms: float) -> dict[str, dict[str, Any]]:
    return {
        "edge cache": {"bytes_per_token": ours, "restore_ms_per_1k": restore_ms},
        "LlamaRAMCache": {"bytes_per_token": rival},
    }


@pytest.mark.parametrize(
    ("found", "enough", "met"),
    [
        (figures(1000, 12000, 0.4), True, [True, True]),
        (figures(2000, 12000, 2.1), True, [False, False]),
        (figures(1000, 12000, 0.4), False, [None, None]),
    ],
)
def test_targets(found: dict[str, dict[str, Any]], enough: bool, met: list[bool | None]) -> None:
    assert [one.met for one in edgecache.targets(found, enough=enough)] == met
    assert [one.name for one in edgecache.targets(found, enough=enough)] == ["bytes_ratio", "restore_ms_per_1k"]


def test_conversations_share_a_beginning_and_nothing_else() -> None:
    one, other = conversations(2, 250)
    assert (len(one), one[:SYSTEM]) == (250, other[:SYSTEM])
    assert one[SYSTEM] != other[SYSTEM]
    assert conversations(2, 250) == [one, other]


@pytest.mark.slow
@pytest.mark.llamacpp
def test_every_subject_is_asked_the_same_and_only_caches_spare_something() -> None:
    from pilotfish.demo.pair import draft_gguf

    model = draft_gguf()
    ours, rival, none = (edgecache.measured(which, model, 1) for which in ("ours", "rival", "none"))
    for cached in (ours, rival):
        assert cached["regenerations"]["tokens"] == none["regenerations"]["tokens"] == sum(LENGTHS)
        assert cached["regenerations"]["evaluated"] < 20 < none["regenerations"]["evaluated"]
        assert cached["second_turns"]["evaluated"] < none["second_turns"]["evaluated"] / 5
    assert rival["bytes_per_token"] > 4 * ours["bytes_per_token"] > 0
    assert ours["counted_per_token"] == pytest.approx(ours["bytes_per_token"], rel=0.1)  # three entries: pages count
    assert ours["restore_ms_per_1k"] < ours["restore_from_disk_ms_per_1k"]
