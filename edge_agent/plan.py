"""One generation's drafting: what stands ahead, what to do next, what each step teaches. Pure: it is told the time.

Between `generation.py`, which waits and sends, and `policy.py`, which decides on numbers. Times are a clock's seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pilotfish.edge_agent.ahead import Ahead
from pilotfish.edge_agent.calibration import Labelled
from pilotfish.edge_agent.drafters.base import Draft, Proceed
from pilotfish.edge_agent.policy import FixedDraft, Pace, Policy, StopRule
from pilotfish.edge_agent.session import Committed, Round
from pilotfish.edge_agent.task import Task
from pilotfish.protocol.messages import Verdict

FIXED_K = 4  # of a fixed draft that nobody gave a length

Acceptance = Callable[[float], float]  # a score -> the probability that the target agrees


class Plan:
    """See the module docstring. `flying` is always the number of drafted ids in flight, as the session counts them."""

    def __init__(self, policy: Policy, pace: Pace, acceptance: Acceptance) -> None:
        self.policy, self.pace, self.acceptance = policy, pace, acceptance
        self.ahead = Ahead()
        self.ceded = 0  # tokens the cloud wrote because drafting measured slower
        self._sent: dict[int, tuple[float, Round]] = {}
        self._since = 0.0  # when what is committed next began
        self._prefill = 0.0  # ms since then on ids that no policy could have spared
        self.prefill_ms = 0.0  # of these, over the whole generation
        self._cycle_tokens, self._cycle_ms = 0, 0.0  # of drafting, since nothing was in flight

    # --- what to do next -------------------------------------------------------------------------------------

    def unsent(self, flying: int) -> list[int]:
        """Drafted, and not yet on its way."""
        return self.ahead.ids[flying:]

    def wants_more(self, flying: int) -> bool:
        """Whether to draft on."""
        chances = self.ahead.chances
        return self.policy.goes_on(chances[:flying], chances[flying:])

    def due(self, flying: int, room: int) -> bool:
        """Whether what is unsent leaves now: the round is full, no more is worth drafting, or it was held enough."""
        flown, batch = self.ahead.chances[:flying], self.ahead.chances[flying:]
        return len(batch) >= room or self.policy.due(flown, batch) or not self.policy.goes_on(flown, batch)

    def proceed(self, flying: int) -> Proceed:
        """What the drafter asks after each token, on its own thread."""
        flown, batch = self.ahead.chances[:flying], self.ahead.chances[flying:]

        def proceed(token: int, score: float) -> bool:
            batch.append(self.acceptance(score))
            return self.policy.goes_on(flown, batch) and not self.policy.due(flown, batch)

        return proceed

    # --- what happened ---------------------------------------------------------------------------------------

    def begin(self, now: float) -> None:
        """Time runs from here: at the start, and when whoever reads the tokens comes back for more."""
        self._since = now

    def drafted(self, draft: Draft) -> None:
        """More stands ahead. A long prefill is no measure of the drafter's pace."""
        self.ahead.extend(draft.ids, [self.acceptance(score) for score in draft.confidences])
        if draft.prefilled <= len(draft.ids) + 1:
            self.pace.drafted(len(draft.ids), draft.ms)
        else:
            self._prefill += max(0.0, draft.ms - len(draft.ids) * self.pace.token_ms)

    def sent(self, flying: Round, now: float) -> None:
        """A round's job left."""
        self._sent[flying.number] = now, flying

    def answered(
        self, verdict: Verdict, tokens: Sequence[Committed], labels: Sequence[Labelled], now: float, *, idle: bool
    ) -> None:
        """A verdict came; these tokens are final by it, with these labels. `idle`: nothing is in flight any more."""
        sent, flying = self._sent.get(verdict.round, (now, None))
        if verdict.last:  # earlier rounds will not be answered any more, or only out of order
            self._sent = {number: entry for number, entry in self._sent.items() if number > verdict.round}
        if flying is not None:
            self._measure(flying, verdict, 1000 * (now - sent))
        self.ahead.commit([token.id for token in tokens])
        self.pace.judged(labels)
        if tokens:
            self._committed(len(tokens), flying, now)
        if idle and self._cycle_tokens:
            self.pace.cycle(self._cycle_tokens, self._cycle_ms)
            self._cycle_tokens, self._cycle_ms = 0, 0.0

    def _measure(self, flying: Round, verdict: Verdict, wait_ms: float) -> None:
        if verdict.seq:
            self.pace.continued(len(verdict.draws), verdict.engine_ms)
            return
        rows = min(verdict.rows, len(flying.draft) + 1)
        prefill = min(verdict.engine_ms, (verdict.rows - rows) * verdict.row_ms)
        self._prefill += prefill
        self.pace.verified(rows, verdict.engine_ms - prefill, wait_ms - verdict.engine_ms, verdict.row_ms)

    def _committed(self, tokens: int, flying: Round | None, now: float) -> None:
        spent = 1000 * (now - self._since) - self._prefill
        self.prefill_ms += self._prefill
        self._since, self._prefill = now, 0.0
        if flying is not None and flying.continues:
            self.ceded += tokens
            self.pace.wrote(tokens)
        else:
            self._cycle_tokens += tokens
            self._cycle_ms += spent


def policy_for(task: Task, pace: Pace) -> Policy:
    """What decides how far to draft: the stop rule, or a length that was asked for."""
    if task.drafting == "fixed":
        return FixedDraft(FIXED_K if task.draft_tokens is None else task.draft_tokens)
    return StopRule(pace, task.window)
