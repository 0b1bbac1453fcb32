"""The live side of `bench control`: a private Redis behind a delay proxy, a worker with the real target, a paced draft.

What it measures of times is what the replay is given; what it measures of speed is what the replay must foretell.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from pilotfish.bench.children import own_redis
from pilotfish.bench.control_record import Record
from pilotfish.bench.control_times import Times
from pilotfish.bench.delay_proxy import DelayProxy
from pilotfish.bench.recording import CONTEXT
from pilotfish.bench.sides import agent, edge_cores, engine_cores, on_cores, worker
from pilotfish.bench.wrapped import PacedDrafter
from pilotfish.cloud_worker.engines.spec import EngineSpec
from pilotfish.cloud_worker.worker_process import WorkerSpec
from pilotfish.edge_agent.agent import Agent
from pilotfish.edge_agent.confidence import DEFAULT, strategy
from pilotfish.edge_agent.learning import Learner
from pilotfish.edge_agent.policy import Pace
from pilotfish.edge_agent.task import Task
from pilotfish.edge_agent.tokenizer import LlamaTokenizer
from pilotfish.protocol import cores, fleet
from pilotfish.protocol.errors import EngineError

DRAFT_MAX = 64
GAUGE = (1, 4, 8, 16)  # K of the rounds that tell what a job and a row cost


@dataclass(frozen=True, slots=True)
class Live:
    """A running set-up; `proxy.rtt_ms` and `drafter.token_ms` may change between answers."""

    agent: Agent
    proxy: DelayProxy
    drafter: PacedDrafter

    async def speed(self, records: Sequence[Record], stop_ids: frozenset[int], **task: Any) -> float:
        """Tokens per ms over these answers, one after the other, prefill aside as in the replay.

        Raises EngineError if a text is not the target's own.
        """
        spent, tokens = 0.0, 0
        for record in records:
            wanted = Task(record.prompt, max_tokens=record.limit, stop_ids=stop_ids, **task)
            generation = self.agent.open(wanted)
            began, ended, text = time.perf_counter(), 0.0, list[int]()
            async for some in generation.run():
                text += [token.id for token in some]
                ended = time.perf_counter()  # what follows the last token is only a farewell to the worker
            self.agent.close(generation)
            if tuple(text) != record.text:
                raise EngineError("the live text is not the target's own: `bench exact` tells where they part")
            spent += 1000 * (ended - began) - generation.plan.prefill_ms
            tokens += len(text)
        return tokens / spent

    async def times(self, records: Sequence[Record], stop_ids: frozenset[int]) -> Times:
        """What a job, a row, a step and the broker take without a round trip: medians over fixed drafts of GAUGE."""
        found = list[tuple[float, float, float, float]]()
        for k in GAUGE:
            self._cold(0.0, 0.0)
            await self.speed(records, stop_ids, drafting="fixed", draft_tokens=k, window=1)
            pace = self.agent.pace
            found.append((pace.token_ms, pace.job.value(0.0), pace.row_ms, pace.trip.value(0.0)))
        token, job, row, broker = map(median, zip(*found, strict=True))
        await self.speed(records, stop_ids, mode="cloud_only")
        return Times(token, 0.0, job, row, self.agent.pace.step.value(job + row), broker)

    async def measure(
        self, records: Sequence[Record], stop_ids: frozenset[int], token_ms: float, rtt_ms: float, **task: Any
    ) -> float:
        """Tokens per ms of an agent that knows nothing yet."""
        self._cold(token_ms, rtt_ms)
        return await self.speed(records, stop_ids, **task)

    def _cold(self, token_ms: float, rtt_ms: float) -> None:
        self.drafter.token_ms, self.proxy.rtt_ms = token_ms, rtt_ms
        info, learner = self.agent.drafter.info, self.agent.learner
        self.agent.pace, self.agent.learner = Pace(), Learner(info.fingerprint, learner.target, learner.strategy)


@asynccontextmanager
async def live(target: Path, draft: Path) -> AsyncIterator[Live]:
    """Everything real, in this process but for Redis and the engine."""
    from pilotfish.edge_agent.drafters.llamacpp import LlamaCppDrafter

    own = engine_cores()
    spec = EngineSpec(
        "llamacpp", str(target), context=CONTEXT, draft_max=DRAFT_MAX, max_sessions=2,
        threads=len(own) or len(cores.available()), cores=",".join(map(str, own)),
    )  # fmt: skip
    with own_redis() as server:
        async with worker(WorkerSpec(server.url, spec)), DelayProxy.before(server.url, rtt_ms=0.0) as proxy:
            with on_cores(edge_cores()):
                inner = LlamaCppDrafter(
                    draft, context=CONTEXT, sessions=1, threads=1, confidence=strategy(DEFAULT).score
                )
                drafter = PacedDrafter(inner)

                def tokenizer(found: fleet.Target) -> LlamaTokenizer:
                    return LlamaTokenizer(inner.model, found.vocabulary.chat_template)

                async with agent(proxy.through(server.url), drafter, tokenizer, inner.model.eog_ids) as running:
                    yield Live(running, proxy, drafter)
