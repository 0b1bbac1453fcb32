"""The course of an experiment: every variant, RTT and seed over the same prompts, on real processes, resumable.

    for each seed                      a replicate: nothing is learnt yet
        for each RTT                       workers and agents start anew, with empty caches
            for each prompt                    (before: lessons once a replicate, and a warm-up; not measured)
                ask each variant                   in turn, another one first for every prompt

Variants take turns prompt by prompt, because a machine drifts: two identical variants measured a minute apart differed
by 40 % here, with an interval that excluded 0. A request that fails is a record too: it is named in the report, and
counts as a wrong answer, never as a fast one.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from pilotfish.bench.ablation import manifest as manifests
from pilotfish.bench.ablation import records
from pilotfish.bench.ablation.experiment import Experiment, stated
from pilotfish.bench.ablation.presets import Variant, variants
from pilotfish.bench.ablation.prompts import Question, choose
from pilotfish.bench.ablation.records import Key, Record
from pilotfish.bench.ablation.rig import Edge, Rig, rig
from pilotfish.bench.children import own_redis
from pilotfish.cli.pair import WORKER_OPTIONS
from pilotfish.protocol.errors import EngineError, PilotfishError

WARM_UP = 4  # prompts before each cell: code paths, and what is known of the RTT
FAILURES_MAX = 5  # in a row: then something is broken, and the rest would only say so again

log = logging.getLogger("pilotfish.ablation")

Progress = Callable[[int, int, str], None]  # (requests done, of how many, what comes next)


def run(experiment: Experiment, progress: Progress = lambda *_: None) -> Path:
    """Measure what is not yet measured; returns the folder. Raises UsageError, or what did not start."""
    return asyncio.run(measure(experiment, progress))


async def measure(experiment: Experiment, progress: Progress = lambda *_: None) -> Path:
    """The same in a running loop."""
    await Course(experiment).run(progress)
    return experiment.out


class Course:
    """One sitting of an experiment. Raises UsageError for one that cannot be, before anything starts."""

    progress: Progress

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment
        self.common = experiment.common
        self.variants = variants(experiment.modes)
        self.questions = choose(experiment.prompts, experiment.per_family, experiment.lessons)
        wanted = stated(experiment, self.variants, self.questions)
        experiment.out.mkdir(parents=True, exist_ok=True)
        self.manifest = manifests.resumed(experiment.out, wanted)
        self.manifest["sittings"].append(manifests.sitting())
        manifests.write(experiment.out, self.manifest)
        self.work = experiment.out / ".work"  # logs and what is learnt: gone at the end
        self.log = records.Log(experiment.out)
        self.done = {records.key_of(record) for record in records.read(experiment.out)}
        self.total = experiment.seeds * len(self.variants) * len(experiment.rtt_ms) * len(self.questions.asked)
        self.failed_in_a_row = 0

    async def run(self, progress: Progress) -> None:
        """All replicates, once."""
        self.progress = progress
        try:
            await self._replicates()
        finally:
            self.log.close()

    async def _replicates(self) -> None:
        groups = grouped(self.variants, self.common)
        sittings = [groups] if self.experiment.together else [[group] for group in groups]
        for seed, rtt_ms in product(range(1, self.experiment.seeds + 1), self.experiment.rtt_ms):
            for at_once in sittings:
                while self._left([variant for group in at_once for variant in group], seed, rtt_ms):
                    await self._sit(at_once, seed, rtt_ms)
        self.progress(len(self.done), self.total, "")
        self.manifest["finished"] = manifests.sitting()["started"]
        manifests.write(self.experiment.out, self.manifest)
        shutil.rmtree(self.work, ignore_errors=True)

    async def _sit(self, groups: list[list[Variant]], seed: int, rtt_ms: float) -> None:
        """Workers and agents together until all is measured; a failure ends it early, and the next one goes on."""
        before = len(self.done)
        try:
            async with AsyncExitStack() as stack:
                asked = [one for group in groups for one in await self._open(stack, group, seed)]
                for one in asked:
                    for question in self.questions.lessons[:WARM_UP]:
                        await one.edge.ask(question, seed=0, rtt_ms=rtt_ms)
                await self._cell(asked, seed, rtt_ms)
        except EngineError as error:  # an agent's process died; the request it died of has its record
            log.warning("%s", error)
            if len(self.done) == before:
                self._count_failure(str(error))

    async def _open(self, stack: AsyncExitStack, group: list[Variant], seed: int) -> list[Asked]:
        """One worker on a Redis of its own, and an agent for each variant, taught."""
        url = stack.enter_context(own_redis()).url
        logs = _made(self.work / f"logs-{group[0].name}")
        running = await stack.enter_async_context(rig(url, group[0].resolved(self.common), group, logs))
        found = []
        for variant in group:
            self.progress(len(self.done), self.total, f"starting {variant.name}")
            learned = _made(self.work / f"{variant.name}-{seed}")
            edge = await stack.enter_async_context(running.edge(variant, self.common, learned))
            manifests.seen(self.experiment.out, self.manifest, variant.name, edge.about)
            if variant.learns:
                await self._teach(edge, variant, learned / "taught")
            found.append(Asked(variant, edge, running))
        manifests.write(self.experiment.out, self.manifest)
        return found

    async def _teach(self, edge: Edge, variant: Variant, mark: Path) -> None:
        """Once a replicate, even if it is interrupted: what is learnt is on disk."""
        if _exists(mark):
            return
        for number, question in enumerate(self.questions.lessons, 1):
            where = f"{variant.name}: lesson {number} of {len(self.questions.lessons)}"
            self.progress(len(self.done), self.total, where)
            await edge.ask(question, seed=number, rtt_ms=0)
        _made(mark)

    async def _cell(self, asked: list[Asked], seed: int, rtt_ms: float) -> None:
        """Every prompt that has no record yet, until one fails: processes are better started anew then."""
        for turn, question in enumerate(self.questions.asked):
            for one in turned(asked, turn):
                key = Key(one.variant.name, rtt_ms, seed, question.number)
                if key not in self.done and not await self._ask(one, question, key):
                    return

    async def _ask(self, asked: Asked, question: Question, key: Key) -> bool:
        self.progress(len(self.done), self.total, f"{key.rtt_ms:g} ms, seed {key.seed}, {key.variant}")
        try:
            told = await asked.edge.ask(question, draw_seed(key), key.rtt_ms)
            if told["failure"]:
                asked.rig.check()
        except PilotfishError as error:
            told = {"failure": {"code": error.code, "sentence": str(error)}}
        self._note(key, question, told)
        if not told["failure"]:
            self.failed_in_a_row = 0
            return True
        self._count_failure(told["failure"]["sentence"])
        return False

    def _count_failure(self, why: str) -> None:
        self.failed_in_a_row += 1
        if self.failed_in_a_row == FAILURES_MAX:
            raise PilotfishError(f"{FAILURES_MAX} requests in a row failed, the last with: {why}")

    def _note(self, key: Key, question: Question, told: Record) -> None:
        right = None
        if question.answer is not None:
            right = not told["failure"] and told["text"].strip() == question.answer.strip()
        self.log.add({**key._asdict(), "family": question.family, "right": right, **told})
        self.done.add(key)

    def _left(self, every: Sequence[Variant], seed: int, rtt_ms: float) -> bool:
        """Whether something of this cell has no record yet."""
        places = product([one.name for one in every], [one.number for one in self.questions.asked])
        return any(Key(name, rtt_ms, seed, number) not in self.done for name, number in places)


@dataclass(frozen=True, slots=True)
class Asked:
    """A variant that is ready to be asked."""

    variant: Variant
    edge: Edge
    rig: Rig


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _exists(path: Path) -> bool:
    return path.exists()


def draw_seed(key: Key) -> int:
    """Seed of the draws: the same for every variant and RTT, so that texts can be compared; another for each prompt."""
    return key.seed * 1_000_003 + key.prompt


def grouped(every: Sequence[Variant], common: dict[str, Any]) -> list[list[Variant]]:
    """Variants that can share a worker together."""
    groups: dict[tuple[str, ...], list[Variant]] = {}
    for variant in every:
        settings = variant.resolved(common)
        groups.setdefault(tuple(str(getattr(settings, name)) for name in WORKER_OPTIONS), []).append(variant)
    return list(groups.values())


def turned(items: Sequence[Any], by: int) -> Iterator[Any]:
    """The same items, beginning with another one for every `by`."""
    start = by % len(items)
    yield from (*items[start:], *items[:start])
