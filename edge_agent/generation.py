"""The loop of one generation: draft, publish, wait, apply; what to do when nobody answers.

Drives a pure `Session` with a clock, a drafter and a broker. The session decides what a verdict means; this decides
when to draft, how long to wait, and where to send. Knows nothing of prompts' texts or of who asked.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from pilotfish.edge_agent.drafters.base import Draft
from pilotfish.edge_agent.session import Committed, Limits, Round, Session
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
    Close,
    FinishReason,
    Mode,
    OnCloudLoss,
    Refusal,
    Sampling,
    Summary,
    Verdict,
)

RETRY_SECONDS = 0.1  # the first pause after a try that came to nothing; each next one is twice as long
RETRY_MAX_SECONDS = 1.0
RECOVER_SECONDS = 1.0  # between two looks whether the cloud is back
#: refusals that another try may cure; every other code but need_prefix ends the generation (or degrades it)
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
        self._clock = time.monotonic
        self._started = self._retry_at = self._recover_at = self._clock()
        self._deadline = self._started + task.deadline_ms / 1000
        self._first_token: float | None = None

    # --- outside view ----------------------------------------------------------------------------------------

    async def run(self) -> AsyncGenerator[list[Committed], None]:
        """Yield tokens as they become final. Raises DeadlineExceeded or JobRefused when it cannot go on."""
        self._started = self._clock()
        self._deadline = self._started + self.task.deadline_ms / 1000
        outcome = "abandoned"
        try:
            while not self.session.finish:
                tokens = await self._step()
                if tokens:
                    self._note(tokens)
                    yield tokens
            outcome = self.session.finish
        except PilotfishError as error:
            outcome = error.code
            raise
        finally:
            self._count(outcome)
            await self._say_goodbye()

    def cancel(self) -> None:
        """Stop at the next chance, here and in the cloud."""
        self.session.cancel()
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
            rounds=counts.rounds,
            resends=counts.resends,
            degraded=self.was_degraded,
            seed=self.task.sampling.seed,
            first_token_ms=round(((self._first_token or now) - self._started) * 1000, 3),
            total_ms=round((now - self._started) * 1000, 3),
            **self._origins,
            **self._totals,
        )

    def _note(self, tokens: list[Committed]) -> None:
        self._first_token = self._first_token or self._clock()
        for token in tokens:
            self._origins[token.origin] += 1

    def _count(self, outcome: str) -> None:
        """Into the metrics, once, at the end."""
        counts = self.session.counts
        metrics.GENERATIONS.labels(outcome).inc()
        metrics.RESENDS.inc(counts.resends)
        metrics.DEGRADED.inc(self.was_degraded)
        for origin, tokens in self._origins.items():
            metrics.TOKENS.labels(origin).inc(tokens)
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
        if self.session.room() and not self._pausing:
            return await self._send_more()
        return await self._wait()

    @property
    def _alone(self) -> bool:
        return self.degraded or self.task.mode == "edge_only" or self.broker is None

    async def _send_more(self) -> list[Committed]:
        """Open one more round: a continuation in cloud_only, else a draft behind whatever is in flight.

        Verdicts that came while drafting are applied first; what they leave of the draft still holds if they agreed.
        """
        if self.task.mode == "cloud_only":
            await self._publish(self.session.publish((), self.session.remaining - 1))
            return []
        before = self.session.assumed()
        drafted = await self._draft(before, self._draft_room())
        tokens = self._apply_arrived()
        rest = _beyond(self.session.assumed(), before + drafted.ids)
        holds = rest or (rest is not None and not drafted.ids)  # a round without a draft asks for one token
        if holds and self.session.room() and not self._pausing:
            await self._publish(self.session.publish((rest or [])[: self._draft_room()]))
        return tokens

    def _draft_room(self) -> int:
        """Longest draft of the next round: its verdict adds a token of its own."""
        longest = self.target.draft_max if self.target else self.task.draft_tokens
        return max(0, min(self.task.draft_tokens, longest, self.session.room() - 1))

    async def _send_whole(self, flying: Round) -> list[Committed]:
        if flying in self.session.flight:
            await self._publish(flying)
        return []

    async def _draft(self, ids: Sequence[int], count: int) -> Draft:
        if count <= 0:
            return Draft()
        drafted = await self._draft_fn(self.session.id, ids, count, self.task.sampling, self.task.stop_ids)
        self._totals["draft_ms"] += drafted.ms
        return drafted

    async def _publish(self, flying: Round) -> None:
        """Send a round's job and start its timer; a broker that is away, or without workers, is tried again later."""
        assert self.broker is not None
        assert self.target is not None
        left_ms = max(1, int((self._deadline - self._clock()) * 1000))
        job = self.session.job(flying, agent=self.broker.agent, boot=self.broker.boot, deadline_ms=left_ms)
        try:
            async with asyncio.timeout(self.broker.patience if self.task.on_cloud_loss == "local" else None):
                await self.broker.publish(self.target.id, self.worker, job)
        except (NoWorker, BrokerError, TimeoutError) as error:
            self._failed(str(error) or "Redis does not answer")
        else:
            self._retry_at = self._clock() + self._patience()

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

    def _apply(self, message: Verdict | Refusal) -> list[Committed]:
        if isinstance(message, Refusal):
            self._refused(message)
            return []
        self._totals["cloud_rows"] += message.rows
        self._totals["cloud_steps"] += message.steps
        self._totals["cloud_ms"] += message.engine_ms
        tokens = self.session.on_verdict(message)
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
        count = max(1, min(self.task.draft_tokens, self.session.remaining))
        drafted = await self._draft(self.session.assumed(), count)
        if not drafted.ids:
            raise PromptTooLong(
                f"the draft model's context is full after {self.session.committed} tokens: shorten the prompt"
            )
        return self.session.commit_local(drafted.ids)

    async def _cloud_is_back(self) -> bool:
        self._recover_at = self._clock() + RECOVER_SECONDS
        if self.broker is None or self.target is None:
            return False
        try:
            return await self.broker.answers() and await self.broker.live_workers(self.target.id) > 0
        except BrokerError:
            return False

    async def _say_goodbye(self) -> None:
        """The session is over: the worker may stop and forget it. Best effort, nothing depends on it."""
        if self.broker is None or self.target is None or self.degraded or not self.session.counts.rounds:
            return
        note = Close(agent=self.broker.agent, boot=self.broker.boot, session=self.session.id)
        with suppress(NoWorker, BrokerError):
            await self.broker.publish(self.target.id, self.worker, note)


def _beyond(assumed: list[int], ids: list[int]) -> list[int] | None:
    """What `ids` add to the ids now assumed; None if they went another way."""
    return ids[len(assumed) :] if ids[: len(assumed)] == assumed else None
