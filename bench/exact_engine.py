"""One engine's part of `bench exact`: a private Redis, a worker, an agent with the demo draft, every setting.

The engine has a child process of its own, and cores of its own; worker and agent share this process. After the run a
second child says how noisy the engine's logits are and judges what differed.
"""

from __future__ import annotations

import asyncio
import json
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pilotfish.bench import near_tie
from pilotfish.bench.children import own_redis
from pilotfish.bench.exact_compare import CONCURRENT, Difference, Item, Tally, compare_all
from pilotfish.bench.logit_probe import Ask, Probe
from pilotfish.bench.sides import agent, edge_cores, engine_cores, on_cores, worker
from pilotfish.cloud_worker.engines.spec import EngineSpec
from pilotfish.cloud_worker.worker_process import WorkerSpec
from pilotfish.edge_agent.agent import Agent
from pilotfish.edge_agent.tokenizer import LlamaTokenizer
from pilotfish.protocol import cores, fleet
from pilotfish.protocol.messages import Sampling

CONTEXT, DRAFT_MAX, THREADS_MAX = 512, 8, 4
NOISE_TEXTS = 64
SETTINGS = {
    "T=0": Sampling(),
    "T=0.7 top_p=0.9": Sampling(temperature=0.7, top_p=0.9),
    "T=1 top_k=20": Sampling(temperature=1.0, top_k=20),
    "T=1 min_p=0.05": Sampling(temperature=1.0, min_p=0.05),
    "T=1.3": Sampling(temperature=1.3),
}


@dataclass(frozen=True, slots=True)
class Pair:
    """The models: the target for vLLM and for llama.cpp, the draft."""

    target_dir: Path
    target_gguf: Path
    draft_gguf: Path
    questions: Path

    @classmethod
    def demo(cls) -> Pair:
        """The one that comes with the package."""
        from pilotfish.demo import pair

        return cls(pair.TARGET_DIR, pair.target_gguf(), pair.draft_gguf(), pair.EVAL_FILE)


@dataclass(frozen=True, slots=True)
class Sizes:
    """Every `stride`-th prompt of each family, and how long answers may get."""

    stride: int = 1
    task_tokens: int = 48
    code_tokens: int = 96


@dataclass(slots=True)
class Outcome:
    """What one engine came to."""

    engine: str
    settings: dict[str, Tally] = field(default_factory=dict)
    noise: near_tie.Noise | None = None
    judged: list[dict[str, Any]] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Compared, over all settings."""
        return sum(tally.tokens for tally in self.settings.values())

    @property
    def differences(self) -> list[Difference]:
        """Of all settings."""
        return [difference for tally in self.settings.values() for difference in tally.differences]


def measure(engine: str, pair: Pair, sizes: Sizes, **changes: Any) -> Outcome:
    """Generate, compare, judge. `changes` are to the engine's specification."""
    outcome, spec = Outcome(engine), replace(engine_spec(engine, pair), **changes)
    with own_redis() as server:
        asyncio.run(_generate(server.url, spec, pair, sizes, outcome))
    with Probe(spec) as probe:
        texts = sorted((text for tally in outcome.settings.values() for text in tally.texts.values()), key=len)
        outcome.noise = near_tie.measure(probe, texts[:: max(1, len(texts) // NOISE_TEXTS)])
        outcome.judged = [judge(probe, difference, outcome.noise) for difference in outcome.differences]
    return outcome


async def _generate(url: str, spec: EngineSpec, pair: Pair, sizes: Sizes, outcome: Outcome) -> None:
    lines = pair.questions.read_text(encoding="utf-8").splitlines()
    async with worker(WorkerSpec(url, spec)):
        with on_cores(edge_cores()):
            async with agent_with(url, pair.draft_gguf) as running:
                items = await questions(running, lines, sizes)
                for name, sampling in SETTINGS.items():
                    outcome.settings[name] = await compare_all(running, items, name, sampling)


def agent_with(url: str, draft: Path) -> AbstractAsyncContextManager[Agent]:
    """An agent with the pair's draft: one thread, one sequence for each prompt in progress."""
    from pilotfish.edge_agent.drafters.llamacpp import LlamaCppDrafter

    drafter = LlamaCppDrafter(draft, context=CONTEXT, sessions=CONCURRENT, threads=1)

    def tokenizer(target: fleet.Target) -> LlamaTokenizer:
        fleet.check_pair(fleet.Vocabulary(tuple(drafter.model.token_bytes)), target.vocabulary)
        return LlamaTokenizer(drafter.model, target.vocabulary.chat_template)

    return agent(url, drafter, tokenizer, drafter.model.eog_ids)


def judge(probe: Probe, difference: Difference, noise: near_tie.Noise) -> dict[str, Any]:
    """A difference as the report tells it."""
    told: dict[str, Any] = {
        "setting": difference.setting, "item": difference.item, "position": len(difference.prefix),
        "exact": difference.exact, "cloud_only": difference.cloud, "gap": None, "explained": False,
    }  # fmt: skip
    if difference.exact is None or difference.cloud is None:
        return told
    (row,) = probe.answers(Ask("judge", difference.prefix))[0].rows
    what = len(difference.prefix), (difference.exact, difference.cloud), difference.sampling
    return {**told, "gap": near_tie.gap(row, *what), "explained": near_tie.explained(row, *what, noise.bound)}


def engine_spec(engine: str, pair: Pair) -> EngineSpec:
    """float32, its own cores."""
    own = engine_cores()
    model = pair.target_dir if engine == "vllm" else pair.target_gguf
    return EngineSpec(
        engine, str(model), context=CONTEXT, draft_max=DRAFT_MAX, max_sessions=2 * CONCURRENT,
        threads=min(THREADS_MAX, len(own) or len(cores.available())), cores=",".join(map(str, own)),
    )  # fmt: skip


async def questions(running: Agent, lines: list[str], sizes: Sizes) -> list[Item]:
    """The fixed evaluation prompts; code is continued as it stands, the rest is asked by the chat template."""
    items, seen = list[Item](), dict[str, int]()
    for number, line in enumerate(lines):
        row = json.loads(line)
        seen[row["family"]] = seen.get(row["family"], -1) + 1
        if seen[row["family"]] % sizes.stride:
            continue
        chat = row["answer"] is not None
        limit = sizes.task_tokens if chat else sizes.code_tokens
        ids = await running.encode(row["prompt"], chat=chat, max_tokens=limit)
        items.append(Item(number, ids, limit, row["answer"]))
    return items
