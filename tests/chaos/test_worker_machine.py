"""The real session against the real worker (`cloud_worker/verify.py`), with everything a network does in between.

The session's own machine (tests/edge_agent/) plays against a model of a worker. Here both sides are the product, so
that what they promise each other is what they do: `need_prefix`, `stale`, what a worker remembers after a failure, a
cancel, an eviction. Only the engine is the fake one, which in half of the games disagrees with its peer.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace

import pytest
from contracts.session_machine import SAMPLING, TARGET, VOCAB, SessionMachine
from hypothesis import strategies as st
from hypothesis.stateful import invariant, precondition, rule, run_state_machine_as_test

from nightly import NIGHTLY, STEPS_AT_LEAST, control, played
from pilotfish.cloud_worker.engines.base import VerifyEvent, VerifyRequest
from pilotfish.cloud_worker.engines.fake import FakeTarget, FakeVerifier, flipped_draw
from pilotfish.cloud_worker.verify import Ticket, Verification
from pilotfish.protocol.errors import EngineError
from pilotfish.protocol.messages import Message, Refusal, Verdict, VerifyJob

pytestmark = pytest.mark.slow

SEEDS = {"a": 1, "b": 2}
FLIP_RATE = 0.25


class Engine:
    """The fake engine as a worker sees it, without its process. `dying` says at which step it dies next."""

    def __init__(self, flip_rate: float, flip_seed: int) -> None:
        self.verifier = FakeVerifier(vocab=VOCAB, flip_rate=flip_rate, flip_seed=flip_seed)
        self.info = replace(self.verifier.info, fingerprint=TARGET)
        self.dying: int | None = None

    async def stream(self, request: VerifyRequest) -> AsyncGenerator[VerifyEvent, None]:
        self.verifier.submit(request)
        try:
            while True:
                if self.dying is not None:
                    self.dying -= 1
                    if self.dying < 0:
                        self.dying = None
                        raise EngineError("the engine process died")
                for event in self.verifier.step():
                    yield event
                    if event.done:
                        return
        finally:
            self.verifier.cancel(request.request_id)

    async def cancel(self, request_id: str) -> None:
        self.verifier.cancel(request_id)

    async def forget(self, session: str) -> None:
        self.verifier.forget(session)


class RealWorker:
    """In place of the session machine's model: the product's Verification, driven one job at a time."""

    def __init__(self, name: str, flips: bool) -> None:
        self.name, self.switches = name, (VOCAB, FLIP_RATE if flips else 0.0, SEEDS[name])
        self.engine = Engine(*self.switches[1:])
        self.verification = Verification(self.engine, name, lambda tenant: 1)
        self.jobs = 0

    def draw(self, prefix: Sequence[int]) -> int:
        return flipped_draw(FakeTarget(prefix, SAMPLING, VOCAB), len(prefix), *self.switches)

    def answer(self, job: VerifyJob, chunk: int) -> list[Verdict | Refusal]:
        said: list[Verdict | Refusal] = []

        async def hear(message: Message, last: bool) -> None:
            assert isinstance(message, Verdict | Refusal)
            assert not (said and getattr(said[-1], "last", True)), "something was said after the last word"
            said.append(message)

        self.jobs += 1
        asyncio.run(self.verification.handle(Ticket("default", job, 0, f"{self.name}{self.jobs}"), hear))
        assert said, "every job gets a reply"
        assert isinstance(said[-1], Refusal) or said[-1].last
        return said

    def forget(self, job: VerifyJob, *, close: bool) -> None:
        asyncio.run(self.verification.cancel("default", job.agent, job.session, close=close))


class WorkerMachine(SessionMachine):
    """See the module docstring."""

    worker_class = RealWorker
    steps = 0

    @precondition(lambda self: self.jobs)
    @rule(worker=st.integers(0, 1), step=st.integers(0, 2))
    def an_engine_will_die(self, worker: int, step: int) -> None:
        self.workers[worker].engine.dying = step

    @precondition(lambda self: self.jobs)
    @rule(worker=st.integers(0, 1), close=st.booleans())
    def a_cancel_arrives_late(self, worker: int, close: bool) -> None:
        self.workers[worker].forget(self.jobs[-1], close=close)

    @invariant()
    def a_step_was_played(self) -> None:
        type(self).steps += 1

    def teardown(self) -> None:
        for worker in getattr(self, "workers", ()):
            worker.engine.dying = None
        super().teardown()


def test_the_session_and_the_worker_keep_their_promises_to_each_other() -> None:
    run_state_machine_as_test(WorkerMachine, settings=played(suite=60, nightly=600))
    assert WorkerMachine.steps >= (STEPS_AT_LEAST if NIGHTLY else 100)


# --- negative control: what the machine must notice ------------------------------------------------------------------


class KeepsDraftsItRejected(RealWorker):
    """A worker that remembers rejected drafts as if they were the session's."""

    def answer(self, job: VerifyJob, chunk: int) -> list[Verdict | Refusal]:
        said = super().answer(job, chunk)
        if isinstance(said[0], Verdict) and said[0].accepted < len(job.draft):
            first = said[0].model_copy(update={"draws": (*job.draft, said[0].draws[-1]), "accepted": len(job.draft)})
            return [first, *said[1:]]
        return said


@pytest.mark.parametrize("broken", [KeepsDraftsItRejected])
def test_the_machine_notices_a_broken_worker(broken: type[RealWorker]) -> None:
    machine = type(broken.__name__, (WorkerMachine,), {"worker_class": broken})
    with pytest.raises(AssertionError):
        run_state_machine_as_test(machine, settings=control())
