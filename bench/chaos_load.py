"""Generations under chaos: some run by an agent of their own, some submitted through Redis; each until it has an end.

The edge owns a session: what an agent was doing when it was killed is asked again, of another. A submitted prompt is
followed as `pilotfish result --wait` would, as often as it takes.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import secrets
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, Final

from pilotfish.bench.chaos_fleet import Fleet
from pilotfish.bench.chaos_judge import Fate
from pilotfish.bench.chaos_plan import Wish, wish
from pilotfish.cli.requests import Answer
from pilotfish.protocol.broker import connect
from pilotfish.protocol.errors import BrokerError, NoAgent, PilotfishError
from pilotfish.protocol.messages import Failed, Finished, Prompt
from pilotfish.protocol.shell import ShellBroker

DEADLINE_MS: Final = 90_000
HUNG_SECONDS: Final = 150.0  # beyond any deadline, and the time it takes to notice
PAUSE_SECONDS: Final = 0.3


class Load:
    """Keeps `at_once` generations going until told otherwise. `fates` are those that ended, `partial` those cut off."""

    def __init__(self, seed: int, at_once: int) -> None:
        self.seed, self.at_once = seed, at_once
        self.fates: list[Fate] = []
        self.partial: list[Fate] = []  # what an agent had said when it died
        self.hung: list[Wish] = []
        self.told: Counter[str] = Counter()  # requests that failed by name and were asked again
        self.rounds = 0
        self._numbers: Iterator[int] = itertools.count()
        self._inbox: dict[int, tuple[int, asyncio.Queue[dict[str, Any] | None]]] = {}
        self._enough = False
        self.fleet: Fleet

    def heard(self, agent: int, line: str | None) -> None:
        """What an agent says; None when it ended."""
        if line is None:
            for number, inbox in self._inbox.values():
                if number == agent:
                    inbox.put_nowait(None)
            return
        with suppress(json.JSONDecodeError):  # a line that was cut by the kill
            said = json.loads(line)
            if said.pop("number") in self._inbox:
                self._inbox[json.loads(line)["number"]][1].put_nowait(said)

    async def run(self) -> None:
        """Until `stop`, and then until everything begun has ended."""
        await asyncio.gather(*(self._lane() for _ in range(self.at_once)))

    def stop(self) -> None:
        """Begin nothing more."""
        self._enough = True

    async def _lane(self) -> None:
        while not self._enough:
            one = wish(self.seed, next(self._numbers))
            try:
                async with asyncio.timeout(HUNG_SECONDS):
                    fate = await (self._submit(one) if one.submitted else self._own(one))
            except TimeoutError:
                self.hung.append(one)
                continue
            self.fates.append(fate)
            self.rounds += fate.rounds

    # --- run by an agent of its own --------------------------------------------------------------------------

    async def _own(self, one: Wish) -> Fate:
        for attempt in itertools.count(one.number):
            number = attempt % len(self.fleet.agents)
            agent = self.fleet.agents[number]
            if not agent.ready.is_set():
                await asyncio.sleep(PAUSE_SECONDS)
                continue
            inbox: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
            self._inbox[one.number] = (number, inbox)
            agent.write(json.dumps(_asked(one)))
            if fate := await self._follow(one, inbox):
                return fate
        raise AssertionError("not reached")

    async def _follow(self, one: Wish, inbox: asyncio.Queue[dict[str, Any] | None]) -> Fate | None:
        """Its fate; None when its agent died."""
        ids, origins = list[int](), list[str]()
        while said := await inbox.get():
            ids += said.get("ids", ())
            origins += said.get("origins", ())
            if "end" in said:
                del self._inbox[one.number]
                return Fate(one, tuple(ids), tuple(origins), **said)
        self.partial.append(Fate(one, tuple(ids), tuple(origins), "killed"))
        return None

    # --- submitted -------------------------------------------------------------------------------------------

    async def _submit(self, one: Wish) -> Fate:
        """What fails by name because Redis or agents lost it is asked again, and counted."""
        while True:
            prompt = _prompt(one)
            async with connect(self.fleet.urls["edges"]) as redis:
                shell = ShellBroker(redis, "default")
                if not await self._queued(shell, prompt):
                    continue
                answer = await self._answer(shell, prompt.request)
            if isinstance(answer, Answer):
                return _fate(one, answer)
            self.told[answer.code] += 1
            await asyncio.sleep(PAUSE_SECONDS)

    async def _queued(self, shell: ShellBroker, prompt: Prompt) -> bool:
        try:
            await shell.submit(prompt)
        except (BrokerError, NoAgent):  # refused at once, or perhaps queued: nobody will ask for this request again
            await asyncio.sleep(PAUSE_SECONDS)
            return False
        return True

    async def _answer(self, shell: ShellBroker, request: str) -> Answer | PilotfishError:
        """Read from the beginning each time Redis was away."""
        while True:
            answer = Answer(request)
            try:
                async for message in shell.output(request, follow=True):
                    answer.add(message)
            except (BrokerError, NoAgent):
                await asyncio.sleep(PAUSE_SECONDS)
                continue
            except PilotfishError as error:
                return error
            return answer


def _asked(one: Wish) -> dict[str, Any]:
    names = ("number", "prompt", "mode", "on_cloud_loss", "max_tokens", "draft_tokens", "window")
    return {name: getattr(one, name) for name in names} | {
        "sampling": one.sampling.model_dump(), "deadline_ms": DEADLINE_MS,
    }  # fmt: skip


def _prompt(one: Wish) -> Prompt:
    names = ("text", "mode", "on_cloud_loss", "sampling", "max_tokens", "draft_tokens")
    wanted: dict[str, Any] = {name: getattr(one, name) for name in names}
    return Prompt(request=secrets.token_hex(16), raw=True, deadline_ms=DEADLINE_MS, **wanted)


def _fate(one: Wish, answer: Answer) -> Fate:
    ids, origins = tuple(answer.ids), tuple(origin for _, origin in answer.said)
    match answer.last:
        case Finished(reason=reason, summary=summary):
            return Fate(one, ids, origins, reason, summary.rounds, summary.degraded, summary.local)
        case Failed(code=code, sentence=sentence):
            return Fate(one, ids, origins, f"{code}: {sentence}")
    return Fate(one, ids, origins, "unfinished")
