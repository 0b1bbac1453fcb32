"""What `calibrate` does: learn from prompts, look at what is known of a pair, say what a setting would do."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass
from math import ceil, isfinite
from pathlib import Path
from typing import Any

import numpy as np

from pilotfish.cli.redis_url import redis_url
from pilotfish.cli.run import patient_agent
from pilotfish.cli.talk import say
from pilotfish.edge_agent.agent import Agent
from pilotfish.edge_agent.calibration import Calibration, Reliability, brier, ece, lower_edge, reliability
from pilotfish.edge_agent.gate import CONFIDENCE, Evidence, Expectation, budget_for, expect
from pilotfish.edge_agent.generation import Generation
from pilotfish.edge_agent.launch import learned_folder, strategy_name
from pilotfish.edge_agent.learned import Key, Store
from pilotfish.edge_agent.task import Task
from pilotfish.protocol.errors import UsageError
from pilotfish.protocol.home import expand_user
from pilotfish.protocol.messages import Sampling
from pilotfish.protocol.settings import Settings

DEMO_PROMPTS = 300
BAR = 40


# --- learning ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Quality:
    """How good the map was on labels it had not learnt yet: each was predicted first, then learnt (prequential)."""

    labels: int
    ece: float
    brier: float
    bars: list[Reliability]


def prompt_lines(source: str) -> list[str]:
    """The prompts of a file, of standard input, or the demo's kind. Raises UsageError for a file without any."""
    if source == "demo":
        from pilotfish.demo import tasks

        return [row["prompt"] for row in tasks.evaluation_set(DEMO_PROMPTS // len(tasks.FAMILIES) + 1, 20260303)]
    try:
        text = sys.stdin.read() if source == "-" else Path(expand_user(source)).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the prompts in {source} cannot be read ({error}): one per line, UTF-8") from None
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise UsageError(f"{source} holds no prompt: one per line")
    return lines


async def learn(settings: Settings, lines: Sequence[str]) -> Quality:
    """Answer every prompt in exact mode; the agent learns as it does from any request, and saves it at the end."""
    agent = await patient_agent(settings, redis_url(settings))
    predicted: list[float] = []
    agreed: list[bool] = []
    await agent.start()
    try:
        for number, line in enumerate(lines, 1):
            before = Calibration()
            before.add(agent.learner.of(Sampling(temperature=settings.temperature)).calibration.sums())
            generation = await _answer(agent, settings, line, number)
            labels = generation.lesson().labels
            predicted += [before.acceptance(label.score) for label in labels]
            agreed += [label.agreed for label in labels]
            agent.close(generation)
            if number % 50 == 0:
                say(f"{number} of {len(lines)} prompts, {len(agreed)} labels")
    finally:
        await agent.stop()
    half = len(agreed) // 2  # the first half is spent on warming up
    chances, right = np.array(predicted[half:]), np.array(agreed[half:], bool)
    bars = reliability(chances, right)
    return Quality(len(right), ece(bars), brier(chances, right), bars)


async def _answer(agent: Agent, settings: Settings, text: str, number: int) -> Generation:
    ids = await agent.encode(text, chat=True, max_tokens=settings.max_tokens)
    sampling = Sampling(temperature=settings.temperature, seed=number)
    task = Task(
        ids, sampling=sampling, max_tokens=settings.max_tokens, stop_ids=agent.stop_ids,
        drafting="fixed", draft_tokens=settings.draft_tokens, window=1,  # each token drafted, whatever it is worth
        round_timeout_ms=settings.round_timeout_ms,
    )  # fmt: skip
    generation = agent.open(task)
    async with aclosing(generation.run()) as run:
        async for _ in run:
            pass
    return generation


# --- what is known -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Known:
    """What was learnt of one pair and kind of draw."""

    key: Key
    evidence: Evidence


def known(settings: Settings) -> Known:
    """The pair with the most evidence among those that fit the settings. Raises UsageError when there is none."""
    store, name = Store(learned_folder(settings)), strategy_name(settings)
    wanted = [key for key in store.known() if (key.strategy, key.temperature) == (name, round(settings.temperature, 2))]
    found = []
    for key in wanted:
        evidence = Evidence()
        evidence.add(store.load(key))
        found.append(Known(key, evidence))
    if not found:
        raise UsageError(
            f"nothing is known of draws at temperature {settings.temperature:g} with the strategy {name}: "
            "serve some requests in exact mode, or learn now with `pilotfish calibrate --prompts demo`"
        )
    return max(found, key=lambda one: one.evidence.tokens)


# --- the report ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Report:
    """The setting and what it will do. `max_disagreement` is None when no setting fulfils the wish."""

    draft: str
    target: str
    strategy: str
    temperature: float
    requests: int
    tokens: int
    confidence: float
    wished_offload: float | None
    max_disagreement: float | None
    expected: Expectation | None
    quality: Quality | None

    @classmethod
    def of(cls, learnt: Known, budget: float, offload: float | None, quality: Quality | None) -> Report:
        """For a budget, or for the smallest one that reaches an offload."""
        key, evidence = learnt.key, learnt.evidence
        if offload is not None:
            budget = budget_for(evidence, offload)
        setting = ceil(budget * 1e4) / 1e4 if isfinite(budget) else None  # rounded up, or the gate would stay shut
        return cls(
            key.draft, key.target, key.strategy, key.temperature, int(evidence.requests[0]), evidence.tokens,
            CONFIDENCE, offload, setting, None if setting is None else expect(evidence, setting), quality,
        )  # fmt: skip

    @property
    def enough(self) -> bool:
        """Whether the gate would open."""
        return self.expected is not None and self.expected.unverified > 0


def show(report: Report, *, as_json: bool) -> None:
    """As data, or for people."""
    if as_json:
        body: dict[str, Any] = asdict(report)
        if report.expected:
            body["expected"]["score_from"] = lower_edge(report.expected.bin)
        print(json.dumps(body))
        return
    print(f"draft {report.draft[:12]}, target {report.target}, T = {report.temperature:g}, strategy {report.strategy}")
    print(f"learnt from {report.tokens} labelled tokens of {report.requests} requests")
    for line in _expectation(report):
        print(line)
    if report.quality:
        _show_quality(report.quality)


def _expectation(report: Report) -> list[str]:
    found, sure = report.expected, f"{report.confidence:.0%} confidence"
    if found is None:
        return [f"no budget leaves {report.wished_offload:.0%} of the tokens unverified: learn more, or wish for less"]
    lines = [f"max_disagreement = {found.budget:g}"]
    if not report.enough:
        return [*lines, "  the gate stays shut: too little is known for so small a budget. Learn more, or allow more"]
    low, high = found.unverified_low, found.unverified_high
    return [
        *lines,
        f"  unverified    {found.unverified:.1%} of the tokens ({low:.1%} to {high:.1%})",
        f"  disagreement  {found.disagreement:.2%} of the tokens, at most {found.disagreement_high:.2%} with {sure}",
        f"  commits       tokens that score {lower_edge(found.bin):.4f} or more",
    ]


def _show_quality(quality: Quality) -> None:
    """The reliability diagram: a bar is what happened, the mark what was predicted."""
    print(f"calibration on {quality.labels} labels, each predicted before it was learnt:")
    print(f"  ECE {quality.ece:.3f}, Brier {quality.brier:.3f}")
    for bar in quality.bars:
        filled = list("█" * round(bar.observed * BAR) + "·" * (BAR - round(bar.observed * BAR)))
        filled[min(BAR - 1, round(bar.predicted * BAR))] = "│"
        print(f"  {bar.predicted:.2f} {''.join(filled)} {bar.observed:.2f}  {bar.labels}")
