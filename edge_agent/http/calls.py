"""A request on its way through the agent: prompts to ids, a place in line, one writer per choice, under one deadline.

The writers never wait for whoever reads: what they write is merged until it is taken, and is at most the answer. So a
slow reader holds no place and no place's neighbour. Knows bodies and writers; nothing of HTTP.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace

from pilotfish.edge_agent.http.answers import Written as Told
from pilotfish.edge_agent.http.bodies import Asked, ChatBody
from pilotfish.edge_agent.http.profiles import Bearer
from pilotfish.edge_agent.http.service import Service
from pilotfish.edge_agent.http.writer import Token, Watch, Writer, Written
from pilotfish.edge_agent.task import Task
from pilotfish.protocol import tracing
from pilotfish.protocol.errors import DeadlineExceeded, Draining, PromptTooLong, UsageError
from pilotfish.protocol.messages import SEED_MAX, Prompt, Sampling
from pilotfish.protocol.tasks import end_tasks


@dataclass(eq=False)
class Call:
    """One request. `open` it, then read `events()` or `whole()`, and `close` it in any case."""

    service: Service
    body: Asked
    client: str
    watch: Watch | None = None
    trace: str = ""  # the caller's W3C traceparent
    bearer: Bearer | None = None  # of a key that has a profile
    id: str = field(default_factory=lambda: secrets.token_hex(16))
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.mode = self.service.mode(self.body, self.bearer.profile.mode if self.bearer else None)
        self.writers: list[Writer] = []
        self.prompt_tokens = 0
        self._until = 0.0  # the deadline, on the loop's clock
        self.tasks: list[asyncio.Task[None]] = []
        self._new: dict[int, Written] = {}
        self._ended: list[int] = []
        self._error: BaseException | None = None
        self._changed = asyncio.Event()

    @property
    def model(self) -> str:
        """Which model decides the text."""
        agent = self.service.agent
        return agent.drafter.info.model if self.mode == "edge_only" or not agent.target else agent.target.name

    # --- from a body to generations --------------------------------------------------------------------------

    async def open(self) -> None:
        """Read the prompts and begin. Raises Overloaded, Draining, DeadlineExceeded, UsageError or a kind of it."""
        service, body = self.service, self.body
        if service.draining:
            raise Draining("this agent is ending and takes nothing new: go to another one")
        if self.bearer:
            self.bearer.take()
        wanted = len(body.prompts) * body.choices
        service.turnstile.check(wanted)
        service.calls.add(self)
        deadline_ms = body.wishes.get("deadline_ms") or service.wanted.deadline_ms
        self._until = asyncio.get_running_loop().time() + deadline_ms / 1000
        try:
            async with asyncio.timeout_at(self._until):
                for prompt in body.prompts:
                    self._add_writers(await self._encode(prompt))
        except TimeoutError:
            raise DeadlineExceeded("the draft model was busy until the deadline: try again, or give it more") from None
        service.turnstile.check(wanted)  # others came while the drafter's thread was asked for ids
        self.tasks = [asyncio.create_task(self._write(index)) for index in range(len(self.writers))]

    def _add_writers(self, ids: tuple[int, ...]) -> None:
        self.prompt_tokens += len(ids)
        task = self._task(ids)
        for choice in range(self.body.choices):
            seeded = replace(task, sampling=_seeded(task.sampling, choice))
            self.writers.append(Writer(self.service.agent, seeded, self.body.stops, self.watch))

    async def _encode(self, prompt: str | list[dict[str, str]]) -> tuple[int, ...]:
        chat, agent = isinstance(self.body, ChatBody), self.service.agent
        try:
            return await agent.encode(prompt, chat=chat, max_tokens=self.body.most_tokens or 1)
        except UsageError as error:
            error.param = error.param or ("messages" if chat else "prompt")
            if isinstance(error, PromptTooLong):
                error.args = (str(error).replace("--max-tokens", "max_tokens"),)
            raise

    def _task(self, ids: tuple[int, ...]) -> Task:
        """The body's wishes, completed by the service's defaults, then by the agent's."""
        body, wanted = self.body, self.service.wanted
        room = self.service.agent.context - len(ids) - 1
        wishes = {"on_cloud_loss": wanted.on_cloud_loss, "deadline_ms": wanted.deadline_ms, **body.wishes}
        wishes |= {"mode": self.mode, "max_tokens": body.most_tokens or max(1, min(wanted.max_tokens, room))}
        if self.bearer and (most := self.bearer.profile.max_disagreement) is not None:
            wishes["max_disagreement"] = min(most, wishes.get("max_disagreement", most))
        of_prompt = {name: wish for name, wish in wishes.items() if name in Prompt.model_fields}
        of_task = {name: wish for name, wish in wishes.items() if name not in Prompt.model_fields}
        prompt = Prompt(request="0" * 32, text="-", sampling=self._sampling(), **of_prompt)
        return replace(self.service.agent.task(prompt, ids), logprobs=body.wants_logprobs, **of_task)

    def _sampling(self) -> Sampling:
        body, wanted = self.body, self.service.wanted
        names = ("temperature", "top_k", "top_p", "min_p")
        given = {name: value for name in names if (value := getattr(body, name)) is not None}
        seed = next((seed for seed in (body.seed, wanted.seed) if seed is not None), secrets.randbits(64))
        return wanted.sampling.model_copy(update={**given, "seed": seed & SEED_MAX})

    # --- writing ---------------------------------------------------------------------------------------------

    async def _write(self, index: int) -> None:
        tracing.CALLER.set(self.trace)  # of this task alone
        writer = self.writers[index]
        clock = asyncio.get_running_loop().time
        try:
            async with asyncio.timeout_at(self._until) as waiting, self.service.turnstile.place(self.client):
                waiting.reschedule(None)  # from here on the generation keeps what is left of the deadline
                writer.task = replace(writer.task, deadline_ms=max(1, int(1000 * (self._until - clock()))))
                async with aclosing(writer.run()) as run:
                    async for new in run:
                        self._new.setdefault(index, Written()).add(new)
                        self._changed.set()
            self._ended.append(index)
        except TimeoutError:
            self._error = DeadlineExceeded("no place became free before the deadline: try again, or give it more time")
        except Exception as error:
            self._error = error
        finally:
            self._changed.set()

    async def events(self) -> AsyncGenerator[tuple[int, Written, bool], None]:
        """(choice, what is new of it, whether it is over), until all are. Raises what went wrong."""
        open_choices = len(self.writers)
        while open_choices:
            await self._changed.wait()
            self._changed.clear()
            new, self._new = self._new, {}
            ended, self._ended = self._ended, []
            for index in sorted({*new, *ended}):
                open_choices -= index in ended
                yield index, new.get(index, Written()), index in ended
            if self._error:
                raise self._error

    async def whole(self) -> list[Written]:
        """Every choice, complete."""
        parts = [Written() for _ in self.writers]
        async for index, new, _ in self.events():
            parts[index].add(new)
        return parts

    def told(self, index: int) -> Told:
        """Who wrote a choice, once it is over."""
        summary = self.writers[index].summary
        judged = summary.accepted + summary.corrected
        rate = summary.accepted / judged if judged else None
        return Told(**summary.model_dump(), mode=self.mode, acceptance=rate)

    def spoken(self, tokens: Sequence[Token]) -> list[Token]:
        """Tokens without the one that ends an answer: OpenAI's log-probabilities leave it out, as the text does."""
        return [token for token in tokens if token.id not in self.service.agent.stop_ids]

    async def close(self) -> None:
        """Stop whatever still runs, here and in the cloud."""
        self.service.close(self)
        await end_tasks(self.tasks)


def _seeded(sampling: Sampling, choice: int) -> Sampling:
    """The first choice draws with the request's own seed, each further one with a hash of it."""
    if choice == 0:
        return sampling
    digest = hashlib.blake2b(f"{sampling.seed}/{choice}".encode(), digest_size=8).digest()
    return sampling.model_copy(update={"seed": int.from_bytes(digest, "little")})
