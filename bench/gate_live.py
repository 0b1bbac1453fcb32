"""Gated mode itself, through Redis: what a learnt gate leaves unverified, what it costs, and what audits say of it.

One worker (llama.cpp) and one agent; the agent's gate has learnt from recorded requests before. Every budget runs
twice: with no audits for the costs, and with every request audited for the disagreement, on the prefixes the gate
itself committed. `exact` and `cloud_only` are the baselines, in the same run.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pilotfish.bench.children import own_redis
from pilotfish.bench.gate_record import CODE_TOKENS, CONTEXT, SESSIONS, TASK_TOKENS, Question
from pilotfish.bench.sides import agent, edge_cores, engine_cores, on_cores, worker
from pilotfish.cloud_worker.engines.spec import EngineSpec
from pilotfish.cloud_worker.worker import WorkerSpec
from pilotfish.edge_agent.agent import Agent
from pilotfish.edge_agent.calibration import Sums
from pilotfish.edge_agent.confidence import Strategy
from pilotfish.edge_agent.drafters.llamacpp import LlamaCppDrafter
from pilotfish.edge_agent.generation import Task
from pilotfish.edge_agent.learning import Learner
from pilotfish.edge_agent.tokenizer import LlamaTokenizer
from pilotfish.protocol import cores, fleet
from pilotfish.protocol.messages import Mode, Sampling

DRAFT_MAX = 16
DRAFT_TOKENS = 8
CONCURRENT = 4
SUMMED = ("tokens", "unverified", "never_sent", "audited", "audit_disagreed", "rounds", "cloud_rows", "cloud_steps")


@dataclass(frozen=True, slots=True)
class Setting:
    """One way to run the questions."""

    mode: Mode
    budget: float = 0.0
    audit_share: float = 0.0


def measure(
    questions: Sequence[Question], evidence: Sums, target: Path, draft: Path, strategy: Strategy,
    budgets: Sequence[float],
) -> dict[str, Any]:  # fmt: skip
    """Figures of every setting by its name."""
    own = engine_cores()
    spec = EngineSpec(
        "llamacpp", str(target), context=CONTEXT, draft_max=DRAFT_MAX, max_sessions=SESSIONS, threads=max(1, len(own)),
        cores=",".join(map(str, own)),
    )  # fmt: skip
    with own_redis() as server:
        return asyncio.run(_measure(server.url, spec, questions, evidence, draft, strategy, budgets))


async def _measure(
    url: str, spec: EngineSpec, questions: Sequence[Question], evidence: Sums, draft: Path, strategy: Strategy,
    budgets: Sequence[float],
) -> dict[str, Any]:  # fmt: skip
    async with worker(WorkerSpec(url, spec)):
        with on_cores(edge_cores() or cores.available()):
            drafter = LlamaCppDrafter(draft, context=CONTEXT, sessions=CONCURRENT, threads=1, confidence=strategy.score)

            def tokenizer(target: fleet.Target) -> LlamaTokenizer:
                return LlamaTokenizer(drafter.model, target.vocabulary.chat_template)

            async with agent(url, drafter, tokenizer, drafter.model.eog_ids) as running:
                found = {
                    "cloud_only": await _run(running, questions, Setting("cloud_only"), evidence),
                    "exact": await _run(running, questions, Setting("exact"), evidence),
                }
                for budget in budgets:
                    costs = await _run(running, questions, Setting("gated", budget), evidence)
                    audits = await _run(running, questions, Setting("gated", budget, 1.0), evidence)
                    measured = {name: audits[name] for name in ("disagreement", "audited_share")}
                    found[f"gated {budget:g}"] = {**costs, **measured}
                return found


async def _run(running: Agent, questions: Sequence[Question], setting: Setting, evidence: Sums) -> dict[str, Any]:
    """Every question once, CONCURRENT at a time, by a gate that knows the evidence and nothing of earlier settings."""
    assert running.target is not None
    running.learner = Learner(running.drafter.info.fingerprint, running.target.id, "bench")
    running.learner.of(Sampling()).evidence.add(evidence)
    running.defaults = replace(running.defaults, audit_share=setting.audit_share)
    sums, right, asked, stayed = Counter[str](), 0, 0, 0
    waiting = list(reversed(questions))

    async def lane() -> None:
        nonlocal right, asked, stayed
        while waiting:
            question = waiting.pop()
            text, costs = await _answer(running, question, setting)
            sums.update({name: getattr(costs, name) for name in SUMMED})
            stayed += costs.rounds == 0 and setting.mode == "gated"
            asked += question.answer is not None
            right += question.answer is not None and text.strip() == question.answer

    async with asyncio.TaskGroup() as lanes:
        for _ in range(CONCURRENT):
            lanes.create_task(lane())
    return figures(sums, right, asked, stayed, len(questions))


async def _answer(running: Agent, question: Question, setting: Setting) -> tuple[str, Any]:
    chat = question.answer is not None
    most = TASK_TOKENS if chat else CODE_TOKENS
    ids = await running.encode(question.prompt, chat=chat, max_tokens=most)
    task = Task(
        ids, setting.mode, "wait", max_tokens=most, stop_ids=running.stop_ids, drafting="always",
        draft_tokens=DRAFT_TOKENS,
        round_timeout_ms=60_000, deadline_ms=600_000, max_disagreement=setting.budget,
    )  # fmt: skip
    generation = running.open(task)
    try:
        said = [token.id async for tokens in generation.run() for token in tokens]
        text = b"".join(running.tokenizer.piece(token) for token in said if token not in running.stop_ids)
        return text.decode("utf-8", "replace"), generation.summary()
    finally:
        running.close(generation)


def figures(sums: Counter[str], right: int, asked: int, stayed: int, requests: int) -> dict[str, Any]:
    """Shares of all emitted tokens; rows and steps per token with catch-up rows, and audits where there are any."""
    tokens = sums["tokens"]
    return {
        "requests": requests,
        "tokens": tokens,
        "accuracy": right / asked if asked else None,
        "unverified_share": sums["unverified"] / tokens,
        "never_sent_share": sums["never_sent"] / tokens,
        "requests_that_never_left": stayed,
        "rows_per_token": sums["cloud_rows"] / tokens,
        "steps_per_token": sums["cloud_steps"] / tokens,
        "disagreement": sums["audit_disagreed"] / tokens if sums["audited"] else None,
        "audited_share": sums["audited"] / sums["unverified"] if sums["unverified"] else None,
    }
