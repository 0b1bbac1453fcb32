"""A hypothesis state machine that plays drafter, clock, network and workers against a session.

The drafter is right or wrong as it likes; jobs and replies are lost, doubled, late and out of order; workers forget,
stop half way, answer `need_prefix` and `stale`, and (in half of the runs) read a near-tie differently from their peers.
After every step the invariants below hold, and at the end of every run the network heals and the generation must end.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from pilotfish.cloud_worker.engines.fake import FakeTarget
from pilotfish.edge_agent.session import Limits, Round, Session
from pilotfish.protocol.history import History
from pilotfish.protocol.messages import Refusal, Sampling, Verdict, VerifyJob

VOCAB = 6
TARGET = "0123456789abcdef"
SAMPLING = Sampling(temperature=0.7, seed=11)
PROMPT = (1, 2, 3)


@dataclass
class Worker:
    """What `cloud_worker/verify.py` promises, without its engine: soft memory, `need_prefix`, `stale`, draws."""

    name: str
    flips: bool
    known: list[int] = field(default_factory=list)
    rejected_epoch: int = -1

    def draw(self, prefix: Sequence[int]) -> int:
        """The target's draw after a prefix; with `flips`, another one at a quarter of all positions."""
        target = FakeTarget(prefix, SAMPLING, VOCAB)
        mine = FakeTarget(prefix, SAMPLING, 4, salt=self.name).draw(len(prefix))
        return (target.draw(len(prefix)) + (self.flips and mine == 0)) % VOCAB

    def answer(self, job: VerifyJob, chunk: int) -> list[Verdict | Refusal]:
        if job.epoch <= self.rejected_epoch:
            return [self._refuse(job, "stale")]
        if job.offset > len(self.known):
            return [self._refuse(job, "need_prefix")]
        history = History(TARGET, SAMPLING, [*self.known[: job.offset], *job.ids])
        if history.digest(job.base) != job.digest:
            assert job.offset, "a whole job whose digest is not that of its own ids"
            return [self._refuse(job, "need_prefix")]
        return self._serve(job, history, chunk)

    def _serve(self, job: VerifyJob, history: History, chunk: int) -> list[Verdict | Refusal]:
        draws = self._verify(list(history.ids), job.draft)
        if len(draws) <= len(job.draft):
            self.rejected_epoch = job.epoch
        replies: list[Verdict | Refusal] = [self._verdict(job, history, draws, 0, last=job.continue_tokens == 0)]
        left = job.continue_tokens
        while left:
            more = self._decode(list(history.ids), min(chunk, left))
            left -= len(more)
            replies.append(self._verdict(job, history, more, len(replies), last=left == 0))
        self.known = list(history.ids)
        return replies

    def _verify(self, ids: list[int], draft: Sequence[int]) -> list[int]:
        draws: list[int] = []
        for drafted in (*draft, None):
            draws.append(self.draw(ids + draws))
            if draws[-1] != drafted:
                break
        return draws

    def _decode(self, ids: list[int], count: int) -> list[int]:
        start = len(ids)
        for _ in range(count):
            ids.append(self.draw(ids))
        return ids[start:]

    def _verdict(self, job: VerifyJob, history: History, draws: list[int], seq: int, *, last: bool) -> Verdict:
        base = len(history)
        verdict = Verdict(
            boot=job.boot,
            session=job.session,
            epoch=job.epoch,
            round=job.round,
            seq=seq,
            last=last,
            base=base,
            digest=history.digest(base),
            draws=tuple(draws),
            accepted=len(draws) - 1,
            worker=self.name,
            credit=1,
        )
        history.extend(draws)
        return verdict

    def _refuse(self, job: VerifyJob, code: str) -> Refusal:
        return Refusal(session=job.session, epoch=job.epoch, round=job.round, code=code, worker=self.name)


