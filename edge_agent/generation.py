"""The loop of one generation: draft, publish, wait, apply; what to do when nobody answers.

Drives a pure `Session` with a clock, a drafter and a broker. The session decides what a verdict means; this decides
when to draft, how long to wait, and where to send. Knows nothing of prompts' texts or of who asked.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from pilotfish.edge_agent.drafters.base import Draft
from pilotfish.edge_agent.session import Committed, Limits, Round, Session
from pilotfish.protocol.broker import EdgeBroker
from pilotfish.protocol.errors import BrokerError, CloudError, DeadlineExceeded, JobRefused, NoWorker
from pilotfish.protocol.fleet import Target
from pilotfish.protocol.messages import (
    Cancel,
    Close,
    FinishReason,
    Mode,
    OnCloudLoss,
    Refusal,
    Sampling,
    Summary,
    Verdict,
)

RETRY_SECONDS = 0.1
RECOVER_SECONDS = 1.0
#: refusals that another try may cure; every other code ends the generation (or degrades it)
PASSING = frozenset({"stale", "expired", "overloaded", "engine_failed", "dead_letter", "cancelled"})

DraftFn = Callable[[str, Sequence[int], int, Sampling, frozenset[int]], Awaitable[Draft]]


@dataclass(frozen=True, slots=True)
class Task:
    """What one generation is asked for; the prompt is token ids already."""

    prompt: tuple[int, ...]
    mode: Mode = "exact"
    on_cloud_loss: OnCloudLoss = "wait"
    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int = 256
    stop_ids: frozenset[int] = frozenset()
    draft_tokens: int = 4
    window: int = 1
    resends: int = 2
    round_timeout_ms: int = 5_000
    deadline_ms: int = 120_000


class Generation:
    """One generation; iterate `run()` for what is committed, then read `summary()`."""

    def __init__(self, task: Task, draft: DraftFn, broker: EdgeBroker | None, target: Target | None, vocab_size: int):
        self.task, self._draft_fn, self.broker, self.target = task, draft, broker, target
        limits = Limits(task.max_tokens, task.stop_ids, task.window, task.resends)
        self.session = Session.start(
            secrets.token_hex(16), target.id if target else "", task.sampling, task.prompt, limits, vocab_size
        )
        self.inbox: asyncio.Queue[Verdict | Refusal] = asyncio.Queue()
        self.worker = ""
        self.degraded = self.was_degraded = False
        self._totals = {"cloud_rows": 0, "cloud_steps": 0, "cloud_ms": 0.0, "draft_ms": 0.0}
        self._origins = {"local": 0, "accepted": 0, "corrected": 0, "continued": 0}
        self._fatal: CloudError | None = None
        self._first_token: float | None = None

    # --- outside view ----------------------------------------------------------------------------------------

    async def run(self) -> AsyncIterator[list[Committed]]:
        """Yield tokens as they become final. Raises DeadlineExceeded, JobRefused or BrokerError when it cannot go on."""
        self._clock = asyncio.get_running_loop().time
        self._started = self._progress = self._recover_at = self._clock()
        self._deadline = self._started + self.task.deadline_ms / 1000
        try:
            while not self.session.finish:
                tokens = await self._step()
                if tokens:
                    self._note(tokens)
                    yield tokens
        finally:
            await self._say_goodbye()

    def cancel(self) -> None:
        """Stop at the next chance, here and in the cloud."""
        self.session.cancel()
        self.inbox.put_nowait(Refusal(code="cancelled", worker="edge"))

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
            rounds=counts.rounds,
            resends=counts.resends,
            degraded=self.was_degraded,
            seed=self.task.sampling.seed,
            first_token_ms=round(((self._first_token or now) - self._started) * 1000, 3),
            total_ms=round((now - self._started) * 1000, 3),
            **self._origins,
            **self._totals,  # type: ignore[arg-type]
        )

    def _note(self, tokens: list[Committed]) -> None:
        self._first_token = self._first_token or self._clock()
        for token in tokens:
            self._origins[token.origin] += 1

    # --- one step --------------------------------------------------------------------------------------------

    async def _step(self) -> list[Committed]:
        """Apply what has arrived, else send more, else wait."""
        tokens = self._apply_arrived()
        if tokens or self.session.finish:
            return tokens
        if self._fatal:
            return await self._lost(self._fatal)
        if self._clock() >= self._deadline:
            raise DeadlineExceeded(self._too_late())
        if self._alone:
            return await self._go_on_alone()
        if self.session.room():
            await self._send_more()
            return []
        return await self._wait()

    @property
    def _alone(self) -> bool:
        return self.degraded or self.task.mode == "edge_only" or self.broker is None

    async def _send_more(self) -> None:
        """Open one more round: a continuation in cloud_only, else a draft behind whatever is in flight."""
        if self.task.mode == "cloud_only":
            await self._publish(self.session.publish((), self.session.remaining - 1))
            return
        epoch = self.session.epoch
        drafted = await self._draft(min(self.task.draft_tokens, self._draft_max, self.session.room() - 1))
        if self.session.epoch == epoch and self.session.room() and self.inbox.empty():
            await self._publish(self.session.publish(drafted.ids))

    @property
    def _draft_max(self) -> int:
        return self.target.draft_max if self.target else self.task.draft_tokens

    async def _draft(self, count: int) -> Draft:
        ids = self.session.assumed()
        drafted = await self._draft_fn(self.session.id, ids, max(0, count), self.task.sampling, self.task.stop_ids)
        self._totals["draft_ms"] += drafted.ms
        return drafted

    async def _publish(self, flying: Round) -> None:
        assert self.broker is not None
        assert self.target is not None
        left_ms = max(1, int((self._deadline - self._clock()) * 1000))
        job = self.session.job(flying, agent=self.broker.agent, boot=self.broker.boot, deadline_ms=left_ms)
        self._progress = self._clock()
        try:
            await self.broker.publish(self.target.id, "" if flying.whole else self.worker, job)
        except (NoWorker, BrokerError) as error:
            self._unsent = error
            await asyncio.sleep(RETRY_SECONDS)
            self._progress = self._clock() - self.task.round_timeout_ms / 1000  # as if it had gone unanswered

    # --- waiting ---------------------------------------------------------------------------------------------

    async def _wait(self) -> list[Committed]:
        """For a reply, the round's timer or the deadline, whichever is first."""
        until = min(self._progress + self.task.round_timeout_ms / 1000, self._deadline)
        try:
            message = await asyncio.wait_for(self.inbox.get(), max(0.0, until - self._clock()))
        except TimeoutError:
            return await self._silence()
        return self._apply(message)

    def _apply_arrived(self) -> list[Committed]:
        tokens: list[Committed] = []
        while not self.inbox.empty() and not self.session.finish:
            tokens += self._apply(self.inbox.get_nowait())
        return tokens

    def _apply(self, message: Verdict | Refusal) -> list[Committed]:
        if isinstance(message, Refusal):
            self._refused(message)
            return []
        self._totals["cloud_rows"] += message.rows
        self._totals["cloud_steps"] += message.steps
        self._totals["cloud_ms"] += message.engine_ms
        tokens = self.session.on_verdict(message)
        if tokens:
            self.worker, self._progress = message.worker, self._clock()
        return tokens

    def _refused(self, refusal: Refusal) -> None:
        if not self.session.concerns(refusal):
            return
        if refusal.code == "need_prefix" and (whole := self.session.on_need_prefix(refusal.round)):
            self._resend = whole
            self._progress = float("-inf")
        elif refusal.code in PASSING or refusal.code == "need_prefix":
            self._progress = float("-inf")
        else:
            self._fatal = JobRefused(refusal.code, f"worker {refusal.worker} refused: {refusal.sentence}")

    _resend: Round | None = None
    _unsent: CloudError | BrokerError | None = None

    async def _silence(self) -> list[Committed]:
        """The timer fired (or a refusal asked for another try): send again, or do without the cloud."""
        if self._clock() >= self._deadline:
            raise DeadlineExceeded(self._too_late())
        again, self._resend = self._resend or self.session.on_silence(), None
        if again is None and self.task.on_cloud_loss == "local":
            return await self._lost(None)
        if again is None:
            self.session.bump()  # wait: only the verifier commits, so ask afresh until the deadline
        else:
            await self._publish(again)
        return []

    async def _lost(self, error: CloudError | None) -> list[Committed]:
        """The cloud will not help: go on alone if the request allows it."""
        if self.task.on_cloud_loss != "local":
            raise error or DeadlineExceeded(self._too_late())
        self._fatal = None
        self.degraded = self.was_degraded = True
        self._recover_at = self._clock() + RECOVER_SECONDS
        self.session.bump()
        return []

    def _too_late(self) -> str:
        why = f" ({self._unsent})" if self._unsent else ""
        return f"no verdict within {self.task.deadline_ms} ms{why}: see `pilotfish queue ls`, or use --on-cloud-loss local"

    # --- without the cloud -----------------------------------------------------------------------------------

    async def _go_on_alone(self) -> list[Committed]:
        if self.degraded and self._clock() >= self._recover_at and await self._cloud_is_back():
            self.degraded, self._progress = False, self._clock()
            return []
        count = max(1, min(self.task.draft_tokens, self.session.remaining))
        return self.session.commit_local((await self._draft(count)).ids)

    async def _cloud_is_back(self) -> bool:
        self._recover_at = self._clock() + RECOVER_SECONDS
        if self.broker is None or self.target is None:
            return False
        try:
            return await self.broker.live_workers(self.target.id) > 0
        except BrokerError:
            return False

    async def _say_goodbye(self) -> None:
        """The session is over: the worker may forget it. Best effort, nothing depends on it."""
        if not (self.worker and self.broker and self.target):
            return
        kind = Cancel if self.session.finish in (None, "cancelled") else Close
        for message in (kind, Close) if kind is Cancel else (Close,):
            note = message(agent=self.broker.agent, boot=self.broker.boot, session=self.session.id)
            try:
                await self.broker.publish(self.target.id, self.worker, note)
            except (NoWorker, BrokerError):
                return
