"""From a delivery to its reply: limits first, then order within the session, then the engine.

Everything here is per worker and soft: `Known` remembers which ids a session's jobs have carried, and which epoch was
rejected; losing it costs a `need_prefix`. Knows messages and engines; the broker only through the `Answer` it is given.
"""

from __future__ import annotations

import asyncio
from array import array
from collections import Counter, OrderedDict
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Protocol

from pilotfish.cloud_worker.engines.base import EngineInfo, VerifyEvent, VerifyRequest
from pilotfish.cloud_worker.row_price import RowPrice
from pilotfish.protocol import metrics, tracing
from pilotfish.protocol.errors import EngineError, ModelError, RequestRefused
from pilotfish.protocol.fleet import target_id
from pilotfish.protocol.history import History
from pilotfish.protocol.messages import Message, Refusal, RefusalCode, ScoreJob, Scores, Verdict, VerifyJob

COALESCE_SECONDS = 0.025
MAX_SESSIONS = 4096
KNOWN_IDS_MAX = 1 << 26  # of all sessions together: 256 MiB
WEIGHED_EVERY = 64  # jobs between two looks at that
CANCELLED = "the session was cancelled"
SUPERSEDED = "a job of a later epoch has come"
AHEAD_MS = 2_000  # how far ahead of Redis' clock an entry id may lie before it is called invented


class Start(Protocol):
    """What `routing.py` wants to hear about the first job of a session."""

    def answered(self, cached: int, rows: int) -> None:
        """The first draws are there."""
        ...


Job = VerifyJob | ScoreJob
Answer = Callable[[Message, bool], Awaitable[None]]  # (message, last)


class Engine(Protocol):
    """The engine as the event loop sees it (`engine_process.py`)."""

    info: EngineInfo

    def stream(self, request: VerifyRequest) -> AsyncGenerator[VerifyEvent, None]:
        """Events of one request, in order; raises EngineError or RequestRefused. Closing it stops the request."""
        ...

    async def cancel(self, request_id: str) -> None:
        """Stop one request."""
        ...

    async def forget(self, session: str) -> None:
        """Drop a session's state."""
        ...


@dataclass(slots=True)
class Known:
    """What this worker remembers of one session."""

    ids: array[int] = field(default_factory=lambda: array("I"))
    rejected_epoch: int = -1
    newest_epoch: int = 0  # of the jobs that came; the edge drops every verdict of an older one
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)  # jobs of a session run in the order they came
    running: str = ""  # request id inside the engine
    cancels: int = 0  # so far; a job that was waiting for its turn when one came does not run


@dataclass(frozen=True, slots=True)
class Ticket:
    """A job as the broker handed it over."""

    tenant: str
    job: Job
    age_ms: int
    request_id: str
    start: Start | None = None  # of a session that begins here
    trace: str = ""  # the span that its engine's is a child of


class Refused(Exception):
    """Carries the code and sentence of the refusal to send."""

    def __init__(self, code: RefusalCode, sentence: str = "") -> None:
        super().__init__(sentence)
        self.code: RefusalCode = code