class SessionMachine(RuleBasedStateMachine):
    """See the module docstring. `session_class` is replaced by broken ones in the negative control."""

    session_class = Session
    worker_class: type[Any] = Worker  # the real one plays in tests/chaos/test_worker_machine.py

    @initialize(
        flips=st.booleans(),
        alone=st.booleans(),
        window=st.integers(1, 4),
        max_tokens=st.integers(1, 24),
        stop_ids=st.sets(st.integers(0, VOCAB - 1), max_size=1),
    )
    def begin(self, flips: bool, alone: bool, window: int, max_tokens: int, stop_ids: set[int]) -> None:
        self.limits = Limits(max_tokens, frozenset(stop_ids), window)
        self.session = self.session_class.start("0" * 32, TARGET, SAMPLING, PROMPT, self.limits, VOCAB)
        self.flips, self.alone = flips, alone
        self.workers = [self.worker_class("a", flips), self.worker_class("b", flips)]
        self.jobs: list[VerifyJob] = []
        self.replies: list[Verdict | Refusal] = []
        self.seen = list(PROMPT)
        self.local: set[int] = set()  # positions committed without the cloud
        self.last_epoch = 0

    # --- the edge ------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.session.room())
    @rule(wrong=st.lists(st.sampled_from([0, 0, 0, 0, 0, 1, 2]), max_size=5))
    def draft(self, wrong: list[int]) -> None:
        """Each drafted id is the target's own draw, or off by something."""
        ids = self.session.assumed()
        for off in wrong[: self.session.room()]:
            ids.append((self.workers[0].draw(ids) + off) % VOCAB)
            if ids[-1] in self.limits.stop_ids:
                break
        self._send(self.session.publish(ids[len(self.session.assumed()) :]))

    @precondition(lambda self: self.session.room() and not self.session.flight)
    @rule()
    def ask_to_continue(self) -> None:
        self._send(self.session.publish((), self.session.remaining - 1))

    @precondition(lambda self: self.session.flight)
    @rule()
    def timer_fires(self) -> None:
        """As `generation.py` does it in `wait`: resend, and after the last resend ask afresh."""
        if (again := self.session.on_silence()) is None:
            self.session.bump()
        else:
            self._send(again)

    @precondition(lambda self: self.alone and not self.session.finish)
    @rule(ids=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=3))
    def go_on_alone(self, ids: list[int]) -> None:
        start = self.session.committed
        out = self.session.commit_local(ids)
        assert out
        assert {token.origin for token in out} == {"local"}
        self.local.update(range(start, start + len(out)))

    def _send(self, flying: Round) -> None:
        self.jobs.append(self.session.job(flying, agent="a", boot="b", deadline_ms=1000))

    # --- the network and the workers -------------------------------------------------------------------------------

    @precondition(lambda self: self.jobs)
    @rule(data=st.data(), worker=st.integers(0, 1), chunk=st.integers(1, 9), again=st.booleans())
    def worker_runs_a_job(self, data: st.DataObject, worker: int, chunk: int, again: bool) -> None:
        """Any job, by any worker, whose reply may be cut short; `again` leaves the job for a second delivery."""
        index = data.draw(st.integers(0, len(self.jobs) - 1))
        job = self.jobs[index] if again else self.jobs.pop(index)
        said = self.workers[worker].answer(job, chunk)
        self.replies += said[: data.draw(st.integers(0, len(said)))] if len(said) > 1 else said

    @precondition(lambda self: self.jobs)
    @rule(cut=st.integers(1, 3), chunks=st.tuples(st.integers(1, 4), st.integers(2, 9)))
    def a_peer_takes_a_job_over(self, cut: int, chunks: tuple[int, int]) -> None:
        """A worker dies after some chunks of its answer; its lease runs out and the other starts again."""
        job = self.jobs.pop()
        dying, peer = self.workers
        for reply in [*dying.answer(job, chunks[0])[:cut], *peer.answer(job, chunks[1])]:
            self._receive(reply)

    @precondition(lambda self: self.replies)
    @rule(data=st.data(), again=st.booleans())
    def reply_arrives(self, data: st.DataObject, again: bool) -> None:
        index = data.draw(st.integers(0, len(self.replies) - 1))
        self._receive(self.replies[index] if again else self.replies.pop(index))

    @precondition(lambda self: self.replies)
    @rule()
    def oldest_reply_arrives(self) -> None:
        self._receive(self.replies.pop(0))

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def job_is_lost(self, data: st.DataObject) -> None:
        self.jobs.pop(data.draw(st.integers(0, len(self.jobs) - 1)))

    @precondition(lambda self: self.replies)
    @rule(data=st.data())
    def reply_is_lost(self, data: st.DataObject) -> None:
        self.replies.pop(data.draw(st.integers(0, len(self.replies) - 1)))

    @rule(worker=st.integers(0, 1))
    def worker_restarts(self, worker: int) -> None:
        self.workers[worker] = self.worker_class(self.workers[worker].name, self.flips)

    @precondition(lambda self: any(isinstance(r, Verdict) for r in self.replies))
    @rule(data=st.data(), fault=st.sampled_from(["epoch", "digest", "session", "vocabulary", "prompt"]))
    def forged_verdict_arrives(self, data: st.DataObject, fault: str) -> None:
        """A verdict that is not of this session's own history changes nothing, at once or later."""
        honest = data.draw(st.sampled_from([r for r in self.replies if isinstance(r, Verdict)]))
        epoch = self.session.epoch
        changes: dict[str, dict[str, object]] = {
            "epoch": {"epoch": epoch - 1 if epoch else 1},
            "digest": {"epoch": epoch, "digest": bytes(16), "base": min(honest.base, self.session.committed)},
            "session": {"epoch": epoch, "session": "1" * 32},
            "vocabulary": {"epoch": epoch, "draws": (VOCAB,)},
            "prompt": {"epoch": epoch, "base": len(PROMPT) - 1},
        }
        before = self._essence()
        assert self.session.on_verdict(honest.model_copy(update=changes[fault])) == []
        assert self._essence() == before

    def _receive(self, reply: Verdict | Refusal) -> None:
        if isinstance(reply, Refusal):
            self._refused(reply)
            return
        applied, epoch = self.session.counts.applied, self.session.epoch
        out = self.session.on_verdict(reply)
        assert bool(out) == (self.session.counts.applied > applied), "an applied verdict commits at least one token"
        assert not out or reply.epoch == epoch

    def _refused(self, refusal: Refusal) -> None:
        if not self.session.concerns(refusal):
            return
        whole = self.session.on_need_prefix(refusal.round) if refusal.code == "need_prefix" else None
        if whole:
            self._send(whole)
        else:
            self.timer_fires()

    # --- what holds after every step -------------------------------------------------------------------------------

    def _essence(self) -> object:
        """Everything but the counters."""
        session = self.session
        return copy.deepcopy(
            (list(session.history.ids), session.epoch, session.flight, session.finish, session._waiting)
        )

    @invariant()
    def committed_ids_only_grow_and_each_is_explained(self) -> None:
        ids = self.session.history.ids.tolist()
        assert ids[: len(self.seen)] == self.seen
        for position in range(len(self.seen), len(ids)):
            draws = {worker.draw(ids[:position]) for worker in self.workers}
            assert position in self.local or ids[position] in draws, f"nobody drew {ids[position]} at {position}"
        self.seen = ids

    @invariant()
    def without_near_ties_the_text_is_the_targets_own(self) -> None:
        if not self.flips and not self.local:
            assert list(self.session.generated) == _chain(len(self.session.generated))

    @invariant()
    def the_epoch_never_goes_back(self) -> None:
        assert self.session.epoch >= self.last_epoch
        self.last_epoch = self.session.epoch

    @invariant()
    def the_flight_is_short_contiguous_and_joins_the_history(self) -> None:
        flight, limits = self.session.flight, self.limits
        assert len(flight) <= limits.window
        assert len(self.session._waiting) <= limits.window
        assert not flight or flight[0].base <= self.session.committed < flight[0].reach
        for one, next_one in pairwise(flight):
            assert next_one.base == one.base + len(one.draft)
        assert self.session.assumed()[: self.session.committed] == self.seen

    @invariant()
    def it_ends_exactly_at_a_stop_id_or_the_last_token(self) -> None:
        session, generated = self.session, list(self.session.generated)
        stopped = [token in self.limits.stop_ids for token in generated]
        assert not any(stopped[:-1])
        expected = "stop" if stopped and stopped[-1] else "length" if session.remaining == 0 else None
        assert session.finish == expected
        assert len(generated) <= self.limits.max_tokens
        assert not (session.finish and (session.flight or session.room()))

    @invariant()
    def there_is_always_something_to_wait_for_or_to_do(self) -> None:
        assert self.session.finish or self.session.flight or self.session.room()

    def teardown(self) -> None:
        """The network heals: every job reaches the same worker and every reply comes back."""
        if not hasattr(self, "session"):
            return
        steps = 0
        while not self.session.finish:
            steps += 1
            assert steps <= 2 * self.limits.max_tokens + 8, "the generation hangs"
            self._one_healthy_step()
        self._nothing_is_committed_after_the_end()

    def _one_healthy_step(self) -> None:
        """What was lost is noticed by the timer, what is missing is drafted, what is sent is answered."""
        self.jobs.clear()
        if self.session.flight:
            self.timer_fires()
        if self.session.room():
            self.draft([1])
        for job in list(self.jobs):
            for reply in self.workers[0].answer(job, chunk=4):
                self._receive(reply)
        self.committed_ids_only_grow_and_each_is_explained()

    def _nothing_is_committed_after_the_end(self) -> None:
        before = self._essence()
        for reply in [r for r in self.replies if isinstance(r, Verdict)]:
            assert self.session.on_verdict(reply) == []
        assert self.session.commit_local([1]) == []
        assert self.session.on_silence() is None
        assert self._essence() == before


def _chain(length: int) -> list[int]:
    """What the target writes after the prompt, by itself."""
    honest, ids = Worker("a", flips=False), list(PROMPT)
    while len(ids) < len(PROMPT) + length:
        ids.append(honest.draw(ids))
    return ids[len(PROMPT) :]
