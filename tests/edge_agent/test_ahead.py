"""What stands ahead of the committed end, and what a commit says about it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pilotfish.edge_agent.ahead import Ahead, Label

IDS = st.lists(st.integers(0, 3), max_size=8)


def ahead(ids: list[int]) -> Ahead:
    found = Ahead()
    found.extend(ids, [0.5 + at / 100 for at in range(len(ids))], [0.9] * len(ids))
    return found


def test_a_confirmed_draft_stays_ahead_behind_what_was_committed() -> None:
    drafted = ahead([1, 2, 3])
    assert drafted.commit([1, 2]) == [Label(0.5, agreed=True), Label(0.51, agreed=True)]
    assert (drafted.ids, drafted.scores, drafted.chances) == ([3], [0.52], [0.9])


def test_what_stood_behind_a_wrong_id_is_forgotten_and_teaches_nothing() -> None:
    drafted = ahead([1, 2, 3])
    assert drafted.commit([1, 9, 3]) == [Label(0.5, agreed=True), Label(0.51, agreed=False)]
    assert drafted.ids == []


@given(IDS, IDS)
def test_a_commit_labels_the_common_part_and_keeps_only_what_still_continues_the_text(
    drafted: list[int], final: list[int]
) -> None:
    found = ahead(drafted)
    labels = found.commit(final)
    right = [label.agreed for label in labels]
    same = next((i for i, (a, b) in enumerate(zip(drafted, final, strict=False)) if a != b), None)
    assert right == [True] * (min(len(drafted), len(final)) if same is None else same) + [False] * (same is not None)
    assert found.ids == (drafted[len(final) :] if same is None else [])
    assert len(found.ids) == len(found.scores) == len(found.chances)
