"""A record on a virtual clock: the product's own generation loop, policy and session; only the models are looked up.

drafter   t_d ms per token
cloud     half a round trip there, the session's jobs one after the other through the engine, half a round trip back
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from pilotfish.bench import virtual_time
from pilotfish.bench.control_record import Record
from pilotfish.bench.control_times import Times
from pilotfish.edge_agent.drafters.base import Draft, Proceed
from pilotfish.edge_agent.generation import Generation
from pilotfish.edge_agent.learning import Learned
from pilotfish.edge_agent.policy import Pace
from pilotfish.edge_agent.task import Task
from pilotfish.protocol.errors import EngineError
from pilotfish.protocol.fleet import Target, Vocabulary
from pilotfish.protocol.history import History
from pilotfish.protocol.messages import Message, Sampling, Verdict, VerifyJob

ID, VOCAB, DRAFT_MAX = "0" * 16, 1 << 20, 64
TARGET = Target(ID, "record", 1 << 16, DRAFT_MAX, Vocabulary(()))
DAY_MS = 86_400_000


@dataclass(slots=True)
class Outcome:
    """What a replay came to. `jobs`: when each left, in seconds, and how many tokens it carried."""

    tokens: int = 0
    ms: float = 0.0
    steps: int = 0
    rows: int = 0
    ceded: int = 0
    jobs: list[tuple[float, int]] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Tokens per ms."""
        return self.tokens / self.ms

    def mean_draft(self, since: float = 0.0, until: float = float("inf")) -> float:
        """Tokens per job that left between two seconds."""
        sizes = [size for at, size in self.jobs if since <= at < until]
        return sum(sizes) / max(1, len(sizes))


def replay(records: Sequence[Record], times: Times, stop_ids: Collection[int], **task: Any) -> Outcome:
    """One answer after the other, by one agent that learns as it goes; `task` are fields of the agent's task."""
    return virtual_time.run(_replay(records, times, frozenset(stop_ids), task))


async def _replay(records: Sequence[Record], times: Times, stop_ids: frozenset[int], task: dict[str, Any]) -> Outcome:
    loop, outcome, learned, pace = asyncio.get_running_loop(), Outcome(), Learned(), Pace()
    for record in records:
        models = Models(record, times, stop_ids, outcome)
        limits = {"max_tokens": record.limit, "deadline_ms": DAY_MS, "round_timeout_ms": DAY_MS}
        wanted = Task(record.prompt, stop_ids=stop_ids, **{**limits, **task})
        broker: Any = models
        models.generation = Generation(wanted, models.draft, broker, TARGET, VOCAB, learned, pace=pace, clock=loop.time)
        text = tuple([token.id async for tokens in models.generation.run() for token in tokens])
        if text != record.text:
            raise EngineError("a replay wrote another text than the target: the record or the session is wrong")
        outcome.ceded += models.generation.summary().ceded
        outcome.tokens += len(text)
        models.stop()
    outcome.ms = 1000 * loop.time()
    return outcome


class Models:
    """Drafter, broker and worker of one answer: they know what the record says, and how long it takes to say it."""

    agent, boot = "replay", "replay"
    generation: Generation

    def __init__(self, record: Record, times: Times, stop_ids: frozenset[int], outcome: Outcome) -> None:
        self.record, self.times, self.stop_ids, self.outcome = record, times, stop_ids, outcome
        self.rejected = -1  # the last epoch in which a draft was wrong
        self._loop, self._turn = asyncio.get_running_loop(), asyncio.Lock()
        self._jobs: set[asyncio.Task[None]] = set()

    def stop(self) -> None:
        """Nobody waits for what is still under way."""
        for job in self._jobs:
            job.cancel()

    async def draft(
        self, session: str, ids: Sequence[int], count: int, sampling: Sampling, stop_ids: frozenset[int], go_on: Proceed
    ) -> Draft:
        """Look up token after token, t_d ms each."""
        began, said, scores = self._loop.time(), list(ids[len(self.record.prompt) :]), list[float]()
        start = len(said)
        while len(scores) < count:
            await asyncio.sleep(self.times.token / 1000)
            token, score = self.record.proposal(said)
            said.append(token)
            scores.append(score)
            if token in stop_ids or not go_on(token, score):
                break
        return Draft(said[start:], scores, 1000 * (self._loop.time() - began), 1)

    async def publish(self, target: str, worker: str, message: Message) -> bytes:
        """A job leaves."""
        if isinstance(message, VerifyJob):
            self.outcome.jobs.append((self._loop.time(), len(message.draft)))
            job = asyncio.create_task(self._serve(message))
            self._jobs.add(job)
            job.add_done_callback(self._jobs.discard)
        return b""

    async def _serve(self, job: VerifyJob) -> None:
        """As `cloud_worker/verify.py` does: in the session's turn, and none of an epoch in which a draft was wrong."""
        there = (self.times.rtt_at(self._loop.time()) + self.times.broker) / 2000
        await asyncio.sleep(there)
        async with self._turn:
            if job.epoch > self.rejected:
                await self._verify(job, there)

    async def _verify(self, job: VerifyJob, back: float) -> None:
        text = self.record.text[job.base - len(self.record.prompt) :]
        pairs = enumerate(zip(job.draft, text, strict=False))
        accepted = next((at for at, (drafted, drawn) in pairs if drafted != drawn), min(len(job.draft), len(text)))
        if accepted < len(job.draft):
            self.rejected = job.epoch
        draws = deque(text)
        rows = max(2, len(job.draft) + 1)
        first = tuple(draws.popleft() for _ in range(min(accepted + 1, len(draws))))
        left = min(job.continue_tokens, len(draws))
        await self._answer(job, back, first, rows, self.times.job + self.times.row * rows, left)
        for seq in range(1, left + 1):
            await self._answer(job, back, (draws.popleft(),), 1, self.times.step, left - seq, seq)

    async def _answer(
        self, job: VerifyJob, back: float, draws: tuple[int, ...], rows: int, engine_ms: float, left: int, seq: int = 0
    ) -> None:
        await asyncio.sleep(engine_ms / 1000)
        self.outcome.steps += 1
        self.outcome.rows += rows
        base, text = job.base + seq, (*self.record.prompt, *self.record.text)
        verdict = Verdict(
            boot=job.boot, session=job.session, epoch=job.epoch, round=job.round, seq=seq, last=left == 0, base=base,
            digest=History(ID, job.sampling, text[:base]).digest(base), draws=draws, worker="record",
            engine_ms=engine_ms, rows=rows, steps=1, row_ms=self.times.row, credit=1,
        )  # fmt: skip
        self._loop.call_later(back, self.generation.inbox.put_nowait, verdict)
