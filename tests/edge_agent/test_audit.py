"""An audit's labels come from answers about what was asked, and from no others."""

from __future__ import annotations

from typing import Any

import pytest

from pilotfish.edge_agent.audit import Audit
from pilotfish.edge_agent.ledger import Ledger
from pilotfish.edge_agent.session import Committed
from pilotfish.protocol.messages import ScoreJob, Scores

ABOUT: dict[str, Any] = {"boot": "b", "session": "0" * 32, "round": 3, "base": 4, "digest": b"d" * 16}
JOB = ScoreJob(agent="edge1", epoch=0, offset=4, ids=(), draft=(7, 8, 9), **ABOUT)


@pytest.fixture
def audit() -> Audit:
    ledger = Ledger(4)
    ledger.drafted(4, JOB.draft, [0.5] * 3)
    ledger.committed([Committed(token, "local") for token in JOB.draft])
    return Audit(ledger, 0.5)


def answer(**changes: Any) -> Scores:
    return Scores(**{**ABOUT, "draws": (7, 0, 9), "worker": "w", "rows": 4, "steps": 1, **changes})


def test_an_answer_to_what_was_asked_labels_every_token(audit: Audit) -> None:
    audit.take(answer(), JOB)
    assert (audit.scored, audit.disagreed, audit.ledger.unscored(8)) == (3, 1, [])


@pytest.mark.parametrize("changes", [{"base": 5}, {"base": 1}, {"digest": b"?" * 16}, {"draws": (7, 0)}])
def test_any_other_labels_none(audit: Audit, changes: dict[str, Any]) -> None:
    audit.take(answer(**changes), JOB)
    assert (audit.scored, audit.ledger.unscored(8)) == (0, [(4, 7)])
    assert (audit.rows, audit.steps) == (4, 1), "what it cost was spent all the same"
