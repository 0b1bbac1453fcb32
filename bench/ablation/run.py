"""The experiment: every variant, RTT and seed over the same prompts, on real processes, resumable.

    for each seed                      a replicate: agents start anew, with nothing learnt
        for each set of worker settings    one worker at a time
            for each variant                   an agent behind a proxy; lessons, not measured
                for each RTT                       every prompt, one after the other

The order of variants turns with the seed, so that a machine that slows down slows down each of them. A request that
fails is a record too: it is named in the report, and counts as a wrong answer, never as a fast one.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pilotfish.bench.ablation import manifest as manifests
from pilotfish.bench.ablation import records
from pilotfish.bench.ablation.presets import PRESETS, Variant, variants
from pilotfish.bench.ablation.prompts import Question, Questions, choose
from pilotfish.bench.ablation.records import Key, Record
from pilotfish.bench.ablation.rig import Edge, Rig, rig
from pilotfish.bench.children import own_redis
from pilotfish.cli.pair import WORKER_OPTIONS
from pilotfish.protocol.errors import EngineError, PilotfishError, UsageError

LESSONS = 40  # prompts a replicate's gate learns from before anything is measured
WARM_UP = 2  # prompts before each cell: caches, and what is known of the RTT
ANSWER_TOKENS = 72  # no answer of the evaluation set is longer
FAILURES_MAX = 5  # in a row: then something is broken, and the rest would only say so again

Progress = Callable[[int, int, str], None]  # (requests done, of how many, what comes next)


@dataclass(frozen=True)
class Experiment:
    """What is asked for. `settings` hold for every variant; `prompts` None is the demo pair's evaluation set."""

    out: Path
    modes: str = "all"
    seeds: int = 5
    rtt_ms: Sequence[float] = (0.0, 50.0)
    prompts: Path | None = None
    per_family: int | None = None
    lessons: int = LESSONS
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.seeds < 1 or not self.rtt_ms or min(self.rtt_ms) < 0:
            raise UsageError("an experiment needs one seed at least, and RTTs of 0 ms or more")
        object.__setattr__(self, "rtt_ms", tuple(float(rtt) for rtt in self.rtt_ms))

    @property
    def common(self) -> dict[str, Any]:
        """Settings of every variant."""
        return {"max_tokens": ANSWER_TOKENS, **self.settings} if self.prompts is None else dict(self.settings)


def run(experiment: Experiment, progress: Progress = lambda *_: None) -> Path:
    """Measure what is not yet measured; returns the folder. Raises UsageError, or what did not start."""
    return asyncio.run(measure(experiment, progress))


async def measure(experiment: Experiment, progress: Progress = lambda *_: None) -> Path:
    """The same in a running loop."""
    course = Course(experiment, progress)
    try:
        await course.run()
    finally:
        course.log.close()
    return experiment.out


