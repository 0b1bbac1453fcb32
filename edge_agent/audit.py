"""One request's audit: the target scores afterwards what the gate committed. Pure; `audit_jobs.py` asks for it.

The scores are labels and nothing else: no committed token changes.
"""

from __future__ import annotations

from dataclasses import dataclass

from pilotfish.edge_agent.ledger import Ledger
from pilotfish.protocol.messages import ScoreJob, Scores


@dataclass(slots=True)
class Audit:
    """`share`: the chance it had to be chosen; `rows`, `steps`: what the cloud computed for it.

    `scored` local tokens got their label, `disagreed` of those differ.
    """

    ledger: Ledger
    share: float
    jobs: int = 0
    unsent: int = 0  # tokens that had never left before it
    rows: int = 0
    steps: int = 0
    scored: int = 0
    disagreed: int = 0

    def take(self, scores: Scores, job: ScoreJob) -> None:
        """Labels for the audited tokens; an answer about anything else is dropped."""
        self.rows += scores.rows
        self.steps += scores.steps
        if (scores.base, scores.digest) != (job.base, job.digest) or len(scores.draws) < len(job.draft):
            return
        self.ledger.scored(scores.base, scores.draws[: len(job.draft)])
        known = [label for label in self.ledger.labels() if label.local]
        self.scored, self.disagreed = len(known), sum(not label.agreed for label in known)
