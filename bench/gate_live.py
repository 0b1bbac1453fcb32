"""Gated mode itself, through Redis: what a learnt gate leaves unverified, what it costs, and what audits say of it.

One worker (llama.cpp) and one agent; the agent's gate has learnt from recorded requests before, and learns no more.
Every request is audited, for the disagreement on the prefixes that the gate itself committed; what the audits cost is
told apart. `cloud_only` and `exact` are the baselines, in the same run, on the same questions and seeds.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from pilotfish.bench.children import own_redis
from pilotfish.bench.gate_record import sampling
from pilotfish.bench.gate_replay import hindsight
from pilotfish.bench.questions import Question
from pilotfish.bench.recording import CONTEXT, SESSIONS
from pilotfish.bench.sides import agent, edge_cores, engine_cores, on_cores, worker
from pilotfish.cloud_worker.engines.spec import EngineSpec
from pilotfish.cloud_worker.worker_process import WorkerSpec
from pilotfish.edge_agent.agent import Agent
from pilotfish.edge_agent.calibration import Labelled, Sums
from pilotfish.edge_agent.confidence import Strategy
from pilotfish.edge_agent.drafters.llamacpp import LlamaCppDrafter
from pilotfish.edge_agent.gate import CONFIDENCE, upper_bound
from pilotfish.edge_agent.generation import Generation
from pilotfish.edge_agent.learning import Learner, Lesson
from pilotfish.edge_agent.task import Task
from pilotfish.edge_agent.tokenizer import LlamaTokenizer
from pilotfish.protocol import cores, fleet
from pilotfish.protocol.messages import Mode, Sampling

DRAFT_MAX = 16
DRAFT_TOKENS = 8
CONCURRENT = 8
EXACT_STRIDE = 4  # every so many questions in exact mode: it is told for its rows and steps alone


class Settled(Learner):
    """Keeps what it was given: the calibration part is all that any gate of this benchmark knows."""

    def learn(self, sampling: Sampling, lesson: Lesson) -> None:
        """Nothing."""


@dataclass(frozen=True, slots=True)
class Setting:
    """One way to run the questions."""

    mode: Mode
    temperature: float
    budget: float = 0.0


def measure(
    questions: Mapping[float, Sequence[Question]], evidence: dict[float, Sums], target: Path, draft: Path,
    strategy: Strategy, budgets: Sequence[float],
) -> dict[float, dict[str, Any]]:  # fmt: skip
    """Questions and evidence by temperature; figures of every setting by its name."""
    own = engine_cores()
    spec = EngineSpec(
        "llamacpp", str(target), context=CONTEXT, draft_max=DRAFT_MAX, max_sessions=SESSIONS, threads=max(1, len(own)),
        cores=",".join(map(str, own)),
    )  # fmt: skip
    with own_redis() as server:
        return asyncio.run(_measure(server.url, spec, questions, evidence, draft, strategy, budgets))


async def _measure(
    url: str, spec: EngineSpec, questions: Mapping[float, Sequence[Question]], evidence: dict[float, Sums], draft: Path,
    strategy: Strategy, budgets: Sequence[float],
) -> dict[float, dict[str, Any]]:  # fmt: skip
    async with worker(WorkerSpec(url, spec)):
        with on_cores(edge_cores() or cores.available()):
            drafter = LlamaCppDrafter(draft, context=CONTEXT, sessions=CONCURRENT, threads=1, confidence=strategy.score)

            def tokenizer(target: fleet.Target) -> LlamaTokenizer:
                return LlamaTokenizer(drafter.model, target.vocabulary.chat_template)

            async with agent(url, drafter, tokenizer, drafter.model.eog_ids) as running:
                return {
                    temperature: await _all(running, questions[temperature], temperature, learnt, budgets)
                    for temperature, learnt in evidence.items()
                }


async def _all(
    running: Agent, questions: Sequence[Question], temperature: float, evidence: Sums, budgets: Sequence[float]
) -> dict[str, Any]:
    assert running.target is not None
    running.learner = Settled(running.drafter.info.fingerprint, running.target.id, "bench")
    running.learner.of(Sampling(temperature=temperature)).evidence.add(evidence)
    running.defaults = replace(running.defaults, audit_share=1.0)
    settings = {
        "cloud_only": Setting("cloud_only", temperature),
        "exact": Setting("exact", temperature),
        **{f"gated {budget:g}": Setting("gated", temperature, budget) for budget in budgets},
    }
    return {
        name: await _run(running, list(enumerate(questions))[:: EXACT_STRIDE if name == "exact" else 1], setting)
        for name, setting in settings.items()
    }


async def _run(running: Agent, questions: Sequence[tuple[int, Question]], setting: Setting) -> dict[str, Any]:
    """Every question once, CONCURRENT at a time."""
    told = Told(setting.budget)
    waiting = list(reversed(questions))

    async def lane() -> None:
        while waiting:
            number, question = waiting.pop()
            told.take(question, *await _answer(running, question, number, setting))

    async with asyncio.TaskGroup() as lanes:
        for _ in range(CONCURRENT):
            lanes.create_task(lane())
    return told.figures()


async def _answer(running: Agent, question: Question, number: int, setting: Setting) -> tuple[str, Generation]:
    ids = await running.encode(question.prompt, chat=question.chat, max_tokens=question.limit)
    task = Task(
        ids, setting.mode, "wait", sampling(setting.temperature, number), max_tokens=question.limit,
        stop_ids=running.stop_ids, drafting="always", draft_tokens=DRAFT_TOKENS, round_timeout_ms=60_000,
        deadline_ms=600_000, max_disagreement=setting.budget,
    )  # fmt: skip
    generation = running.open(task)
    try:
        said = [token.id async for tokens in generation.run() for token in tokens]
        text = b"".join(running.tokenizer.piece(token) for token in said if token not in running.stop_ids)
        return text.decode("utf-8", "replace"), generation
    finally:
        running.close(generation)


@dataclass(slots=True)
class Told:
    """What one setting came to."""

    budget: float
    requests: int = 0
    sums: Counter[str] = field(default_factory=Counter)
    labels: list[Labelled] = field(default_factory=list)
    wrong: list[int] = field(default_factory=list)  # of each request, as its audit said

    def take(self, question: Question, text: str, generation: Generation) -> None:
        """One answer."""
        costs, audit = generation.summary(), generation.audit
        self.requests += 1
        self.labels += generation.lesson().labels
        self.wrong.append(costs.audit_disagreed)
        self.sums.update(
            {name: getattr(costs, name) for name in ("tokens", "unverified", "audited", "cloud_rows", "cloud_steps")},
            never_sent=audit.unsent if audit else costs.never_sent,
            audit_rows=audit.rows if audit else 0,
            audit_steps=audit.steps if audit else 0,
            stayed=costs.rounds == 0,
            questions=question.chat,
            right=question.chat and text.strip() == question.answer,
        )  # fmt: skip

    def figures(self) -> dict[str, Any]:
        """Shares of all emitted tokens; rows and steps per token with catch-up rows, and without the audits'.

        `disagreement` counts unaudited local tokens (an audit that came too late) as the audited ones.
        """
        n, tokens = self.sums, self.sums["tokens"]
        scores, agreed = (np.array([getattr(one, name) for one in self.labels]) for name in ("score", "agreed"))
        best = hindsight(scores, agreed.astype(bool), self.budget, tokens)
        return {
            "requests": self.requests, "tokens": tokens,
            "accuracy": n["right"] / n["questions"] if n["questions"] else None,
            "unverified_share": n["unverified"] / tokens,
            "hindsight_share": best if self.budget else None,
            "never_sent_share": n["never_sent"] / tokens,
            "requests_that_never_left": n["stayed"],
            "rows_per_token": (n["cloud_rows"] - n["audit_rows"]) / tokens,
            "steps_per_token": (n["cloud_steps"] - n["audit_steps"]) / tokens,
            "rows_per_audited_token": n["audit_rows"] / n["audited"] if n["audited"] else None,
            "disagreement": sum(self.wrong) / tokens * n["unverified"] / n["audited"] if n["audited"] else 0.0,
            "disagreement_high": disagreement_bound(self.wrong, tokens),
            "audited_share": n["audited"] / n["unverified"] if n["unverified"] else None,
        }  # fmt: skip


def disagreement_bound(wrong: Sequence[int], tokens: int) -> float:
    """The gate's own bound, at its confidence, from what audits found in each request; errors come in clusters."""
    counts = np.asarray(wrong, float)
    mean = float(counts.mean()) if len(counts) else 0.0
    return upper_bound(int(counts.sum()), tokens, CONFIDENCE, max(1.0, float(counts.var()) / mean) if mean else 1.0)
