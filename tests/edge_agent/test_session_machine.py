"""The session against everything a network and two honest workers can do to it, and against some dishonest bytes.

The game is in `contracts/session_machine.py`. The last test breaks the session on purpose in several ways and expects
the machine to notice each.
"""

from __future__ import annotations

import pytest
from contracts.session_machine import SessionMachine
from hypothesis.stateful import invariant, run_state_machine_as_test

from nightly import NIGHTLY, STEPS_AT_LEAST, control, played
from pilotfish.edge_agent.session import Committed, Session
from pilotfish.protocol.messages import Verdict

pytestmark = pytest.mark.slow


class CountedMachine(SessionMachine):
    """The game, with the number of steps played."""

    steps = 0

    @invariant()
    def a_step_was_played(self) -> None:
        type(self).steps += 1


def test_the_session_survives_whatever_a_network_and_two_workers_do() -> None:
    run_state_machine_as_test(CountedMachine, settings=played(suite=250, nightly=600))
    assert CountedMachine.steps >= (STEPS_AT_LEAST if NIGHTLY else 1_000)


# --- negative control: a machine that cannot fail proves nothing ---------------------------------------------------


class IgnoresDigest(Session):
    def _digest_at(self, base: int) -> bytes:
        return self._claimed if self._claimed else super()._digest_at(base)

    _claimed = b""

    def _consider(self, verdict: Verdict) -> list[Committed]:
        type(self)._claimed = verdict.digest
        try:
            return super()._consider(verdict)
        finally:
            type(self)._claimed = b""


class IgnoresEpoch(Session):
    def _consider(self, verdict: Verdict) -> list[Committed]:
        return super()._consider(verdict.model_copy(update={"epoch": self.epoch}))


class TrustsTheOverlap(Session):
    def _apply(self, verdict: Verdict) -> list[Committed]:
        own = tuple(self.history.ids[verdict.base : verdict.base + len(verdict.draws)])
        return super()._apply(verdict.model_copy(update={"draws": own + verdict.draws[len(own) :]}))


class KeepsItsEpoch(Session):
    def bump(self) -> None:
        super().bump()
        self.epoch = 0


class KeepsItsFlight(Session):
    def bump(self) -> None:
        flight = list(self.flight)
        super().bump()
        self.flight = flight


class WritesPastTheEnd(Session):
    def _ends(self, token: int, fresh: int) -> bool:
        return fresh > self.remaining and super()._ends(token, fresh)


class NeverLands(Session):
    def _land(self, verdict: Verdict) -> None:
        pass


BROKEN = [IgnoresDigest, IgnoresEpoch, TrustsTheOverlap, KeepsItsEpoch, KeepsItsFlight, WritesPastTheEnd, NeverLands]


@pytest.mark.parametrize("broken", BROKEN)
def test_the_machine_notices_a_broken_session(broken: type[Session]) -> None:
    machine = type(broken.__name__, (SessionMachine,), {"session_class": broken})
    with pytest.raises((AssertionError, ValueError, IndexError)):  # an invariant's, or what it stumbles over itself
        run_state_machine_as_test(machine, settings=control())
