"""Prompts that shells submit: taken off the tenant's stream, answered by the agent's generations, told piece by piece.

A prompt is leased while it is answered: an agent that dies or sleeps loses it to another, and who began it hears so at
its next beat. Knows streams and messages; what a generation does is the agent's.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from typing import TYPE_CHECKING

from pilotfish.edge_agent.generation import Generation
from pilotfish.edge_agent.session import Committed
from pilotfish.edge_agent.text import Decoder
from pilotfish.protocol import keys
from pilotfish.protocol.broker import EdgeBroker, Taken
from pilotfish.protocol.errors import BrokerError, InvalidMessage, PilotfishError
from pilotfish.protocol.messages import Accepted, Failed, Finished, Prompt, Text
from pilotfish.protocol.tasks import end_tasks

if TYPE_CHECKING:
    from pilotfish.edge_agent.agent import Agent

log = logging.getLogger("pilotfish.agent")


class Submissions:
    """What one agent has taken of its tenant's prompts; run `take()` for as long as it is to take more."""

    def __init__(self, agent: Agent, broker: EdgeBroker) -> None:
        self.agent, self.broker = agent, broker
        self._serving: dict[bytes, asyncio.Task[None]] = {}  # by the id of the prompt's entry
        self._generations: dict[str, Generation] = {}  # by request

    async def take(self) -> None:
        """As many prompts as there is room for, for ever; waits out a Redis that is away."""
        while True:
            try:
                room = self.agent.defaults.max_requests - len(self._serving)
                if room > 0:
                    for taken in await self.broker.take_prompts(room):
                        self._begin(taken)
                else:
                    await asyncio.wait(self._serving.values(), return_when=asyncio.FIRST_COMPLETED)
            except BrokerError as error:
                log.warning("%s", error)
                await asyncio.sleep(keys.BEAT_EVERY_MS / 1000)
                with suppress(BrokerError):
                    await self.broker.open_prompts()

    def cancel(self, request: str) -> None:
        """Its shell has had enough."""
        if generation := self._generations.get(request):
            generation.cancel()

    async def keep(self) -> None:
        """Renew the leases; end what another agent answers by now, because we slept."""
        for entry_id in await self.broker.keep_prompts(list(self._serving)):
            if task := self._serving.get(entry_id):
                task.cancel()

    async def finish(self, seconds: float) -> None:
        """Wait so long for those that are being answered."""
        if self._serving:
            await asyncio.wait(self._serving.values(), timeout=seconds)

    async def end(self) -> None:
        """End them now; their leases bring them to other agents."""
        await end_tasks(list(self._serving.values()))

    def _begin(self, taken: Taken) -> None:
        entry_id = taken.entry_id
        if entry_id not in self._serving:
            task = asyncio.create_task(self._serve(taken))
            self._serving[entry_id] = task
            task.add_done_callback(lambda _: self._serving.pop(entry_id, None))

    # --- one prompt ------------------------------------------------------------------------------------------

    async def _serve(self, taken: Taken) -> None:
        """Answer a prompt and take it off the stream. If Redis is away at the end, the lease brings it back to us."""
        prompt = taken.prompt
        try:
            if isinstance(prompt, InvalidMessage):
                log.warning("a submitted prompt could not be read: %s", prompt)
            elif await self.broker.withdrawn(prompt.request):
                log.info("request %s was withdrawn", prompt.request)
            elif taken.deliveries > keys.DELIVERIES_MAX:
                sentence = f"given up: {keys.DELIVERIES_MAX} agents took the prompt and none finished it"
                await self._fail(prompt, "dead_letter", sentence)
            else:
                await self._answer(prompt)
            await self.broker.drop_prompt(taken.entry_id)
        except BrokerError as error:
            log.warning("a prompt stays queued: %s", error)

    async def _answer(self, prompt: Prompt) -> None:
        try:
            await self._generate(prompt)
        except BrokerError:
            raise
        except PilotfishError as error:
            await self._fail(prompt, error.code, str(error))
        except Exception as error:
            log.exception("a generation raised")
            sentence = f"{type(error).__name__}: {error}; the agent's log has the rest"
            await self._fail(prompt, "internal", sentence)

    async def _fail(self, prompt: Prompt, code: str, sentence: str) -> None:
        await self.broker.say(prompt.request, Failed(request=prompt.request, code=code, sentence=sentence[:2000]))

    async def _generate(self, prompt: Prompt) -> None:
        ids = await self.agent.encode(prompt.text, chat=not prompt.raw, max_tokens=prompt.max_tokens)
        generation = self.agent.open(self.agent.task(prompt, ids))
        self._generations[prompt.request] = generation
        try:
            seed, agent = prompt.sampling.seed, self.broker.agent
            await self.broker.say(
                prompt.request, Accepted(request=prompt.request, agent=agent, prompt_tokens=len(ids), seed=seed)
            )
            await self._speak(prompt.request, generation)
            last = Finished(request=prompt.request, reason=generation.finish, summary=generation.summary())
            await self.broker.say(prompt.request, last)
        finally:
            self._generations.pop(prompt.request, None)
            self.agent.close(generation)

    async def _speak(self, request: str, generation: Generation) -> None:
        decoder, start = Decoder(self.agent.tokenizer.piece, self.agent.stop_ids), 0
        async with aclosing(unhurried(generation.run())) as run:
            async for tokens in run:
                ids, origins = tuple(t.id for t in tokens), tuple(t.origin for t in tokens)
                pieces = tuple(decoder.feed(token) for token in ids)
                said = Text(request=request, start=start, ids=ids, pieces=pieces, origins=origins)
                await self.broker.say(request, said)
                start += len(ids)


async def unhurried(run: AsyncGenerator[list[Committed], None]) -> AsyncGenerator[list[Committed], None]:
    """The same tokens, but the generation goes on while its reader is busy: to tell them takes a round trip each."""
    ready: asyncio.Queue[list[Committed] | None] = asyncio.Queue()

    async def write() -> None:
        try:
            async with aclosing(run):
                async for tokens in run:
                    ready.put_nowait(tokens)
        finally:
            ready.put_nowait(None)

    writing = asyncio.create_task(write())
    try:
        ended = False
        while not ended:
            batches = [await ready.get()]
            while not ready.empty():
                batches.append(ready.get_nowait())
            ended = batches[-1] is None
            if tokens := [token for batch in batches if batch for token in batch]:
                yield tokens
        await writing  # raises what the generation raised
    finally:
        writing.cancel()
        await asyncio.gather(writing, return_exceptions=True)
