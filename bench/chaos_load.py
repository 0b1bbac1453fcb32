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
from pilotfish.protocol import keys
from pilotfish.protocol.broker import connect
from pilotfish.protocol.errors import AnswerLost, BrokerError, NoAgent
from pilotfish.protocol.messages import Accepted, Failed, Finished, Prompt, Summary
from pilotfish.protocol.shell import ShellBroker

DEADLINE_SECONDS: Final = 40.0
LEASE_SECONDS: Final = 5.0  # until another agent has a prompt whose agent died, and a little
NAMED: Final = frozenset({"answer_lost", "dead_letter", "deadline"})  # ends that a request may come to, and say so
PAUSE_SECONDS: Final = 0.3


class Load:
    """Keeps `at_once` generations going until told otherwise. `fates` are those that ended, `partial` those cut off.

    Each has `deadline_seconds`; one that is still open `hung_seconds` after it was asked for is hung.
    """

    def __init__(self, seed: int, at_once: int, deadline_seconds: float = DEADLINE_SECONDS) -> None:
        self.seed, self.at_once, self.deadline_ms = seed, at_once, int(1000 * deadline_seconds)
        #: as many agents may take a prompt as it may be delivered
        self.hung_seconds = keys.DELIVERIES_MAX * (deadline_seconds + LEASE_SECONDS)
        self.fates: list[Fate] = []
        self.partial: list[Fate] = []  # what an agent had said when it died
        self.hung: list[Wish] = []
        self.told: Counter[str] = Counter()  # requests that failed by name and were asked again
        self.rounds = 0
        self._open: dict[int, tuple[Wish, int]] = {}  # with the number of tries so far
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
        if line.endswith("\n"):  # else the kill has cut it
            said = json.loads(line)
            if (number := said.pop("number")) in self._inbox:
                self._inbox[number][1].put_nowait(said)

    async def run(self) -> None:
        """Until `stop`, and then until everything begun has ended."""
        await asyncio.gather(*(self._lane() for _ in range(self.at_once)))

    def stop(self) -> None:
        """Begin nothing more."""
        self._enough = True

    async def _lane(self) -> None:
        while not self._enough:
            self.fates.append(await self._until_it_ends(wish(self.seed, next(self._numbers))))

    def give_up(self) -> None:
        """Nobody waits any longer: what is still open is hung, though each of its tries ended."""
        for one, tries in self._open.values():
            self.hung.append(one)
            self.fates.append(Fate(one, (), (), f"hung: no end after {tries} tries"))

    async def _until_it_ends(self, one: Wish) -> Fate:
        tries = 0
        while True:
            tries += 1
            self._open[one.number] = one, tries
            if fate := await self._try(one):
                del self._open[one.number]
                return fate
            await asyncio.sleep(PAUSE_SECONDS)

    async def _try(self, one: Wish) -> Fate | None:
        """How it ended; None if it must be asked again, because it failed by name or its agent died."""
        try:
            async with asyncio.timeout(self.hung_seconds):
                fate = await (self._submit(one) if one.submitted else self._own(one))
        except TimeoutError:
            self.hung.append(one)
            return Fate(one, (), (), "hung")
        if fate is None:
            return None
        self.rounds += fate.rounds
        code = fate.end.partition(":")[0]
        if code not in NAMED:
            return fate
        self.told[" ".join((code, *fate.end.split()[1:3])) if code == "answer_lost" else code] += 1
        self.partial.append(fate)
        return None

    # --- run by an agent of its own --------------------------------------------------------------------------

    async def _own(self, one: Wish) -> Fate | None:
        ready = [number for number, agent in enumerate(self.fleet.agents) if agent.ready.is_set()]
        if not ready:
            return None
        number = ready[one.number % len(ready)]
        inbox: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        self._inbox[one.number] = (number, inbox)
        self.fleet.agents[number].write(json.dumps(self._asked(one)))
        return await self._follow(one, inbox)

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

    def _asked(self, one: Wish) -> dict[str, Any]:
        names = ("number", "prompt", "mode", "on_cloud_loss", "max_tokens", "draft_tokens", "window")
        asked = {name: getattr(one, name) for name in names}
        return asked | {"sampling": one.sampling.model_dump(), "deadline_ms": self.deadline_ms}

    # --- submitted -------------------------------------------------------------------------------------------

    async def _submit(self, one: Wish) -> Fate | None:
        prompt = self._prompt(one)
        async with connect(self.fleet.urls["edges"]) as redis:
            shell = ShellBroker(redis, "default")
            try:
                await shell.submit(prompt)
            except (BrokerError, NoAgent):  # refused, or perhaps queued: nobody will ask for this request again
                return None
            while True:  # from the beginning each time Redis was away, as `pilotfish result --wait`
                with suppress(BrokerError, NoAgent):
                    return await _read(shell, one, prompt.request)
                await asyncio.sleep(PAUSE_SECONDS)

    def _prompt(self, one: Wish) -> Prompt:
        names = ("text", "mode", "on_cloud_loss", "sampling", "max_tokens", "draft_tokens")
        wanted: dict[str, Any] = {name: getattr(one, name) for name in names}
        return Prompt(request=secrets.token_hex(16), raw=True, deadline_ms=self.deadline_ms, **wanted)


async def _read(shell: ShellBroker, one: Wish, request: str) -> Fate:
    """A submitted prompt's answer to its end."""
    answer, agents, end, summary = Answer(request), 0, "unfinished", Summary()
    try:
        async for message in shell.output(request, follow=True):
            answer.add(message)
            agents += isinstance(message, Accepted)
    except AnswerLost as error:
        end = f"{error.code}: {error}"
    match answer.last:
        case Finished():
            end, summary = answer.last.reason, answer.last.summary
        case Failed():
            end = f"{answer.last.code}: {answer.last.sentence}"
    origins = tuple(origin for _, origin in answer.said)
    counted = (summary.rounds, summary.degraded, summary.local if agents == 1 else None)
    return Fate(one, tuple(answer.ids), origins, end, *counted)