class Verification:
    """Turns jobs into verdicts, for every session this worker serves."""

    def __init__(
        self, engine: Engine, worker: str, credit: Callable[[str], int], salt: Callable[[str], str] = lambda tenant: ""
    ) -> None:
        self.engine, self.worker, self.credit, self.salt = engine, worker, credit, salt
        self.known: OrderedDict[tuple[str, str, str], Known] = OrderedDict()
        self._jobs = 0
        self.price = RowPrice()
        self.counts = dict.fromkeys(("verified", "scored", "refused", "tokens", "rows", "steps", "prefix", "cached"), 0)

    async def handle(self, ticket: Ticket, answer: Answer) -> None:
        """Answer one job: verdicts (several for a continuation), scores, or one refusal. Never raises for a bad job."""
        try:
            self._check(ticket)
            known = self._session(ticket)
            cancels = known.cancels
            async with known.turn:
                if known.cancels > cancels:
                    raise Refused("cancelled", CANCELLED)
                await self._in_turn(ticket, known, answer)
        except Refused as refused:
            await answer(self._refusal(ticket, refused.code, str(refused)), True)
        except RequestRefused as error:
            await answer(self._refusal(ticket, "bad_request", str(error)), True)
        except (EngineError, ModelError) as error:  # the latter from a restart that found the model gone
            await answer(self._refusal(ticket, "engine_failed", str(error)), True)

    def admits(self, ticket: Ticket) -> bool:
        """Whether the job is within the limits that need no look at its session."""
        try:
            self._check(ticket)
        except Refused:
            return False
        return True

    async def cancel(self, tenant: str, agent: str, session: str, *, close: bool) -> None:
        """Stop what runs or waits for a session; with `close`, forget it too."""
        known = self.known.get((tenant, agent, session))
        if known is None:
            return
        known.cancels += 1
        if known.running:
            await self.engine.cancel(known.running)
        if close:
            self.known.pop((tenant, agent, session), None)
            await self.engine.forget(_engine_session(tenant, agent, session))

    async def keep(self, tenants: Collection[str]) -> None:
        """Drop the sessions of all other tenants: they were revoked."""
        for tenant, agent, session in [key for key in self.known if key[0] not in tenants]:
            await self.cancel(tenant, agent, session, close=True)

    def knows(self, session: tuple[str, str, str]) -> bool:
        """Whether jobs of (tenant, agent, session) were served here, and are remembered."""
        known = self.known.get(session)
        return known is not None and bool(known.ids)

    # --- before the engine -----------------------------------------------------------------------------------

    def _check(self, ticket: Ticket) -> None:
        """Limits that need nothing but the job and the engine's description."""
        job, info = ticket.job, self.engine.info
        if ticket.age_ms < -AHEAD_MS:
            raise Refused("bad_request", "the entry's id lies ahead of Redis' clock: let Redis choose ids (XADD *)")
        if ticket.age_ms > job.deadline_ms:
            raise Refused("expired", f"the job is {ticket.age_ms} ms old, its deadline was {job.deadline_ms} ms")
        if len(job.draft) > info.draft_max:
            raise Refused("bad_request", f"a draft of {len(job.draft)} exceeds the engine's {info.draft_max}")
        if job.base + len(job.draft) + 1 + _continues(job) > info.context:
            raise Refused("too_long", f"{job.base} tokens and what was asked exceed the context of {info.context}")
        if job.offset + len(job.ids) != job.base:
            raise Refused("bad_request", f"ids [{job.offset}, {job.offset + len(job.ids)}) do not end at {job.base}")
        if max((*job.ids, *job.draft), default=0) >= info.vocab_size:
            raise Refused("bad_request", f"a token id lies outside the vocabulary of {info.vocab_size}")

    def _session(self, ticket: Ticket) -> Known:
        key = (ticket.tenant, ticket.job.agent, ticket.job.session)
        known = self.known.setdefault(key, Known())
        known.newest_epoch = max(known.newest_epoch, ticket.job.epoch)
        self.known.move_to_end(key)
        self._jobs += 1
        if len(self.known) > MAX_SESSIONS:
            self._forget_some(lambda known: 1, MAX_SESSIONS)
        elif self._jobs % WEIGHED_EVERY == 0:
            self._forget_some(lambda known: len(known.ids), KNOWN_IDS_MAX)
        return known

    def _forget_some(self, size: Callable[[Known], int], most: int) -> None:
        """Above `most`: the oldest sessions of the tenant that has most; its flood drowns none of another's."""
        sizes: Counter[str] = Counter()
        for (tenant, _, _), known in self.known.items():
            sizes[tenant] += size(known)
        too_much = sizes.total() - most
        if too_much <= 0:
            return
        ((largest, held),) = sizes.most_common(1)
        left = max(too_much, held // 16)  # a share at a time, counting costs more than forgetting
        for key in [key for key in self.known if key[0] == largest]:
            if left <= 0:
                return
            left -= size(self.known.pop(key))

    async def _in_turn(self, ticket: Ticket, known: Known, answer: Answer) -> None:
        job = ticket.job
        if isinstance(job, VerifyJob):
            self._check_epoch(job, known)
        if job.offset > len(known.ids):
            raise Refused("need_prefix", "this worker does not know the session")
        prefix = known.ids[: job.offset] + array("I", job.ids)
        history = History(target_id(self.engine.info.fingerprint), job.sampling, prefix)
        if history.digest(job.base) != job.digest:
            raise Refused(
                *(("need_prefix", "other history") if job.offset else ("bad_request", "digest and ids differ"))
            )
        known.ids = prefix
        if isinstance(job, ScoreJob):
            await self._score(ticket, job, known, answer)
        else:
            await self._run(ticket, known, history, answer)

    def _check_epoch(self, job: VerifyJob, known: Known) -> None:
        """What is drafted behind a rejected draft is never looked at; an audit is of committed text, whatever came."""
        if job.epoch <= known.rejected_epoch:
            raise Refused("stale", "a draft of this epoch was already rejected")
        if job.epoch < known.newest_epoch:
            raise Refused("stale", SUPERSEDED)

    # --- the engine ------------------------------------------------------------------------------------------

    async def _run(self, ticket: Ticket, known: Known, history: History, answer: Answer) -> None:
        """Ask the engine. What this worker knows of the session changes only with verdicts that have left."""
        request, seq, done = _request(ticket, known, self.salt(ticket.tenant)), 0, False
        clock = asyncio.get_running_loop().time
        known.running, started = request.request_id, clock()
        since, span = started, tracing.Span("engine", ticket.trace)
        try:
            async with aclosing(coalesced(self.engine.stream(request), COALESCE_SECONDS)) as events:
                async for event in events:
                    now = clock()
                    if seq == 0:
                        self.price.add(event.rows, len(request.draft), 1000 * (now - since))
                        if ticket.start:
                            ticket.start.answered(event.cached, event.rows)
                    verdict = self._verdict(ticket, history, event, seq, now - since)
                    since = now
                    await answer(verdict, event.done)
                    self._count(ticket, event, seq, now - started)
                    history.extend(event.draws)
                    known.ids = history.ids[:]
                    if seq == 0 and event.accepted < len(request.draft):
                        known.rejected_epoch = ticket.job.epoch
                    seq, done = seq + 1, event.done
                    if not done and ticket.job.epoch < known.newest_epoch:
                        raise Refused("stale", SUPERSEDED)  # or the edge's next try would queue behind this one
            if not done:
                raise Refused("cancelled", CANCELLED)
        finally:
            known.running = ""
            span.end()

    async def _score(self, ticket: Ticket, job: ScoreJob, known: Known, answer: Answer) -> None:
        """Ask the engine for every draw along the audited tokens; they are then among the ids this worker knows."""
        request, started = _request(ticket, known, self.salt(ticket.tenant)), asyncio.get_running_loop().time()
        known.running = request.request_id
        try:
            async with aclosing(self.engine.stream(request)) as events:
                async for event in events:
                    seconds = asyncio.get_running_loop().time() - started
                    await answer(self._scores(ticket, event, seconds), True)
                    self._count(ticket, event, 0, seconds)
                    known.ids.extend(job.draft)
                    return
            raise Refused("cancelled", CANCELLED)
        finally:
            known.running = ""

    def _scores(self, ticket: Ticket, event: VerifyEvent, engine_seconds: float) -> Scores:
        job = ticket.job
        return Scores(
            boot=job.boot, session=job.session, round=job.round, base=job.base, digest=job.digest,
            draws=tuple(event.draws), worker=self.worker, credit=self.credit(ticket.tenant),
            engine_ms=round(engine_seconds * 1000, 3), rows=event.rows, steps=event.steps,
        )  # fmt: skip

    def _verdict(
        self, ticket: Ticket, history: History, event: VerifyEvent, seq: int, engine_seconds: float
    ) -> Verdict:
        """`engine_seconds`: since the job's turn, or since its chunk before this one."""
        job, base = ticket.job, len(history)
        return Verdict(
            boot=job.boot,
            session=job.session,
            epoch=job.epoch,
            round=job.round,
            seq=seq,
            last=event.done,
            base=base,
            digest=history.digest(base),
            draws=tuple(event.draws),
            accepted=event.accepted,
            logprobs=tuple(event.logprobs),
            worker=self.worker,
            credit=self.credit(ticket.tenant),
            queue_ms=max(0.0, float(ticket.age_ms)),
            engine_ms=round(engine_seconds * 1000, 3),
            rows=event.rows,
            steps=event.steps,
            cached=event.cached,
            row_ms=round(self.price.ms, 4),
        )

    def _count(self, ticket: Ticket, event: VerifyEvent, seq: int, engine_seconds: float) -> None:
        """Into the beat's counts (for people) and the metrics (for Prometheus)."""
        scored = isinstance(ticket.job, ScoreJob)
        tokens = 0 if scored else len(event.draws)
        for name, amount in {
            "verified": int(seq == 0 and not scored),
            "scored": int(scored),
            "tokens": tokens,
            "rows": event.rows,
            "steps": event.steps,
            "prefix": ticket.job.base if seq == 0 else 0,
            "cached": event.cached,
        }.items():
            self.counts[name] += amount
        metrics.COMMITTED.inc(tokens)
        metrics.ROWS.inc(event.rows)
        metrics.STEPS.inc(event.steps)
        metrics.CACHE_HITS.inc(event.cached)
        if seq == 0:
            metrics.CACHE_QUERIES.inc(ticket.job.base)
            metrics.QUEUE_SECONDS.observe(max(0, ticket.age_ms) / 1000)
        if event.done:
            metrics.JOBS.labels("verdict").inc()
            metrics.VERIFY_SECONDS.observe(engine_seconds)

    def _refusal(self, ticket: Ticket, code: RefusalCode, sentence: str) -> Refusal:
        self.counts["refused"] += 1
        metrics.JOBS.labels(code).inc()
        return Refusal.of(ticket.job, code, sentence, worker=self.worker, credit=self.credit(ticket.tenant))


def _request(ticket: Ticket, known: Known, salt: str) -> VerifyRequest:
    job = ticket.job
    return VerifyRequest(
        request_id=ticket.request_id,
        session=_engine_session(ticket.tenant, job.agent, job.session),
        prefix=known.ids.tolist(),
        draft=list(job.draft),
        sampling=job.sampling,
        continue_tokens=_continues(job),
        stop_ids=job.stop_ids if isinstance(job, VerifyJob) else (),
        cache_salt=salt,
        score=isinstance(job, ScoreJob),
        logprobs=isinstance(job, VerifyJob) and job.logprobs,
    )


def _continues(job: Job) -> int:
    return job.continue_tokens if isinstance(job, VerifyJob) else 0


def _engine_session(tenant: str, agent: str, session: str) -> str:
    return f"{tenant}/{agent}/{session}"


async def coalesced(events: AsyncGenerator[VerifyEvent, None], seconds: float) -> AsyncGenerator[VerifyEvent, None]:
    """Merge a continuation's events so that one message leaves at most every `seconds`; the first leaves at once."""
    merged: VerifyEvent | None = None
    loop = asyncio.get_running_loop()
    sent = float("-inf")
    async with aclosing(events):
        async for event in events:
            merged = _merge(merged, event) if merged else event
            if merged.done or loop.time() - sent >= seconds:
                yield merged
                merged, sent = None, loop.time()
    if merged:
        yield merged


def _merge(first: VerifyEvent, then: VerifyEvent) -> VerifyEvent:
    return VerifyEvent(
        request_id=first.request_id,
        draws=first.draws + then.draws,
        accepted=first.accepted,
        rows=first.rows + then.rows,
        steps=first.steps + then.steps,
        cached=first.cached,
        done=then.done,
        logprobs=first.logprobs + then.logprobs,
    )
