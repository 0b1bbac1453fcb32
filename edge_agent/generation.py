"""The loop of one generation: draft, publish, wait, apply; what to do when nobody answers.

Drives a pure `Session` with a clock, a drafter and a broker. The session decides what a verdict means; this decides
when to draft, how long to wait, and where to send. Knows nothing of prompts' texts or of who asked.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import suppress
from typing import NamedTuple

from pilotfish.edge_agent.audit import Audit
from pilotfish.edge_agent.drafters.base import Draft, Proceed
from pilotfish.edge_agent.gate import Gate
from pilotfish.edge_agent.learning import Learned, Lesson
from pilotfish.edge_agent.ledger import Ledger
from pilotfish.edge_agent.plan import Plan
from pilotfish.edge_agent.policy import FixedDraft, Pace, Policy, StopRule
from pilotfish.edge_agent.session import Committed, Limits, Round, Session
from pilotfish.edge_agent.task import Task
from pilotfish.protocol import metrics
from pilotfish.protocol.broker import EdgeBroker
from pilotfish.protocol.errors import (
    BrokerError,
    CloudError,
    DeadlineExceeded,
    JobRefused,
    NoWorker,
    PilotfishError,
    PromptTooLong,
)
from pilotfish.protocol.fleet import Target
from pilotfish.protocol.messages import (
    MILLIS_MAX,
    Close,
    FinishReason,
    Refusal,
    Sampling,
    ScoreJob,
    Scores,
    Summary,
    Verdict,
)
from pilotfish.protocol.tracing import Trace

RETRY_SECONDS = 0.1  # the first pause after a try that came to nothing; each next one is twice as long
RETRY_MAX_SECONDS = 1.0
AUDIT_SECONDS = 2.0  # an answer's end may wait so long for its audit; its text does not
RECOVER_SECONDS = 1.0  # between two looks whether the cloud is back
#: refusals that another try may cure; every other code but need_prefix ends the generation (or degrades it)
PASSING = frozenset({"stale", "expired", "overloaded", "engine_failed", "dead_letter", "cancelled"})

log = logging.getLogger("pilotfish.agent")
FIXED_K = 4  # of a fixed draft that nobody gave a length
CHUNK = 8  # tokens drafted at a time when nobody else has a say

DraftFn = Callable[[str, Sequence[int], int, Sampling, frozenset[int], Proceed], Awaitable[Draft]]


class Unsent(NamedTuple):
    """A job that did not reach Redis, or nobody who would read it there."""

    flying: Round
    why: str


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
        self.task, self._draft_fn, self.target = task, draft, target
        self.broker = broker if task.privacy == "shared" else None  # what has no broker cannot leak
        self.learned = Learned() if learned is None else learned
        gate = self.learned.gate(task.max_disagreement) if task.mode == "gated" else None
        self.gate = gate if gate and gate.open else None
        self.ledger = Ledger(len(task.prompt))
        self.audit = Audit(self.ledger, audit_share) if audit_share and self.gate else None
        pace = Pace() if pace is None else pace
        self.plan = Plan(_policy(task, pace), pace, self.learned.calibration.acceptance)
        limits = Limits(task.max_tokens, task.stop_ids, task.window, task.resends)
        self.session = Session.start(
            secrets.token_hex(16), target.id if target else "", task.sampling, task.prompt, limits, vocab_size
        )
        self.inbox: asyncio.Queue[Verdict | Scores | Refusal | Unsent] = asyncio.Queue()
        self._posts: set[asyncio.Task[None]] = set()  # jobs on their way to Redis
        self.worker = ""  # who is asked next: the one that answered last
        self.degraded = self.was_degraded = False
        self._redis_is_silent = False
        self._totals = {"cloud_rows": 0, "cloud_steps": 0, "cloud_ms": 0.0, "draft_ms": 0.0}
        self._origins = {"local": 0, "accepted": 0, "corrected": 0, "continued": 0}
        self._rejoin: deque[Round] = deque()  # rounds a worker wants once more, with every id
        self._pausing = False  # the last try came to nothing: send nothing new until `_retry_at`
        self._pause = RETRY_SECONDS
        self._why = ""  # what went wrong last, for the sentence of a deadline
        self._fatal: CloudError | None = None
        self.trace = Trace(mode=task.mode, prompt_tokens=len(task.prompt))
        self._clock = clock
        self._started = self._retry_at = self._recover_at = self._clock()
        self._deadline = self._started + task.deadline_ms / 1000
        self._first_token: float | None = None

    # --- outside view ----------------------------------------------------------------------------------------

    async def run(self) -> AsyncGenerator[list[Committed], None]:
        """Yield tokens as they become final. Raises DeadlineExceeded or JobRefused when it cannot go on."""
        self._started = self._clock()
        self._deadline = self._started + self.task.deadline_ms / 1000
        self.plan.begin(self._started)
        outcome = "abandoned"
        try:
            while not self.session.finish:
                tokens = await self._step()
                if tokens:
                    self._note(tokens)
                    yield tokens
                    self.plan.begin(self._clock())
            outcome = self.session.finish
            if self.audit and outcome != "cancelled":
                self.audit.unsent = self.session.unsent
                await self._ask_for_scores(self.audit)
        except PilotfishError as error:
            outcome = error.code
            raise
        finally:
            self._count(outcome)
            await self._end_posts()
            self.trace.end(outcome=outcome, tokens=len(self.session.generated), rounds=self.session.counts.rounds)
            await self._say_goodbye()

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
        counts, now = self.session.counts, self._clock()
        return Summary(
            tokens=len(self.session.generated),
            prompt_tokens=self.session.prompt_tokens,
            drafted=counts.drafted,
            unverified=self.ledger.local,
            never_sent=self.session.unsent,
            audited=self.audit.scored if self.audit else 0,
            audit_disagreed=self.audit.disagreed if self.audit else 0,
            rounds=counts.rounds,
            resends=counts.resends,
            ceded=self.plan.ceded,
            degraded=self.was_degraded,
            seed=self.task.sampling.seed,
            first_token_ms=round(((self._first_token or now) - self._started) * 1000, 3),
            total_ms=round((now - self._started) * 1000, 3),
            **self._origins,
            **self._totals,
        )

    def lesson(self) -> Lesson:
        """What can be learnt of it."""
        by_chance = self.gate is None or self.audit is not None  # not because it turned out to be hard
        whole = by_chance and self.ledger.complete and not self.was_degraded
        weight = 1 / self.audit.share if self.audit else 1.0
        return Lesson(self.ledger.labels(), whole, weight, self.gate.budget if whole and self.gate else None)

    def _note(self, tokens: list[Committed]) -> None:
        self._first_token = self._first_token or self._clock()
        for token in tokens:
            self._origins[token.origin] += 1
            metrics.TOKENS.labels(token.origin).inc()

    def _count(self, outcome: str) -> None:
        """Into the metrics, once, at the end."""
        counts = self.session.counts
        metrics.GENERATIONS.labels(outcome).inc()
        metrics.RESENDS.inc(counts.resends)
        metrics.DEGRADED.inc(self.was_degraded)
        metrics.CEDED.inc(self.plan.ceded)
        for fate in ("applied", "stale", "duplicate", "disagreed", "invalid", "reordered"):
            metrics.VERDICTS.labels(fate).inc(getattr(counts, fate))

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
        if self._clock() >= self._deadline:
            raise DeadlineExceeded(self._too_late())
        if self._alone:
            return await self._go_on_alone()
        if self._rejoin:
            return await self._send_whole(self._rejoin.popleft())
        if self._may_send:
            return await (self._commit_or_send(self.gate) if self.gate else self._send_more())
        return await self._wait()

    @property
    def _alone(self) -> bool:
        return self.degraded or self.task.mode == "edge_only" or self.broker is None

    @property
    def _may_send(self) -> bool:
        """Whether there is something to draft or to send; else a verdict must come first."""
        if self._pausing or not self.session.room():
            return False
        if self.gate:
            return not self.session.flight
        flying = self.session.flying
        return not self.session.flight or bool(self.plan.unsent(flying)) or self.plan.wants_more(flying)

    async def _send_more(self) -> list[Committed]:
        """Draft behind whatever stands ahead, apply what came meanwhile, and open a round if one is due."""
        if continued := self._continued():
            await self._publish(self.session.publish((), continued - 1))
            return []
        dry = not await self._draft_on()
        tokens = self._apply_arrived()
        room = self._draft_room()
        batch = self.plan.unsent(self.session.flying)[:room]
        if dry and not batch and not tokens and self.session.flight:
            return await self._wait()  # the drafter has no more to give, such as a full context
        ended = bool(self.task.stop_ids.intersection(batch))
        due = ended or self.plan.due(self.session.flying, room) if batch else dry and not self.session.flight
        if due and self.session.room() and not self._pausing:
            await self._publish(self.session.publish(batch))  # without a draft it asks for one token
        return tokens

    def _continued(self) -> int:
        """How many tokens to ask for without a draft: all in cloud_only, some where drafts do not pay, else 0."""
        if self.task.mode == "cloud_only":
            return self.session.remaining
        if self.task.drafting != "auto" or self.task.mode == "gated" or self.session.flight:
            return 0  # what the cloud writes by itself has no label, and a gate learns from labels
        pace = self.plan.pace
        before, ceded = pace.ceded, pace.cedes(self.session.remaining)
        if pace.ceded > before:
            rates = 1000 * pace.rate, 1000 * pace.alone_rate(pace.ceded)
            log.info("drafting gives %.0f tokens/s, the cloud alone %.0f: it writes the next %d", *rates, pace.ceded)
        return ceded

    async def _draft_on(self) -> bool:
        """Draft until the policy has enough, or a message came that may say all is in vain. False: nothing to draft."""
        flying = self.session.flying
        unsent = self.plan.unsent(flying)
        count = self._draft_room() - len(unsent)
        if count <= 0 or not self.plan.wants_more(flying) or self.task.stop_ids.intersection(unsent):
            return False
        goes_on, ids = self.plan.proceed(flying), self.session.assumed() + unsent
        drafted = await self._draft(ids, count, lambda *token: goes_on(*token) and self.inbox.empty())
        self.plan.drafted(drafted)
        return bool(drafted.ids)

    async def _commit_or_send(self, gate: Gate) -> list[Committed]:
        """Draft; commit what the gate is sure of, and have the unsure tokens behind it verified.

        Nothing is in flight here: a sure token behind an outstanding verdict would be provisional.
        """
        scores: list[float] = []

        def proceed(token: int, score: float) -> bool:
            scores.append(score)
            return sum(gate.split(scores)) == len(scores)

        count = min(self._draft_room() + 1, self.session.remaining)
        drafted = await self._draft(self.session.assumed(), count, proceed)
        sure, unsure = gate.split(drafted.confidences)
        tokens = self.session.commit_local(drafted.ids[:sure]) if sure else []
        self.ledger.committed(tokens)
        if not self.session.finish and (unsure or not drafted.ids):
            rest = drafted.ids[sure : sure + unsure]
            await self._publish(self.session.publish(rest[: self._draft_room()]))
        return tokens

    def _draft_room(self) -> int:
        """Longest draft of the next round: its verdict adds a token of its own."""
        room = [self.session.room() - 1]
        if self.target:
            room.append(self.target.draft_max)
        if self.task.draft_tokens is not None:
            room.append(self.task.draft_tokens)
        return max(0, min(room))

    async def _send_whole(self, flying: Round) -> list[Committed]:
        if flying in self.session.flight:
            await self._publish(flying)
        return []

    async def _draft(self, ids: Sequence[int], count: int, proceed: Proceed) -> Draft:
        task = self.task
        drafted = await self._draft_fn(self.session.id, ids, count, task.sampling, task.stop_ids, proceed)
        self._totals["draft_ms"] += drafted.ms
        self.ledger.drafted(len(ids), drafted.ids, drafted.confidences)
        self.trace.drafted(len(drafted.ids), drafted.ms)
        return drafted

    async def _publish(self, flying: Round) -> None:
        """Send a round's job and start its timer. Nobody waits for Redis to confirm it: drafting goes on meanwhile."""
        assert self.broker is not None
        assert self.target is not None
        left_ms = max(1, int((self._deadline - self._clock()) * 1000))
        job = self.session.job(flying, agent=self.broker.agent, boot=self.broker.boot, deadline_ms=left_ms)
        span = self.trace.published(flying.number, base=flying.base, draft=len(flying.draft), resend=flying.attempt)
        if self.task.logprobs or span:
            job = job.model_copy(update={"logprobs": self.task.logprobs, "trace": span})
        self._retry_at = self._clock() + self._patience()
        self.plan.sent(flying, self._clock())
        post = asyncio.create_task(self._post(flying, self.broker.publish(self.target.id, self.worker, job)))
        self._posts.add(post)
        post.add_done_callback(self._posts.discard)
        await asyncio.sleep(0)  # so that jobs leave in the order of their rounds

    async def _post(self, flying: Round, sent: Awaitable[bytes]) -> None:
        """A broker that is away, or without workers, is told to the loop, which tries again later."""
        try:
            async with asyncio.timeout(
                self.broker.patience if self.broker and self.task.on_cloud_loss == "local" else None
            ):
                await sent
        except (NoWorker, BrokerError, TimeoutError) as error:
            self.inbox.put_nowait(Unsent(flying, str(error) or "Redis does not answer"))

    def _patience(self) -> float:
        """Seconds a round may go unanswered; who may go on alone keeps half of the time left for that."""
        patience = self.task.round_timeout_ms / 1000
        if self.task.on_cloud_loss == "local":
            patience = min(patience, (self._deadline - self._clock()) / (2 * (self.task.resends + 1)))
        return max(0.0, patience)

    def _failed(self, why: str) -> None:
        """The last try came to nothing: pause, longer each time, then `_silence` sends it again or gives up."""
        self._why, self._pausing = why, True
        self._retry_at = self._clock() + self._pause
        self._pause = min(RETRY_MAX_SECONDS, self._pause * 2)

    # --- waiting ---------------------------------------------------------------------------------------------

    async def _wait(self) -> list[Committed]:
        """For a reply, the round's timer or the deadline, whichever is first."""
        until = min(self._retry_at, self._deadline)
        if self._clock() >= until:
            return await self._silence()  # whatever has come since: a flood of messages puts no timer off
        try:
            async with asyncio.timeout(max(0.0, until - self._clock())):  # wait_for loses cancellations in Python 3.11
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
            if message.flying in self.session.flight and not self._pausing:
                self._failed(message.why)
            return []
        if isinstance(message, Refusal):
            self.trace.answered(message.round, outcome=message.code)
            self._refused(message)
            return []
        self._totals["cloud_rows"] += message.rows
        self._totals["cloud_steps"] += message.steps
        self._totals["cloud_ms"] = min(MILLIS_MAX, self._totals["cloud_ms"] + message.engine_ms)  # says a stranger
        if isinstance(message, Scores):
            return []  # an audit never changes the text
        if message.last:
            self.trace.answered(message.round, outcome="verdict", accepted=message.accepted, worker=message.worker)
        tokens = self.session.on_verdict(message)
        self.learned.judged(labels := self.ledger.committed(tokens))
        self.plan.answered(message, tokens, labels, self._clock(), idle=not self.session.flight)
        if tokens:
            self.worker, self._pause = message.worker, RETRY_SECONDS
            self._pausing = self._pausing and bool(self.session.flight)
            if not self._pausing:  # else a later round still has to be sent again
                self._why, self._retry_at = "", self._clock() + self._patience()
        return tokens

    def _refused(self, refusal: Refusal) -> None:
        if not self.session.concerns(refusal):
            return
        why = f"worker {refusal.worker} refused: {refusal.sentence or refusal.code}"
        if refusal.code == "need_prefix" and (whole := self.session.on_need_prefix(refusal.round)):
            self.worker = refusal.worker
            self._rejoin.append(whole)
        elif refusal.code in PASSING or refusal.code == "need_prefix":
            if not self._pausing:  # nor do more refusals
                self._failed(why)
        else:
            self._fatal = JobRefused(refusal.code, why)

    async def _silence(self) -> list[Committed]:
        """The timer fired: send the oldest round again, to whoever takes it, or do without the cloud."""
        if self._clock() >= self._deadline:
            raise DeadlineExceeded(self._too_late())
        self._pausing = False
        if not self.session.flight:
            return []  # answered after all
        self._why = self._why or "no answer from a worker"
        self.worker = ""
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
            raise error or DeadlineExceeded(self._too_late())
        self._fatal, self._pausing, self._pause, self._redis_is_silent = None, False, RETRY_SECONDS, False
        self.degraded = self.was_degraded = True
        self._recover_at = self._clock() + RECOVER_SECONDS
        self.session.bump()
        return []

    def _too_late(self) -> str:
        if self._alone:
            return f"the answer took longer than its deadline of {self.task.deadline_ms} ms: give it more time"
        why = f" ({self._why})" if self._why else ""
        advice = "" if self.task.on_cloud_loss == "local" else ", or use --on-cloud-loss local"
        return f"no verdict within {self.task.deadline_ms} ms{why}: see `pilotfish queue ls`{advice}"

    # --- without the cloud -----------------------------------------------------------------------------------

    async def _go_on_alone(self) -> list[Committed]:
        if self.degraded and self._clock() >= self._recover_at and await self._cloud_is_back():
            self.degraded = False
            return []
        count = max(1, min(self.task.draft_tokens or CHUNK, self.session.remaining))
        drafted = await self._draft(self.session.assumed(), count, lambda *_: True)
        if not drafted.ids:
            raise PromptTooLong(
                f"the draft model's context is full after {self.session.committed} tokens: shorten the prompt"
            )
        self.plan.ahead.clear()
        tokens = self.session.commit_local(drafted.ids)
        self.ledger.skip(len(tokens))  # nobody decided to commit these: there was no one to ask
        return tokens

    async def _cloud_is_back(self) -> bool:
        self._recover_at = self._clock() + RECOVER_SECONDS
        if self.broker is None or self.target is None:
            return False
        try:
            return await self.broker.answers() and await self.broker.live_workers(self.target.id) > 0
        except BrokerError:
            return False

    async def _end_posts(self) -> None:
        """What is still on its way to Redis leaves before the last word, or not at all when nobody answers there."""
        posts = list(self._posts)
        for post in posts if self.degraded or not self.session.finish else ():
            post.cancel()
        await asyncio.gather(*posts, return_exceptions=True)

    # --- afterwards ------------------------------------------------------------------------------------------

    async def _ask_for_scores(self, audit: Audit) -> None:
        """Have the target score what the gate committed: a worker that is away, or slow, costs labels and no more."""
        if self.broker is None or self.target is None or self.degraded:
            return
        with suppress(TimeoutError, NoWorker, BrokerError):
            async with asyncio.timeout(AUDIT_SECONDS):
                for start, end in self.ledger.unscored(self.target.draft_max):
                    await self._score(audit, start, end)

    async def _score(self, audit: Audit, start: int, end: int) -> None:
        """One span, and once more with every id if the worker does not know the session."""
        assert self.broker is not None
        assert self.target is not None
        for whole in (False, True):
            job = self.session.score_job(
                start, end, whole=whole, agent=self.broker.agent, boot=self.broker.boot,
                deadline_ms=int(AUDIT_SECONDS * 1000),
            )  # fmt: skip
            audit.jobs += 1
            await self.broker.publish(self.target.id, self.worker, job)
            message = await self._reply_to(job)
            if isinstance(message, Scores):
                self._apply(message)
                self.worker = message.worker
                audit.take(message, job)
                return
            self.worker = message.worker

    async def _reply_to(self, job: ScoreJob) -> Scores | Refusal:
        """What is said of this audit; late verdicts are passed over."""
        while True:
            message = await self.inbox.get()
            if isinstance(message, Scores | Refusal) and (message.session, message.round) == (job.session, job.round):
                return message

    async def _say_goodbye(self) -> None:
        """The session is over: the worker may stop and forget it. Best effort, nothing depends on it."""
        asked = self.session.counts.rounds + (self.audit.jobs if self.audit else 0)
        if self.broker is None or self.target is None or self.degraded or not asked:
            return
        note = Close(agent=self.broker.agent, boot=self.broker.boot, session=self.session.id)
        with suppress(NoWorker, BrokerError):
            await self.broker.publish(self.target.id, self.worker, note)


def _policy(task: Task, pace: Pace) -> Policy:
    if task.drafting == "fixed":
        return FixedDraft(FIXED_K if task.draft_tokens is None else task.draft_tokens)
    return StopRule(pace, task.window)