class Course:
    """One sitting of an experiment."""

    def __init__(self, experiment: Experiment, progress: Progress) -> None:
        self.experiment, self.progress = experiment, progress
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

    async def run(self) -> None:
        """All replicates."""
        with own_redis() as server:
            for seed in range(1, self.experiment.seeds + 1):
                for group in turned(grouped(self.variants, self.common), seed):
                    while any(self._open_cells(variant, seed) for variant in group):
                        await self._sit(server.url, group, seed)
        self.progress(len(self.done), self.total, "")
        self.manifest["finished"] = manifests.sitting()["started"]
        manifests.write(self.experiment.out, self.manifest)
        shutil.rmtree(self.work, ignore_errors=True)

    async def _sit(self, url: str, group: list[Variant], seed: int) -> None:
        """One worker, and each variant's agent in turn; a failure ends it early, and the next one goes on."""
        settings = group[0].resolved(self.common)
        async with rig(url, settings, _made(self.work / "logs")) as running:
            for variant in turned(group, seed):
                if self._open_cells(variant, seed) and not await self._variant(running, variant, seed):
                    return

    async def _variant(self, running: Rig, variant: Variant, seed: int) -> bool:
        """False if something failed, so that processes are better started anew."""
        learned = _made(self.work / f"{variant.name}-{seed}")
        try:
            async with running.edge(variant, self.common, learned) as edge:
                self.manifest["models"][variant.name] = edge.about
                manifests.write(self.experiment.out, self.manifest)
                if variant.learns:
                    await self._teach(edge, variant, learned / "taught")
                for rtt_ms in self.experiment.rtt_ms:
                    if not await self._cell(running, edge, variant, rtt_ms, seed):
                        return False
        except EngineError:  # the agent's process died; the request it died of has its record
            return False
        return True

    async def _teach(self, edge: Edge, variant: Variant, mark: Path) -> None:
        """Once a replicate, even if it is interrupted: what is learnt is on disk."""
        if _exists(mark):
            return
        for number, question in enumerate(self.questions.lessons, 1):
            where = f"{variant.name}: lesson {number} of {len(self.questions.lessons)}"
            self.progress(len(self.done), self.total, where)
            await edge.ask(question, seed=number, rtt_ms=0)
        _made(mark)

    async def _cell(self, running: Rig, edge: Edge, variant: Variant, rtt_ms: float, seed: int) -> bool:
        """Every prompt of one variant, RTT and seed that has no record yet."""
        left = self._left(variant, rtt_ms, seed)
        if left:
            for question in self.questions.lessons[:WARM_UP]:
                await edge.ask(question, seed=0, rtt_ms=rtt_ms)
        for question in left:
            self.progress(len(self.done), self.total, f"{variant.name}, {rtt_ms:g} ms, seed {seed}")
            key = Key(variant.name, rtt_ms, seed, question.number)
            if not await self._ask(running, edge, question, key):
                return False
        return True

    async def _ask(self, running: Rig, edge: Edge, question: Question, key: Key) -> bool:
        try:
            told = await edge.ask(question, draw_seed(key), key.rtt_ms)
            if told["failure"]:
                running.check()
        except PilotfishError as error:
            told = {"failure": {"code": error.code, "sentence": str(error)}}
        self._note(key, question, told)
        if not told["failure"]:
            self.failed_in_a_row = 0
            return True
        self.failed_in_a_row += 1
        if self.failed_in_a_row == FAILURES_MAX:
            why = told["failure"]["sentence"]
            raise PilotfishError(f"{FAILURES_MAX} requests in a row failed, the last with: {why}")
        return False

    def _note(self, key: Key, question: Question, told: Record) -> None:
        right = None
        if question.answer is not None:
            right = not told["failure"] and told["text"].strip() == question.answer.strip()
        self.log.add({**key._asdict(), "family": question.family, "right": right, **told})
        self.done.add(key)

    def _left(self, variant: Variant, rtt_ms: float, seed: int) -> list[Question]:
        keys = {Key(variant.name, rtt_ms, seed, one.number): one for one in self.questions.asked}
        return [question for key, question in keys.items() if key not in self.done]

    def _open_cells(self, variant: Variant, seed: int) -> bool:
        return any(self._left(variant, rtt_ms, seed) for rtt_ms in self.experiment.rtt_ms)


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


def stated(experiment: Experiment, every: Sequence[Variant], questions: Questions) -> dict[str, Any]:
    """The manifest of a run that begins."""
    return {
        "schema": manifests.SCHEMA,
        "experiment": {
            "variants": {one.name: {**one.settings, "routed": one.routed} for one in every},
            "seeds": experiment.seeds,
            "rtt_ms": list(experiment.rtt_ms),
            "prompts": questions.source,
            "lessons": len(questions.lessons),
            "settings": {name: str(value) for name, value in experiment.common.items()},
        },
        "about": {name: preset.about for name, preset in PRESETS.items()},
        "settings": {one.name: one.resolved(experiment.common).shown() for one in every},
        "missing": {one.name: list(one.missing) for one in every if one.missing},
        "models": {},
        "sittings": [],
        "finished": None,
    }
