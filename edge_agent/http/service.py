"""An agent as its API serves it: its models, what a request gets by default, how many at a time, whether it is ending.

Knows who is served, not what is said.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pilotfish.edge_agent.agent import Agent
from pilotfish.edge_agent.http.bodies import Asked
from pilotfish.edge_agent.http.turnstile import Turnstile
from pilotfish.protocol.errors import UnknownModel, UsageError
from pilotfish.protocol.messages import Mode, OnCloudLoss, Sampling

if TYPE_CHECKING:
    from pilotfish.edge_agent.http.calls import Call


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a request gets where it does not say otherwise: the agent's settings."""

    mode: Mode = "exact"
    on_cloud_loss: OnCloudLoss | None = None
    max_tokens: int = 256
    sampling: Sampling = field(default_factory=Sampling)
    seed: int | None = None
    deadline_ms: int = 120_000


@dataclass(slots=True)
class Service:
    """An agent as the API serves it."""

    agent: Agent
    wanted: Wanted = Wanted()
    turnstile: Turnstile = field(default_factory=lambda: Turnstile(4, 64))
    draining: bool = False
    created: int = field(default_factory=lambda: int(time.time()))
    calls: set[Call] = field(default_factory=set)
    _closed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def models(self) -> list[str]:
        """What may be asked for: the target, and the draft alone."""
        target, draft = self.agent.target, self.agent.drafter.info.model
        return list(dict.fromkeys([target.name, draft] if target else [draft]))

    @property
    def fingerprint(self) -> str:
        """Weights, numerics and engine of who decides the text."""
        target = self.agent.target
        return f"pf_{target.id if target else self.agent.drafter.info.fingerprint[:16]}"

    async def drained(self, seconds: float) -> None:
        """Take nothing new, and give what runs some time."""
        self.draining = True
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self.calls:
                    self._closed.clear()
                    await self._closed.wait()

    def close(self, call: Call) -> None:
        """A call is over."""
        self.calls.discard(call)
        self._closed.set()

    def mode(self, body: Asked, granted: Mode | None = None) -> Mode:
        """The request's mode: as it says, else alone if it asks for the draft by name, else the one its key has.

        Raises UnknownModel, and UsageError for a mode that the key was not granted.
        """
        if body.model not in self.models:
            raise UnknownModel(f"{body.model!r} is not served here, {' and '.join(self.models)} is", param="model")
        alone = body.model != self.models[0] or self.agent.target is None
        mode: Mode = body.wishes.get("mode") or ("edge_only" if alone else granted or self.wanted.mode)
        if granted and mode != granted:
            raise UsageError(f"this key's requests run in mode {granted}: leave the mode out", param="pilotfish.mode")
        if alone and mode != "edge_only":
            raise UsageError(
                f"{body.model} is the draft and writes alone: leave the mode out, or ask for another model",
                param="pilotfish.mode",
            )
        return mode
