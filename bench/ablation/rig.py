"""The processes of an ablation: a private Redis, `pilotfish worker`, the delay proxy, an agent behind it.

    Redis ── worker                    one worker a set of its settings
      └── proxy (RTT, bytes) ── agent  one agent a variant, a tenant of its own

The proxy runs in this process, which has nothing else to do while an agent answers; with an RTT of 0 it still stands
between, so that all variants pay its 0.1 ms. Worker and agent get cores of their own, as in `pilotfish up`.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pilotfish.bench.ablation.presets import Variant
from pilotfish.bench.ablation.prompts import Question
from pilotfish.bench.delay_proxy import DelayProxy
from pilotfish.bench.piped import Piped
from pilotfish.cli.pair import WORKER_OPTIONS, allowed_cores, arguments, split_cores
from pilotfish.cli.processes import Child, Children, target_of_worker
from pilotfish.protocol import keys
from pilotfish.protocol.broker import connect, translated
from pilotfish.protocol.errors import PilotfishError
from pilotfish.protocol.settings import Settings


@dataclass(frozen=True, slots=True)
class Rig:
    """Redis and a worker that serves."""

    url: str
    worker: Child
    edge_cores: str

    def check(self) -> None:
        """Raise with the worker's last words if it is gone."""
        if self.worker.ended:
            raise PilotfishError(f"the worker ended: {self.worker.last_words()}")

    @asynccontextmanager
    async def edge(self, variant: Variant, common: dict[str, Any], learned: Path) -> AsyncIterator[Edge]:
        """An agent of this variant behind a proxy, both its own. What it learns stays in the folder."""
        async with AsyncExitStack() as stack:
            proxy = await stack.enter_async_context(DelayProxy.before(self.url, rtt_ms=0))
            child = stack.enter_context(Piped("pilotfish.bench.ablation.edge"))
            own = {
                "redis_url": proxy.through(self.url), "tenant": tenant(variant), "cores": self.edge_cores,
                "cache_dir": str(learned),
            }  # fmt: skip
            told = await asyncio.to_thread(
                child.ask, {"do": "open", "settings": {**common, **variant.settings, **own}, "routed": variant.routed}
            )
            if "refused" in told:
                error = PilotfishError(f"the agent of {variant.name} did not start: {told['refused']}")
                error.exit_code = told["exit_code"]
                raise error
            yield Edge(proxy, child, told)
            await asyncio.to_thread(child.ask, {"do": "close"})


@dataclass(frozen=True, slots=True)
class Edge:
    """An agent behind a proxy. `about`: its models."""

    proxy: DelayProxy
    child: Piped
    about: dict[str, Any]

    async def ask(self, question: Question, seed: int, rtt_ms: float) -> dict[str, Any]:
        """One prompt's record: what the agent says of it, and the bytes that crossed the wire meanwhile."""
        proxy = self.proxy
        proxy.rtt_ms = rtt_ms
        up, down = proxy.bytes_up, proxy.bytes_down
        asked = {"do": "ask", "prompt": question.prompt, "raw": question.raw, "seed": seed}
        told: dict[str, Any] = await asyncio.to_thread(self.child.ask, asked)
        return {**told, "wire_up": proxy.bytes_up - up, "wire_down": proxy.bytes_down - down}


@asynccontextmanager
async def rig(url: str, settings: Settings, served: Sequence[Variant], logs: Path) -> AsyncIterator[Rig]:
    """A worker of these settings on the Redis at `url`, ready. Raises with its own sentence if it does not start.

    Each variant served is a tenant, so that none finds another's prompts in the prefix cache. `logs` is a folder.
    """
    for_worker, for_edge = split_cores(allowed_cores(settings))
    name, redis = f"ablation-{secrets.token_hex(2)}", connect(url)
    try:
        with translated():
            await redis.sadd(keys.TENANTS, *map(tenant, served))  # type: ignore[misc]  # typed as sync or async
        async with Children(url, logs) as children:
            words = arguments(settings, WORKER_OPTIONS, cores=for_worker, name=name)
            worker = children.start("worker", name, words)
            await children.ready(worker, lambda: target_of_worker(redis, name))
            yield Rig(url, worker, for_edge)
    finally:
        await redis.aclose()


def tenant(variant: Variant) -> str:
    """A name a key can hold."""
    return f"v-{hashlib.sha256(variant.name.encode()).hexdigest()[:12]}"
