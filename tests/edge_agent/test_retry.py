"""When a generation tries again, told the time by hand."""

from __future__ import annotations

from typing import Any

import pytest

from pilotfish.edge_agent.retry import RETRY_MAX_SECONDS, RETRY_SECONDS, Retry
from pilotfish.edge_agent.task import Task


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def retry(**task: Any) -> tuple[Retry, Clock]:
    clock = Clock()
    return Retry(Task((1,), **{"round_timeout_ms": 2_000, "deadline_ms": 60_000, **task}), clock), clock


def test_time_runs_from_the_beginning_and_not_from_when_it_was_made() -> None:
    one, clock = retry()
    clock.now += 70
    assert one.left_seconds < 0
    one.begin()
    assert one.left_seconds == 60


def test_a_round_is_waited_for_as_long_as_its_timer_and_never_beyond_the_deadline() -> None:
    one, clock = retry()
    one.sent()
    assert one.wait_seconds == 2
    clock.now += 59
    one.sent()
    assert one.wait_seconds == one.left_seconds == 1


def test_who_may_go_on_alone_keeps_half_of_the_time_for_it() -> None:
    one, clock = retry(on_cloud_loss="local", round_timeout_ms=60_000, resends=2)
    one.sent()
    assert one.wait_seconds == pytest.approx(60 / 2 / 3)
    clock.now += 61
    one.sent()
    assert one.wait_seconds < 0, "and keeps none of a deadline that has passed"


def test_each_pause_is_twice_as_long_as_the_last_up_to_the_longest() -> None:
    one, _ = retry()
    pauses = []
    for _ in range(6):
        one.failed("engine_failed")
        pauses.append(one.wait_seconds)
        one.resumed(unanswered=True)
    doubled = [RETRY_SECONDS * 2**n for n in range(6)]
    assert pauses == pytest.approx([min(RETRY_MAX_SECONDS, pause) for pause in doubled])


def test_more_failures_during_a_pause_prolong_nothing() -> None:
    one, clock = retry()
    one.failed("the first")
    clock.now += RETRY_SECONDS / 2
    one.failed("the second")
    assert one.pausing
    assert one.wait_seconds == pytest.approx(RETRY_SECONDS / 2)
    assert "(the first)" in str(one.too_late(alone=False))


def test_an_answer_ends_a_pause_only_if_no_other_round_has_to_be_sent_again() -> None:
    one, _ = retry()
    one.failed("overloaded")
    one.answered(more=True)
    assert one.pausing
    assert one.wait_seconds == pytest.approx(RETRY_SECONDS)
    one.answered(more=False)
    assert not one.pausing
    assert one.wait_seconds == 2
    one.failed("again")
    assert one.wait_seconds == pytest.approx(RETRY_SECONDS), "the pauses begin with the shortest again"


def test_a_cloud_that_was_given_up_is_asked_again_without_delay() -> None:
    one, _ = retry()
    for _ in range(3):
        one.failed("away")
        one.resumed(unanswered=True)
    one.failed("away")
    one.forget()
    assert not one.pausing
    one.failed("away")
    assert one.wait_seconds == pytest.approx(RETRY_SECONDS)


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ({}, "no verdict within 60000 ms (nobody): see `pilotfish queue ls`, or use --on-cloud-loss local"),
        ({"on_cloud_loss": "local"}, "no verdict within 60000 ms (nobody): see `pilotfish queue ls`"),
    ],
)
def test_a_missed_deadline_says_why_and_what_to_do(task: dict[str, Any], said: str) -> None:
    one, _ = retry(**task)
    one.failed("nobody")
    one.resumed(unanswered=True)
    assert str(one.too_late(alone=False)) == said
    assert "took longer than its deadline of 60000 ms" in str(one.too_late(alone=True))


def test_silence_is_named_unless_something_else_went_wrong_or_all_was_answered() -> None:
    one, _ = retry()
    one.resumed(unanswered=False)
    assert "(" not in str(one.too_late(alone=False))
    one.resumed(unanswered=True)
    assert "(no answer from a worker)" in str(one.too_late(alone=False))
    one.answered(more=False)
    assert "(" not in str(one.too_late(alone=False))
