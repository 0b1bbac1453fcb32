"""The agent of an ablation, in a process of its own: the product's agent with a pen, asked for one prompt at a time.

    {"do": "open", "settings": {...}}             -> who drafts, who verifies
    {"do": "ask", "prompt": ..., "seed": ...}     -> the answer, its times, its rounds; or how it failed
    {"do": "close"}                               -> {}; what was learnt is on disk

Prompts come from where the agent runs, as on a device, so nothing but the rounds themselves crosses the wire. With
the engine "fake" the draft is the fake one, which agrees with the fake target seven times in ten.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable
from contextlib import aclosing, suppress
from math import prod
from typing import Any

from pilotfish.bench.ablation.recording import Notes, RecordingBroker, RecordingDrafter
from pilotfish.bench.piped import serve_async
from pilotfish.edge_agent.agent import Agent, Defaults, new_boot
from pilotfish.edge_agent.generation import Generation
from pilotfish.edge_agent.launch import open_agent, sampling
from pilotfish.protocol.errors import NoWorker, PilotfishError
from pilotfish.protocol.messages import Prompt
from pilotfish.protocol.settings import Settings, load

PROBE = 8  # tokens the router looks at
ROUTE_AT = 0.5  # it keeps a request on the edge if its draft is more likely than not to have these right
FAKE_ALPHA = 0.7
TRIES = 40  # a quarter of a second each

Opener = Callable[[Settings, str], Awaitable[Agent]]


class Edge:
    """An agent, and the pen in its hand."""

    def __init__(self, running: Agent, settings: Settings, notes: Notes, *, routed: bool) -> None:
        self.agent, self.settings, self.notes, self.routed = running, settings, notes, routed

    async def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        """One prompt to its end; every way to end is an answer."""
        self.notes.begin()
        told: dict[str, Any] = {"failure": None, "route": "", "ids": [], "origins": [], "token_ms": [], "text": ""}
        try:
            told |= await self._generate(self._prompt(question), told)
        except PilotfishError as error:
            told["failure"] = {"code": error.code, "sentence": str(error)}
        except Exception as error:  # a fault of ours is a finding as well, not the end of the experiment
            told["failure"] = {"code": "internal", "sentence": f"{type(error).__name__}: {error}"}
        return {**told, "rounds": self.notes.rounds, "other_bytes": self.notes.other_bytes}

    def _prompt(self, question: dict[str, Any]) -> Prompt:
        """As `pilotfish submit` would send it."""
        wish = self.settings.model_copy(update={"seed": question["seed"]})
        return Prompt(
            request=secrets.token_hex(16), text=question["prompt"], raw=question["raw"], mode=wish.mode,
            on_cloud_loss=wish.on_cloud_loss, max_tokens=wish.max_tokens, sampling=sampling(wish),
            deadline_ms=wish.deadline_ms,
        )  # fmt: skip

    async def _generate(self, prompt: Prompt, told: dict[str, Any]) -> dict[str, Any]:
        ids = await self.agent.encode(prompt.text, chat=not prompt.raw, max_tokens=prompt.max_tokens)
        generation, route = await self._opened(prompt, ids)
        try:
            async with aclosing(generation.run()) as run:
                async for tokens in run:
                    told["token_ms"] += [self.notes.ms()] * len(tokens)
                    told["ids"] += [token.id for token in tokens]
                    told["origins"] += [token.origin for token in tokens]
        finally:
            self.agent.close(generation)
        return {"route": route, "text": self._text(told["ids"]), "summary": generation.summary().model_dump()}

    async def _opened(self, prompt: Prompt, ids: tuple[int, ...]) -> tuple[Generation, str]:
        """A generation; the router drafts a few tokens for it first, and keeps their KV if it stays on the edge."""
        if not self.routed:
            return self.agent.open(self.agent.task(prompt, ids)), ""
        here = self.agent.open(self.agent.task(prompt.model_copy(update={"mode": "edge_only"}), ids))
        task, drafter = here.task, self.agent.drafter
        probe = await self.agent._on_thread(  # the one thread that owns the drafter
            lambda: drafter.draft(here.session.id, list(ids), PROBE, task.sampling, task.stop_ids)
        )
        if prod(probe.confidences) >= ROUTE_AT:
            return here, "edge"
        self.agent.close(here)
        return self.agent.open(self.agent.task(prompt.model_copy(update={"mode": "cloud_only"}), ids)), "cloud"

    def _text(self, ids: list[int]) -> str:
        said = b"".join(self.agent.tokenizer.piece(token) for token in ids if token not in self.agent.stop_ids)
        return said.decode(errors="replace")

    def about(self) -> dict[str, Any]:
        """Both models, as the running processes know them."""
        draft, target = self.agent.drafter.info, self.agent.target
        assert target
        return {
            "draft": {"engine": draft.engine, "version": draft.version, "model": draft.model,
                      "fingerprint": draft.fingerprint},
            "target": {"model": target.name, "id": target.id, "context": target.context,
                       "draft_max": target.draft_max, "vocabulary": len(target.vocabulary)},
        }  # fmt: skip


async def opened(settings: Settings, *, routed: bool) -> Edge:
    """An agent of these settings, ready to be asked."""
    assert settings.redis_url
    running = await _patient(_fake_agent if settings.engine == "fake" else open_agent, settings, settings.redis_url)
    learned, broker = running.learner.of(sampling(settings)), running.broker
    notes = Notes(learned.calibration.acceptance)
    assert broker
    running.broker = recording = RecordingBroker(broker.redis, broker.tenant, broker.agent, broker.boot)
    recording.notes, running.drafter = notes, RecordingDrafter(running.drafter, notes)
    await running.start()
    return Edge(running, settings, notes, routed=routed)


async def _patient(open_: Opener, settings: Settings, url: str) -> Agent:
    """On a busy machine the worker that was there a moment ago may be late with its beat."""
    for _ in range(TRIES):
        with suppress(NoWorker):
            return await open_(settings, url)
        await asyncio.sleep(0.25)
    return await open_(settings, url)


async def _fake_agent(settings: Settings, url: str) -> Agent:
    from pilotfish.cloud_worker.engines.fake import fake_target
    from pilotfish.edge_agent.drafters.fake import FakeDrafter
    from pilotfish.edge_agent.tokenizer import ByteTokenizer
    from pilotfish.protocol import fleet
    from pilotfish.protocol.broker import EdgeBroker, connect

    redis = connect(url)
    target = await fleet.find_target(redis)
    broker = EdgeBroker(redis, settings.tenant, "edge", new_boot())
    drafter = FakeDrafter(fake_target, alpha=FAKE_ALPHA, spread=1.0)
    defaults = Defaults(settings.drafting, settings.draft_tokens, settings.window)
    return Agent(drafter, ByteTokenizer(), (), broker, target, defaults)


class Child:
    """Answers the parent's questions."""

    def __init__(self) -> None:
        self.edge: Edge | None = None

    async def answer(self, question: dict[str, Any]) -> dict[str, Any]:
        """See the module docstring."""
        if question["do"] == "open":
            return await self._open(question)
        assert self.edge
        if question["do"] == "ask":
            return await self.edge.ask(question)
        await self.edge.agent.stop()
        return {}

    async def _open(self, question: dict[str, Any]) -> dict[str, Any]:
        try:
            self.edge = await opened(load(question["settings"]), routed=question["routed"])
        except PilotfishError as error:
            return {"refused": str(error), "exit_code": error.exit_code}
        return self.edge.about()


if __name__ == "__main__":
    asyncio.run(serve_async(Child().answer))
