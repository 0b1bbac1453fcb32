"""`bench capacity`, second half: the same replay through Redis and a worker, a round's cost, and the first token.

The engine has its own core here and one thread; Redis, worker and agent share the others, as on a small machine. What
the engine alone does on that core is measured in the same run, so the difference is the queue's and the worker's.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import asdict
from statistics import fmean, median
from typing import Any

from pilotfish.bench import engines
from pilotfish.bench.children import own_redis
from pilotfish.bench.piped import Piped
from pilotfish.bench.sides import agent, edge_cores, engine_cores, on_cores, worker
from pilotfish.bench.verifier_child import MODULE
from pilotfish.bench.vllm_server import first_tokens, vllm_server
from pilotfish.cloud_worker.engines.spec import EngineSpec
from pilotfish.cloud_worker.worker_process import WorkerSpec
from pilotfish.edge_agent.agent import Agent
from pilotfish.edge_agent.drafters.base import Drafter
from pilotfish.edge_agent.drafters.fake import FakeDrafter
from pilotfish.edge_agent.task import Task
from pilotfish.protocol.messages import Sampling

EDGES, ALPHA, K, TOKENS = 8, 0.85, 6, 96
PACED_MS = 5.0  # t_d of the rounds that the formula is held against
FORMULA_TEXTS = 8
FIRST_TOKENS = 24


Texts = dict[tuple[int, ...], list[int]]  # by prompt


def replaying(known: Texts, vocab: int, alpha: float, token_ms: float = 0.0) -> FakeDrafter:
    """Drafts each known text with `alpha` right tokens, `token_ms` each."""
    lengths = sorted({len(prompt) for prompt in known})

    def drawn(ids: Sequence[int], position: int, sampling: Sampling) -> int:
        prompt = next(ids[:n] for n in lengths if tuple(ids[:n]) in known)
        text = known[tuple(prompt)]
        return text[min(position - len(prompt), len(text) - 1)]

    return FakeDrafter(drawn, alpha=alpha, vocab_size=vocab, context=engines.CONTEXT, token_ms=token_ms)


def through_the_queue() -> dict[str, Any]:
    """Figures: queue, formula, first_token."""
    from pilotfish.demo import pair

    spec = EngineSpec(
        "vllm", str(pair.TARGET_DIR), context=engines.CONTEXT, draft_max=engines.DRAFT_MAX,
        max_sessions=engines.SESSIONS, threads=1, cores=",".join(map(str, engine_cores())),
    )  # fmt: skip
    prompts = engines.prompts(EDGES)
    with Piped(MODULE, {**engines.environment(), "OMP_NUM_THREADS": "1"}) as child:
        vocab = child.ask({"do": "open", **asdict(spec)})
        texts = child.ask({"do": "decode", "prompts": prompts, "lengths": [TOKENS] * EDGES})["texts"]
        alone = fmean(_alone(child, prompts, texts) for _ in range(3))
    known = {tuple(prompt): text for prompt, text in zip(prompts, texts, strict=True)}
    with own_redis() as server, vllm_server(spec) as address:
        return asyncio.run(_through(server.url, spec, known, vocab, alone, address))


def _alone(child: Piped, prompts: list[list[int]], texts: list[list[int]]) -> float:
    coin = random.Random(7)
    edges = [
        {"session": f"s{i}", "prompt": prompt, "text": text, "agrees": [coin.random() < ALPHA for _ in text]}
        for i, (prompt, text) in enumerate(zip(prompts, texts, strict=True))
    ]
    found = child.ask({"do": "replay", "edges": edges, "k": K})
    return float(found["tokens"] / found["seconds"])


async def _through(url: str, spec: EngineSpec, known: Texts, vocab: int, alone: float, address: str) -> dict[str, Any]:
    async with worker(WorkerSpec(url, spec)):
        with on_cores(edge_cores()):
            async with _agent(url, replaying(known, vocab, ALPHA)) as running:
                speeds = [await _speed(running, list(known)) for _ in range(3)]
                first = await _first(running, address)
            async with _agent(url, replaying(known, vocab, ALPHA, PACED_MS)) as running:
                formula = await _formula(running, list(known)[:FORMULA_TEXTS])
    queue = {
        "edges": EDGES, "alpha": ALPHA, "k": K, "engine_alone": round(alone), "through_queue": round(fmean(speeds)),
        "share_of_engine_alone": round(fmean(speeds) / alone, 3),
    }  # fmt: skip
    return {"queue": queue, "formula": formula, "first_token": first}


def _agent(url: str, drafter: Drafter) -> Any:
    return agent(url, drafter, lambda target: None)  # type: ignore[arg-type, return-value]  # no text is decoded


async def _speed(running: Agent, prompts: list[tuple[int, ...]]) -> float:
    """Committed tokens per second of all edges at once."""
    start = time.perf_counter()
    counts = await asyncio.gather(*(_generate(running, _task(prompt)) for prompt in prompts))
    return sum(count for count, _ in counts) / (time.perf_counter() - start)


def _task(prompt: tuple[int, ...], mode: Any = "exact", tokens: int = TOKENS) -> Task:
    return Task(prompt=prompt, mode=mode, max_tokens=tokens, drafting="fixed", draft_tokens=K, window=1)


async def _generate(running: Agent, task: Task) -> tuple[int, Any]:
    generation = running.open(task)
    try:
        async for _ in generation.run():
            pass
        return len(generation.session.generated), generation.summary()
    finally:
        running.close(generation)


async def _formula(running: Agent, prompts: list[tuple[int, ...]]) -> dict[str, float]:
    """Time per token of unpipelined rounds, one edge, against (K t_d + F)(1 - a) / (1 - a^(K+1)) of DESIGN §8.

    a is the share of drafts accepted up to and with the first wrong one, F what a round took beside drafting.
    """
    tokens = rounds = accepted = looked_at = 0
    seconds = drafting = 0.0
    for prompt in prompts:
        start = time.perf_counter()
        count, summary = await _generate(running, _task(prompt))
        seconds += time.perf_counter() - start
        tokens, rounds, drafting = tokens + count, rounds + summary.rounds, drafting + summary.draft_ms / 1000
        accepted, looked_at = accepted + summary.accepted, looked_at + summary.accepted + summary.corrected
    alpha = accepted / looked_at
    f = (seconds - drafting) / rounds
    predicted = (K * PACED_MS / 1000 + f) * (1 - alpha) / (1 - alpha ** (K + 1))
    measured = seconds / tokens
    return {
        "t_d_ms": PACED_MS, "f_ms": round(1000 * f, 3), "alpha": round(alpha, 3), "k": K, "rounds": rounds,
        "measured_ms_per_token": round(1000 * measured, 3), "predicted_ms_per_token": round(1000 * predicted, 3),
        "error": round(abs(predicted - measured) / measured, 4),
    }  # fmt: skip


async def _first(running: Agent, address: str) -> dict[str, Any]:
    """Time to the first token of `cloud_only` and of vLLM's own server, in turn, prompts never seen before."""
    ours, theirs = list[float](), list[float]()
    vocab = running.vocab_size
    coin = random.Random(11)
    async with first_tokens(address) as ask:
        for number in range(FIRST_TOKENS + 2):
            prompt = [coin.randrange(10, vocab) for _ in range(coin.choice((24, 120, 400)))]
            theirs.append(await ask(prompt))
            ours.append(await _first_of(running, tuple(reversed(prompt))))
            if number == 1:  # both are warm now
                ours.clear()
                theirs.clear()
    ratio = median(a / b for a, b in zip(ours, theirs, strict=True))
    return {
        "cloud_only_ms": round(1000 * median(ours), 2), "vllm_server_ms": round(1000 * median(theirs), 2),
        "ratio": round(ratio, 3), "prompts": len(ours),
    }  # fmt: skip


async def _first_of(running: Agent, prompt: tuple[int, ...]) -> float:
    start = time.perf_counter()
    generation = running.open(_task(prompt, "cloud_only", 8))
    try:
        async for _ in generation.run():
            return time.perf_counter() - start
        raise AssertionError("a generation without a token")
    finally:
        generation.cancel()
        running.close(generation)
