"""Asking the target to score what the gate committed, once the text is done. Knows nothing of what is learnt of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from pilotfish.edge_agent.audit import Audit
from pilotfish.edge_agent.outbox import Inbox, Outbox
from pilotfish.edge_agent.session import Session
from pilotfish.protocol.errors import BrokerError, NoWorker
from pilotfish.protocol.messages import Refusal, ScoreJob, Scores

AUDIT_SECONDS = 2.0  # an answer's end may wait so long for its audit; its text does not


@dataclass(frozen=True, slots=True)
class AuditJobs:
    """A session's audit under way: jobs of at most `longest` tokens; `heard` is told of each answer's scores."""

    audit: Audit
    session: Session
    outbox: Outbox
    inbox: Inbox
    longest: int
    heard: Callable[[Scores], None]

    async def run(self) -> None:
        """All of it, or as far as AUDIT_SECONDS last: a worker that is away, or slow, costs labels and no more."""
        with suppress(TimeoutError, NoWorker, BrokerError):
            async with asyncio.timeout(AUDIT_SECONDS):
                for start, end in self.audit.ledger.unscored(self.longest):
                    await self._score(start, end)

    async def _score(self, start: int, end: int) -> None:
        """One span, and once more with every id if the worker does not know the session."""
        for whole in (False, True):
            job = self.session.score_job(
                start, end, whole=whole, agent=self.outbox.agent, boot=self.outbox.boot,
                deadline_ms=int(AUDIT_SECONDS * 1000),
            )  # fmt: skip
            self.audit.jobs += 1
            await self.outbox.publish(job)
            answer = await self._answer_to(job)
            self.outbox.worker = answer.worker
            if isinstance(answer, Scores):
                self.heard(answer)
                self.audit.take(answer, job)
                return

    async def _answer_to(self, job: ScoreJob) -> Scores | Refusal:
        """What is said of this job; late verdicts are passed over."""
        while True:
            answer = await self.inbox.get()
            if isinstance(answer, Scores | Refusal) and (answer.session, answer.round) == (job.session, job.round):
                return answer
