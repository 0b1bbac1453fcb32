"""What stands ahead of the committed end, and what a commit leaves of it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pilotfish.edge_agent.ahead import Ahead

IDS = st.lists(st.integers(0, 3), max_size=8)


def ahead(ids: list[int]) -> Ahead:
    found = Ahead()
    found.extend(ids, [0.5 + at / 100 for at in range(len(ids))])
    return found


def test_a_confirmed_draft_stays_ahead_behind_what_was_committed() -> None:
    drafted = ahead([1, 2, 3])
    drafted.commit([1, 2])
    assert (drafted.ids, drafted.chances) == ([3], [0.52])


def test_what_stood_behind_a_wrong_id_is_forgotten() -> None:
    drafted = ahead([1, 2, 3])
    drafted.commit([1, 9])
    assert drafted.ids == drafted.chances == []


@given(IDS, IDS)
def test_only_what_still_continues_the_text_is_kept(drafted: list[int], final: list[int]) -> None:
    found = ahead(drafted)
    found.commit(final)
    agrees = drafted[: len(final)] == final[: len(drafted)]
    assert found.ids == (drafted[len(final) :] if agrees else [])
    assert len(found.ids) == len(found.chances)
