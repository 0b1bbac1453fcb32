"""Conversations for `bench routing`: what is asked, in which order, and how long the first verdict takes.

Every turn is a session of its own, as the agent makes it: its prompt is the conversation so far. Conversations of one
group share a system prompt. Jobs go through the product's own `EdgeBroker` to the common stream.
"""

from __future__ import annotations

import asyncio
import random
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from time import perf_counter

from pilotfish.bench.echo import ended
from pilotfish.cloud_worker.engines.fake import VOCAB
from pilotfish.protocol import keys
from pilotfish.protocol.broker import EdgeBroker, connect
from pilotfish.protocol.errors import CloudError
from pilotfish.protocol.history import History
from pilotfish.protocol.messages import Sampling, Verdict, VerifyJob

ANSWER_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Shape:
    """Of a trace. `lanes` conversations go on at a time, each pausing `think_ms` on average between its turns.

    System prompts depend on `systems_seed` alone: only the first block of a trace meets them cold.
    """

    groups: int = 8
    system_tokens: int = 1_000
    conversations: int = 36
    turns: int = 10
    user_tokens: tuple[int, int] = (30, 90)
    answer_tokens: int = 12
    lanes: int = 12
    think_ms: float = 120.0
    systems_seed: int = 1


@dataclass(slots=True)
class Measured:
    """What the turns of one run cost, in the order their first verdicts came."""

    seconds: list[float] = field(default_factory=list)
    cached: list[int] = field(default_factory=list)
    prompts: list[list[int]] = field(default_factory=list)
    whole: dict[int, list[int]] = field(default_factory=dict)  # number of the prompt -> it and its answer
    workers: list[str] = field(default_factory=list)

    @property
    def cached_share(self) -> float:
        """Of all prompt tokens, those the engines did not compute."""
        return sum(self.cached) / sum(map(len, self.prompts))


class Client:
    """One agent's side: asks with whole prompts and hears first and last verdicts."""

    def __init__(self, broker: EdgeBroker, target: str) -> None:
        self.broker, self.target = broker, target
        self._waiting: dict[str, asyncio.Queue[Verdict | CloudError]] = {}

    async def listen(self) -> None:
        """For ever."""
        async for message in self.broker.replies():
            if queue := self._waiting.get(getattr(message, "session", "")):
                refused = CloudError(f"a worker refused: {message}")
                queue.put_nowait(message if isinstance(message, Verdict) else refused)

    async def ask(self, prompt: list[int], into: Measured, tokens: int) -> list[int]:
        """One turn: the answer's ids. Raises CloudError for a refusal."""
        session = secrets.token_hex(16)
        queue = self._waiting[session] = asyncio.Queue()
        digest = History(self.target, Sampling(), prompt).digest(len(prompt))
        job = VerifyJob(
            agent=self.broker.agent, boot=self.broker.boot, session=session, epoch=0, round=0, base=len(prompt),
            digest=digest, offset=0, ids=tuple(prompt), continue_tokens=tokens - 1,
        )  # fmt: skip
        started = perf_counter()
        await self.broker.publish(self.target, "", job)
        answer: list[int] = []
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                while True:
                    verdict = await queue.get()
                    if isinstance(verdict, CloudError):
                        raise verdict
                    if not answer:
                        number = len(into.prompts)
                        into.seconds.append(perf_counter() - started)
                        into.cached.append(verdict.cached)
                        into.prompts.append(prompt)
                        into.workers.append(verdict.worker)
                    answer += verdict.draws
                    if verdict.last:
                        into.whole[number] = [*prompt, *answer]
                        return answer
        finally:
            del self._waiting[session]


@asynccontextmanager
async def client(url: str, target: str) -> AsyncIterator[Client]:
    """Listening."""
    async with connect(url) as redis:
        one = Client(EdgeBroker(redis, keys.DEFAULT_TENANT, "bench", secrets.token_hex(4)), target)
        listening = asyncio.create_task(one.listen())
        try:
            yield one
        finally:
            await ended(listening)


async def talk(one: Client, shape: Shape, seed: int, into: Measured) -> None:
    """All conversations of a trace, `shape.lanes` at a time."""
    rng, systems_rng = random.Random(seed), random.Random(f"systems {shape.systems_seed}")
    systems = [_text(systems_rng, shape.system_tokens) for _ in range(shape.groups)]
    todo = [(systems[n % shape.groups], rng.randrange(2**32)) for n in range(shape.conversations)]

    async def lane() -> None:
        while todo:
            system, own_seed = todo.pop()
            await _conversation(one, shape, list(system), random.Random(own_seed), into)

    await asyncio.gather(*(lane() for _ in range(shape.lanes)))


async def _conversation(one: Client, shape: Shape, ids: list[int], rng: random.Random, into: Measured) -> None:
    for _ in range(shape.turns):
        await asyncio.sleep(rng.expovariate(1) * shape.think_ms / 1000)
        ids = [*ids, *_text(rng, rng.randint(*shape.user_tokens))]
        ids = [*ids, *await one.ask(ids, into, shape.answer_tokens)]


async def short_prompts(one: Client, count: int, lanes: int, seed: int) -> Measured:
    """Prompts too short to share anything, one token each to answer."""
    into, rng = Measured(), random.Random(seed)
    todo = [_text(rng, 40) for _ in range(count)]

    async def lane() -> None:
        while todo:
            await one.ask(todo.pop(), into, 1)

    await asyncio.gather(*(lane() for _ in range(lanes)))
    return into


def _text(rng: random.Random, tokens: int) -> list[int]:
    return [rng.randrange(VOCAB) for _ in range(tokens)]
