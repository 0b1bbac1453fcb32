"""One generation's questions to its drafter: from which ids on, how many, and until when.

What was drafted is told to the plan, the ledger, the tally and the trace. Knows nothing of jobs or of when they leave.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence

from pilotfish.edge_agent.drafters.base import Draft, Proceed
from pilotfish.edge_agent.gate import Gate
from pilotfish.edge_agent.ledger import Ledger
from pilotfish.edge_agent.plan import Plan
from pilotfish.edge_agent.session import Session
from pilotfish.edge_agent.tally import Tally
from pilotfish.edge_agent.task import Task
from pilotfish.protocol.errors import PromptTooLong
from pilotfish.protocol.messages import Sampling
from pilotfish.protocol.tracing import Trace

CHUNK = 8  # tokens drafted at a time when nobody else has a say

#: (session, ids so far, how many, sampling, stop ids, proceed) -> draft
DraftFn = Callable[[str, Sequence[int], int, Sampling, frozenset[int], Proceed], Awaitable[Draft]]

log = logging.getLogger("pilotfish.agent")


class Proposer:
    """`longest`: tokens that the target takes in one draft; None: there is no target."""

    def __init__(
        self,
        task: Task,
        draft: DraftFn,
        longest: int | None,
        session: Session,
        plan: Plan,
        ledger: Ledger,
        tally: Tally,
        trace: Trace,
    ) -> None:
        self._task, self._draft_fn, self._longest = task, draft, longest
        self._session, self._plan, self._ledger, self._tally, self._trace = session, plan, ledger, tally, trace

    @property
    def room(self) -> int:
        """Longest draft of the next round: its verdict adds a token of its own."""
        bounds = (self._session.room() - 1, self._longest, self._task.draft_tokens)
        return max(0, min(bound for bound in bounds if bound is not None))

    def continued(self) -> int:
        """How many tokens to ask for without a draft: all in cloud_only, some where drafts do not pay, else 0."""
        if self._task.mode == "cloud_only":
            return self._session.remaining
        if self._task.drafting != "auto" or self._task.mode == "gated" or self._session.flight:
            return 0  # what the cloud writes by itself has no label, and a gate learns from labels
        pace = self._plan.pace
        before, ceded = pace.ceded, pace.cedes(self._session.remaining)
        if pace.ceded > before:
            rates = 1000 * pace.rate, 1000 * pace.alone_rate(pace.ceded)
            log.info("drafting gives %.0f tokens/s, the cloud alone %.0f: it writes the next %d", *rates, pace.ceded)
        return ceded

    async def draft_ahead(self, undisturbed: Callable[[], bool]) -> bool:
        """Draft until the policy has enough, or is disturbed: all may be in vain. False: there was nothing to draft."""
        flying = self._session.flying
        unsent = self._plan.unsent(flying)
        count = self.room - len(unsent)
        if count <= 0 or not self._plan.wants_more(flying) or self._task.stop_ids.intersection(unsent):
            return False
        goes_on, ids = self._plan.proceed(flying), self._session.assumed() + unsent
        drafted = await self._draft(ids, count, lambda *token: goes_on(*token) and undisturbed())
        self._plan.drafted(drafted)
        return bool(drafted.ids)

    async def draft_for(self, gate: Gate) -> Draft:
        """Draft as long as the gate is sure of every token, or unsure of every one behind those."""
        scores: list[float] = []

        def proceed(token: int, score: float) -> bool:
            scores.append(score)
            return sum(gate.split(scores)) == len(scores)

        count = min(self.room + 1, self._session.remaining)
        return await self._draft(self._session.assumed(), count, proceed)

    async def draft_alone(self) -> Draft:
        """Some tokens that nobody judges. Raises PromptTooLong when the draft model takes no more."""
        count = max(1, min(self._task.draft_tokens or CHUNK, self._session.remaining))
        drafted = await self._draft(self._session.assumed(), count, lambda *_: True)
        if not drafted.ids:
            raise PromptTooLong(
                f"the draft model's context is full after {self._session.committed} tokens: shorten the prompt"
            )
        self._plan.ahead.clear()
        return drafted

    async def _draft(self, ids: Sequence[int], count: int, proceed: Proceed) -> Draft:
        task = self._task
        drafted = await self._draft_fn(self._session.id, ids, count, task.sampling, task.stop_ids, proceed)
        self._tally.drafted(drafted.ms)
        self._ledger.drafted(len(ids), drafted.ids, drafted.confidences)
        self._trace.drafted(len(drafted.ids), drafted.ms)
        return drafted
