"""What one generation cost: its tokens by who wrote them, rows, steps and milliseconds; the summary and the metrics."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pilotfish.edge_agent.audit import Audit
from pilotfish.edge_agent.ledger import Ledger
from pilotfish.edge_agent.plan import Plan
from pilotfish.edge_agent.session import Committed, Session
from pilotfish.protocol import metrics
from pilotfish.protocol.messages import MILLIS_MAX, Scores, Summary, Verdict


class Tally:
    """Adds up what it is told, and reads the rest where it is counted. `degraded`: it once went on alone."""

    def __init__(
        self, session: Session, ledger: Ledger, plan: Plan, audit: Audit | None, clock: Callable[[], float]
    ) -> None:
        self._session, self._ledger, self._plan, self._audit, self._clock = session, ledger, plan, audit, clock
        self.degraded = False
        self._origins = {"local": 0, "accepted": 0, "corrected": 0, "continued": 0}
        self._totals = {"cloud_rows": 0, "cloud_steps": 0, "cloud_ms": 0.0, "draft_ms": 0.0}
        self._started = clock()
        self._first_token: float | None = None

    def begin(self) -> None:
        """Time runs from here."""
        self._started = self._clock()

    def drafted(self, ms: float) -> None:
        """The draft model took so long."""
        self._totals["draft_ms"] += ms

    def computed(self, answer: Verdict | Scores) -> None:
        """A worker says what an answer took: a stranger, who may say anything."""
        self._totals["cloud_rows"] += answer.rows
        self._totals["cloud_steps"] += answer.steps
        self._totals["cloud_ms"] = min(MILLIS_MAX, self._totals["cloud_ms"] + answer.engine_ms)

    def committed(self, tokens: Sequence[Committed]) -> None:
        """Tokens are final, and shown now."""
        self._first_token = self._first_token or self._clock()
        for token in tokens:
            self._origins[token.origin] += 1
            metrics.TOKENS.labels(token.origin).inc()

    def summary(self) -> Summary:
        """What it cost so far."""
        counts, audit, now = self._session.counts, self._audit, self._clock()
        return Summary(
            tokens=len(self._session.generated),
            prompt_tokens=self._session.prompt_tokens,
            drafted=counts.drafted,
            unverified=self._ledger.local,
            never_sent=self._session.unsent,
            audited=audit.scored if audit else 0,
            audit_disagreed=audit.disagreed if audit else 0,
            rounds=counts.rounds,
            resends=counts.resends,
            ceded=self._plan.ceded,
            degraded=self.degraded,
            seed=self._session.sampling.seed,
            first_token_ms=round(((self._first_token or now) - self._started) * 1000, 3),
            total_ms=round((now - self._started) * 1000, 3),
            **self._origins,
            **self._totals,
        )

    def end(self, outcome: str) -> None:
        """Into the metrics, once, at the end."""
        counts = self._session.counts
        metrics.GENERATIONS.labels(outcome).inc()
        metrics.RESENDS.inc(counts.resends)
        metrics.DEGRADED.inc(self.degraded)
        metrics.CEDED.inc(self._plan.ceded)
        for fate in ("applied", "stale", "duplicate", "disagreed", "invalid", "reordered"):
            metrics.VERDICTS.labels(fate).inc(getattr(counts, fate))
