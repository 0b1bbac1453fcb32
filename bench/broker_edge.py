"""The edge of `bench broker`: sessions whose jobs have the sizes of real ones, sent and answered by the real broker.

A lane is one session after the other: a prompt of PROMPT_TOKENS, then rounds of K drafts that are all accepted, each
job with the last TAIL_TOKENS ids. Building a job (the session's work) is not part of a round trip; encoding it is.
"""

from __future__ import annotations

import asyncio
import random
import secrets
from time import perf_counter

from pilotfish.bench.echo import ended
from pilotfish.bench.noop_worker import TARGET, VOCAB
from pilotfish.protocol.broker import EdgeBroker
from pilotfish.protocol.errors import InvalidMessage, JobRefused
from pilotfish.protocol.history import History
from pilotfish.protocol.messages import Close, Refusal, Sampling, ToEdge, Verdict, VerifyJob

K, PROMPT_TOKENS, TAIL_TOKENS, ROUNDS_PER_SESSION = 8, 400, 40, 50
SAMPLING = Sampling(temperature=0.7, top_p=0.9, seed=2**63 + 1)


class Lane:
    """One session at a time: the next job, and what its verdict does to the history."""

    def __init__(self, broker: EdgeBroker, seed: int) -> None:
        self.broker, self.random = broker, random.Random(seed)
        self.worker = ""
        self.begin()

    def begin(self) -> None:
        """A new session with a prompt nobody has seen."""
        self.session, self.number = secrets.token_hex(16), 0
        self.history = History(TARGET, SAMPLING, self.ids(PROMPT_TOKENS))

    def ids(self, count: int) -> tuple[int, ...]:
        """Any ids of the vocabulary."""
        return tuple(self.random.randrange(VOCAB) for _ in range(count))

    def job(self) -> VerifyJob:
        """The next round's; the first one carries the whole prompt."""
        base = len(self.history)
        offset = base - TAIL_TOKENS if self.number else 0
        self.number += 1
        return VerifyJob(
            agent=self.broker.agent, boot=self.broker.boot, session=self.session, epoch=0, round=self.number, base=base,
            digest=self.history.digest(base), offset=offset, ids=tuple(self.history.ids[offset:]), draft=self.ids(K),
            sampling=SAMPLING, stop_ids=(2, 3),
        )  # fmt: skip

    def apply(self, verdict: Verdict) -> None:
        """Extend the history by the draws."""
        self.history.extend(verdict.draws)
        self.worker = verdict.worker

    def close(self) -> Close:
        """The session's last word."""
        return Close(agent=self.broker.agent, boot=self.broker.boot, session=self.session)


class StreamEdge:
    """The real broker, with as many lanes as are in flight."""

    def __init__(self, broker: EdgeBroker, lanes: int) -> None:
        self.broker = broker
        self.lanes = [Lane(broker, seed) for seed in range(lanes)]
        self._waiting: dict[str, asyncio.Future[Verdict]] = {}
        self._reader: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin to read replies."""
        self._reader = asyncio.create_task(self._read())

    async def stop(self) -> None:
        """Stop reading, leave nothing behind."""
        if self._reader:
            await ended(self._reader)
        await self.broker.leave()
        await self.broker.redis.aclose()

    async def round(self, number: int) -> float:
        """One round trip of a lane, in seconds: from the message to its verdict."""
        lane = self.lanes[number]
        if lane.number == ROUNDS_PER_SESSION:
            await self.broker.publish(TARGET, lane.worker, lane.close())
            lane.begin()
        job = lane.job()
        reply = self._waiting[job.session] = asyncio.get_running_loop().create_future()
        started = perf_counter()
        await self.broker.publish(TARGET, lane.worker, job)
        verdict = await reply
        seconds = perf_counter() - started
        lane.apply(verdict)
        return seconds

    async def _read(self) -> None:
        async for message in self.broker.replies():
            self._hand_over(message)

    def _hand_over(self, message: ToEdge | InvalidMessage) -> None:
        if isinstance(message, InvalidMessage):
            raise message
        if isinstance(message, Verdict):
            self._waiting.pop(message.session).set_result(message)
        elif isinstance(message, Refusal) and message.session in self._waiting:
            self._waiting.pop(message.session).set_exception(JobRefused(message.code, message.sentence))
