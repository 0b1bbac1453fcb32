"""When a generation tries the cloud again: a round's timer, pauses that grow, the request's deadline. Pure but a clock.

Knows nothing of what is sent, nor to whom. Times are a clock's seconds.
"""

from __future__ import annotations

from collections.abc import Callable

from pilotfish.edge_agent.task import Task
from pilotfish.protocol.errors import DeadlineExceeded

RETRY_SECONDS = 0.1  # the first pause after a try that came to nothing; each next one is twice as long
RETRY_MAX_SECONDS = 1.0
#: refusals that another try may cure; every other code but need_prefix ends the generation (or degrades it)
PASSING = frozenset({"stale", "expired", "overloaded", "engine_failed", "dead_letter", "cancelled"})


class Retry:
    """`pausing`: the last try came to nothing, so nothing new is sent before its time has come."""

    def __init__(self, task: Task, clock: Callable[[], float]) -> None:
        self._task, self._clock = task, clock
        self.pausing = False
        self._pause = RETRY_SECONDS
        self._why = ""  # what went wrong last, for the sentence of the deadline
        self.begin()

    def begin(self) -> None:
        """The time of the request runs from here."""
        self._at = self._clock()
        self._deadline = self._at + self._task.deadline_ms / 1000

    # --- questions -------------------------------------------------------------------------------------------

    @property
    def left_seconds(self) -> float:
        """Until the deadline; 0 or less once it has passed."""
        return self._deadline - self._clock()

    @property
    def wait_seconds(self) -> float:
        """Until the round's timer, the end of the pause or the deadline; 0 or less: now."""
        return min(self._at, self._deadline) - self._clock()

    def too_late(self, *, alone: bool) -> DeadlineExceeded:
        """The error of a deadline that passed, with what went wrong; `alone`: without asking the cloud."""
        ms = self._task.deadline_ms
        if alone:
            return DeadlineExceeded(f"the answer took longer than its deadline of {ms} ms: give it more time")
        why = f" ({self._why})" if self._why else ""
        advice = "" if self._task.on_cloud_loss == "local" else ", or use --on-cloud-loss local"
        return DeadlineExceeded(f"no verdict within {ms} ms{why}: see `pilotfish queue ls`{advice}")

    # --- what happened ---------------------------------------------------------------------------------------

    def sent(self) -> None:
        """A round's job leaves: its timer starts."""
        self._at = self._clock() + self._patience()

    def failed(self, why: str) -> None:
        """A try came to nothing: pause, longer each time. What else fails during a pause prolongs nothing."""
        if not self.pausing:
            self._why, self.pausing = why, True
            self._at = self._clock() + self._pause
            self._pause = min(RETRY_MAX_SECONDS, self._pause * 2)

    def resumed(self, *, unanswered: bool) -> None:
        """The wait is over; `unanswered`: a round is still out."""
        self.pausing = False
        if unanswered:
            self._why = self._why or "no answer from a worker"

    def answered(self, *, more: bool) -> None:
        """A verdict counted; `more` are out. During a pause those have still to be sent again, so it goes on."""
        self._pause = RETRY_SECONDS
        self.pausing = self.pausing and more
        if not self.pausing:
            self._why = ""
            self.sent()

    def forget(self) -> None:
        """The cloud is given up: whoever comes back to it begins with the shortest pause."""
        self.pausing, self._pause = False, RETRY_SECONDS

    def _patience(self) -> float:
        """Seconds a round may go unanswered; who may go on alone keeps half of the time left for that."""
        patience = self._task.round_timeout_ms / 1000
        if self._task.on_cloud_loss == "local":
            patience = min(patience, self.left_seconds / (2 * (self._task.resends + 1)))
        return max(0.0, patience)
