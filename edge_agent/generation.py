"""The loop of one generation: draft, publish, wait, apply; what to do when nobody answers.

Drives a pure `Session` with a clock, a drafter and a broker. The session decides what a verdict means; this decides
when to draft, to send, to wait and to go on alone. What the drafter is asked is in `proposer.py`, how a job leaves in
`outbox.py`, when it is tried again in `retry.py`. Knows nothing of prompts' texts or of who asked.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable

from pilotfish.edge_agent.audit import Audit
from pilotfish.edge_agent.audit_jobs import AuditJobs
from pilotfish.edge_agent.gate import Gate
from pilotfish.edge_agent.learning import Learned, Lesson
from pilotfish.edge_agent.ledger import Ledger
from pilotfish.edge_agent.outbox import Inbox, Outbox, Unsent
from pilotfish.edge_agent.plan import Plan, policy_for
from pilotfish.edge_agent.policy import Pace
from pilotfish.edge_agent.proposer import DraftFn, Proposer
from pilotfish.edge_agent.retry import PASSING, Retry
from pilotfish.edge_agent.session import Committed, Limits, Round, Session
from pilotfish.edge_agent.tally import Tally
from pilotfish.edge_agent.task import Task
from pilotfish.protocol.broker import EdgeBroker
from pilotfish.protocol.errors import CloudError, JobRefused, PilotfishError
from pilotfish.protocol.fleet import Target
from pilotfish.protocol.messages import FinishReason, Refusal, Scores, Summary, Verdict
from pilotfish.protocol.tracing import Trace

RECOVER_SECONDS = 1.0  # between two looks whether the cloud is back


class Generation:
    """One generation; iterate `run()` for what is committed, then read `summary()` and `lesson()`.

    `learned` and `pace` are what its agent knows of draws like these, and of its speed: shared with other generations,
    and taught by every verdict. In `gated` mode the gate of the budget decides; one that is shut when the request
    begins leaves it alone, so that all its tokens get labels. `audit_share`: the chance by which a coin chose this
    request to be audited; None: it did not.
    """

    def __init__(
        self,
        task: Task,
        draft: DraftFn,
        broker: EdgeBroker | None,
        target: Target | None,
        vocab_size: int,
        learned: Learned | None = None,
        audit_share: float | None = None,
        pace: Pace | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.task, self.target, self._clock = task, target, clock
        self.learned = Learned() if learned is None else learned
        gate = self.learned.gate(task.max_disagreement) if task.mode == "gated" else None
        self.gate = gate if gate and gate.open else None
        self.ledger = Ledger(len(task.prompt))
        self.audit = Audit(self.ledger, audit_share) if audit_share and self.gate else None
        pace = Pace() if pace is None else pace
        self.plan = Plan(policy_for(task, pace), pace, self.learned.calibration.acceptance)
        limits = Limits(task.max_tokens, task.stop_ids, task.window, task.resends)
        self.session = Session.start(
            secrets.token_hex(16), target.id if target else "", task.sampling, task.prompt, limits, vocab_size
        )
        self.inbox: Inbox = asyncio.Queue()
        shared = broker if task.privacy == "shared" else None  # what has no broker cannot leak
        self.outbox = Outbox(shared, target, self.inbox, hasty=task.on_cloud_loss == "local")
        self.retry = Retry(task, clock)
        self.tally = Tally(self.session, self.ledger, self.plan, self.audit, clock)
        self.trace = Trace(mode=task.mode, prompt_tokens=len(task.prompt))
        longest = target.draft_max if target else None
        self.proposer = Proposer(task, draft, longest, self.session, self.plan, self.ledger, self.tally, self.trace)
        self.degraded = self._redis_is_silent = False
        self._rejoin: deque[Round] = deque()  # rounds a worker wants once more, with every id
        self._fatal: CloudError | None = None
        self._recover_at = clock()

    # --- outside view ----------------------------------------------------------------------------------------

    async def run(self) -> AsyncGenerator[list[Committed], None]:
        """Yield tokens as they become final. Raises DeadlineExceeded or JobRefused when it cannot go on."""
        self.retry.begin()
        self.tally.begin()
        self.plan.begin(self._clock())
        outcome = "abandoned"
        try:
            while not self.session.finish:
                tokens = await self._step()
                if tokens:
                    self.tally.committed(tokens)
                    yield tokens
                    self.plan.begin(self._clock())
            outcome = self.session.finish
            if self.audit and outcome != "cancelled":
                await self._have_scored(self.audit)
        except PilotfishError as error:
            outcome = error.code
            raise
        finally:
            self.tally.end(outcome)
            await self.outbox.end(drop=self.degraded or not self.session.finish)
            self.trace.end(outcome=outcome, tokens=len(self.session.generated), rounds=self.session.counts.rounds)
            if not self.degraded:
                await self.outbox.say_goodbye(self.session.id)

    def cancel(self, reason: FinishReason = "cancelled") -> None:
        """Stop at the next chance, here and in the cloud."""
        self.session.cancel(reason)
        self.inbox.put_nowait(Refusal(code="cancelled", worker="edge"))

    def redis_is_silent(self) -> None:
        """Who may go on alone does so now, and does not wait for a round's timer."""
        if self.may_go_on_alone:
            self._redis_is_silent = True
            self.inbox.put_nowait(Refusal(code="overloaded", worker="edge"))  # a nudge

    @property
    def may_go_on_alone(self) -> bool:
        """It relies on the cloud, and need not."""
        return self.task.on_cloud_loss == "local" and not self._alone

    @property
    def finish(self) -> FinishReason:
        """Why the generation ended."""
        return self.session.finish or "cancelled"

    def summary(self) -> Summary:
        """What it cost so far."""
        return self.tally.summary()

    def lesson(self) -> Lesson:
        """What can be learnt of it."""
        by_chance = self.gate is None or self.audit is not None  # not because it turned out to be hard
        whole = by_chance and self.ledger.complete and not self.tally.degraded
        weight = 1 / self.audit.share if self.audit else 1.0
        return Lesson(self.ledger.labels(), whole, weight, self.gate.budget if whole and self.gate else None)

    # --- one step --------------------------------------------------------------------------------------------

    async def _step(self) -> list[Committed]:
        """Apply what has arrived, else send more, else wait."""
        tokens = self._apply_arrived()
        if tokens or self.session.finish:
            return tokens
        if self._fatal:
            return self._lost(self._fatal)
        if self._redis_is_silent:
            return self._lost(None)
        if self.retry.left_seconds <= 0:
            raise self.retry.too_late(alone=self._alone)
        if self._alone:
            return await self._go_on_alone()
        if self._rejoin:
            return await self._send_whole(self._rejoin.popleft())
        if self._may_send:
            return await (self._commit_or_send(self.gate) if self.gate else self._send_more())
        return await self._wait()

    @property
    def _alone(self) -> bool:
        return self.degraded or self.task.mode == "edge_only" or not self.outbox.open

    @property
    def _may_send(self) -> bool:
        """Whether there is something to draft or to send; else a verdict must come first."""
        if self.retry.pausing or not self.session.room():
            return False
        if self.gate:
            return not self.session.flight
        flying = self.session.flying
        return not self.session.flight or bool(self.plan.unsent(flying)) or self.plan.wants_more(flying)

    async def _send_more(self) -> list[Committed]:
        """Draft behind whatever stands ahead, apply what came meanwhile, and open a round if one is due."""
        if continued := self.proposer.continued():
            await self._publish(self.session.publish((), continued - 1))
            return []
        dry = not await self.proposer.draft_ahead(self.inbox.empty)
        tokens = self._apply_arrived()
        room = self.proposer.room
        batch = self.plan.unsent(self.session.flying)[:room]
        if dry and not batch and not tokens and self.session.flight:
            return await self._wait()  # the drafter has no more to give, such as a full context
        ended = bool(self.task.stop_ids.intersection(batch))
        due = ended or self.plan.due(self.session.flying, room) if batch else dry and not self.session.flight
        if due and self.session.room() and not self.retry.pausing:
            await self._publish(self.session.publish(batch))  # without a draft it asks for one token
        return tokens

    async def _commit_or_send(self, gate: Gate) -> list[Committed]:
        """Draft; commit what the gate is sure of, and have the unsure tokens behind it verified.

        Nothing is in flight here: a sure token behind an outstanding verdict would be provisional.
        """
        drafted = await self.proposer.draft_for(gate)
        sure, unsure = gate.split(drafted.confidences)
        tokens = self.session.commit_local(drafted.ids[:sure]) if sure else []
        self.ledger.committed(tokens)
        if not self.session.finish and (unsure or not drafted.ids):
            rest = drafted.ids[sure : sure + unsure]
            await self._publish(self.session.publish(rest[: self.proposer.room]))
        return tokens

    async def _send_whole(self, flying: Round) -> list[Committed]:
        if flying in self.session.flight:
            await self._publish(flying)
        return []

    async def _publish(self, flying: Round) -> None:
        """Send a round's job and start its timer."""
        left_ms = max(1, int(self.retry.left_seconds * 1000))
        job = self.session.job(flying, agent=self.outbox.agent, boot=self.outbox.boot, deadline_ms=left_ms)
        span = self.trace.published(flying.number, base=flying.base, draft=len(flying.draft), resend=flying.attempt)
        if self.task.logprobs or span:
            job = job.model_copy(update={"logprobs": self.task.logprobs, "trace": span})
        self.retry.sent()
        self.plan.sent(flying, self._clock())
        await self.outbox.send(flying, job)

    # --- waiting ---------------------------------------------------------------------------------------------

    async def _wait(self) -> list[Committed]:
        """For a reply, the round's timer or the deadline, whichever is first."""
        if (seconds := self.retry.wait_seconds) <= 0:
            return await self._silence()  # whatever has come since: a flood of messages puts no timer off
        try:
            async with asyncio.timeout(seconds):  # wait_for loses cancellations in Python 3.11
                message = await self.inbox.get()
        except TimeoutError:
            return await self._silence()
        return self._apply(message)

    def _apply_arrived(self) -> list[Committed]:
        tokens: list[Committed] = []
        while not self.inbox.empty() and not self.session.finish:
            tokens += self._apply(self.inbox.get_nowait())
        return tokens

    def _apply(self, message: Verdict | Scores | Refusal | Unsent) -> list[Committed]:
        if isinstance(message, Unsent):
            if message.flying in self.session.flight:
                self.retry.failed(message.why)
            return []
        if isinstance(message, Refusal):
            self.trace.answered(message.round, outcome=message.code)
            self._refused(message)
            return []
        self.tally.computed(message)
        if isinstance(message, Scores):
            return []  # an audit never changes the text
        if message.last:
            self.trace.answered(message.round, outcome="verdict", accepted=message.accepted, worker=message.worker)
        tokens = self.session.on_verdict(message)
        self.learned.judged(labels := self.ledger.committed(tokens))
        self.plan.answered(message, tokens, labels, self._clock(), idle=not self.session.flight)
        if tokens:
            self.outbox.worker = message.worker
            self.retry.answered(more=bool(self.session.flight))
        return tokens

    def _refused(self, refusal: Refusal) -> None:
        if not self.session.concerns(refusal):
            return
        why = f"worker {refusal.worker} refused: {refusal.sentence or refusal.code}"
        if refusal.code == "need_prefix" and (whole := self.session.on_need_prefix(refusal.round)):
            self.outbox.worker = refusal.worker
            self._rejoin.append(whole)
        elif refusal.code in PASSING or refusal.code == "need_prefix":
            self.retry.failed(why)
        else:
            self._fatal = JobRefused(refusal.code, why)

    async def _silence(self) -> list[Committed]:
        """The timer fired: send the oldest round again, to whoever takes it, or do without the cloud."""
        if self.retry.left_seconds <= 0:
            raise self.retry.too_late(alone=self._alone)
        self.retry.resumed(unanswered=bool(self.session.flight))
        if not self.session.flight:
            return []  # answered after all
        self.outbox.worker = ""
        if again := self.session.on_silence():
            await self._publish(again)
        elif self.task.on_cloud_loss == "local":
            return self._lost(None)
        else:
            self.session.bump()  # wait: only the verifier commits, so ask afresh until the deadline
        return []

    def _lost(self, error: CloudError | None) -> list[Committed]:
        """The cloud will not help: go on alone if the request allows it."""
        if self.task.on_cloud_loss != "local":
            raise error or self.retry.too_late(alone=self._alone)
        self._fatal, self._redis_is_silent = None, False
        self.retry.forget()
        self.degraded = self.tally.degraded = True
        self._recover_at = self._clock() + RECOVER_SECONDS
        self.session.bump()
        return []

    # --- without the cloud -----------------------------------------------------------------------------------

    async def _go_on_alone(self) -> list[Committed]:
        if self.degraded and self._clock() >= self._recover_at:
            self._recover_at = self._clock() + RECOVER_SECONDS
            if await self.outbox.anybody_there():
                self.degraded = False
                return []
        drafted = await self.proposer.draft_alone()
        tokens = self.session.commit_local(drafted.ids)
        self.ledger.skip(len(tokens))  # nobody decided to commit these: there was no one to ask
        return tokens

    # --- afterwards ------------------------------------------------------------------------------------------

    async def _have_scored(self, audit: Audit) -> None:
        """What the gate committed, by the target; nothing is asked of a cloud that was lost."""
        audit.unsent = self.session.unsent
        if self.outbox.open and self.target and not self.degraded:
            longest, heard = self.target.draft_max, self.tally.computed
            await AuditJobs(audit, self.session, self.outbox, self.inbox, longest, heard).run()
