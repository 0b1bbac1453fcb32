"""`bench routing`: prefix-aware routing against least-loaded, with three workers and conversations that share prompts.

Everything is the product's but the engine: the fake one pretends a prefix cache of its own (same block names, LRU) and
a prefill that takes time by the row. The oracle is one cache as large as all workers' together that sees every request:
no routing can reuse more. Two fleets, one for each way to route, stand side by side on Redis servers of their own;
they take turns, block by block, so that a machine that slows down slows down both.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any, Final

from pilotfish.bench.children import own_redis
from pilotfish.bench.conditions import conditions, load_average
from pilotfish.bench.report import Report, Target, target
from pilotfish.bench.routing_trace import Client, Measured, Shape, client, short_prompts, talk
from pilotfish.bench.sides import worker
from pilotfish.bench.stats import median_ratio, percentile, spread
from pilotfish.cloud_worker.engines.fake import FakeVerifier
from pilotfish.cloud_worker.engines.fake_cache import FakeBlockCache
from pilotfish.cloud_worker.engines.spec import EngineSpec
from pilotfish.cloud_worker.routing import Routing
from pilotfish.cloud_worker.worker import WorkerSpec
from pilotfish.protocol import fleet, keys
from pilotfish.protocol.broker import connect

WORKERS: Final = 3
BLOCK: Final = 16
KV_BLOCKS: Final = 1_200  # of one worker: together they hold most of the conversations, alone none does
ROW_US: Final = 100.0  # 10,000 tokens/s
STEP_MS: Final = 2.0
TARGET_ID: Final = fleet.target_id(FakeVerifier().info.fingerprint)
BEATS_SECONDS: Final = 2 * keys.BEAT_EVERY_MS / 1000  # counts come with the workers' next beats
SHARE_GOAL, EQUAL_GOAL = 0.95, 0.999
SERIAL_ENOUGH, SHORT_ENOUGH = 1_000, 2_000


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much one run measures."""

    conversations: int = 24  # of a block
    talk_blocks: int = 4  # pairs
    serial: int = 150  # conversations one after the other
    short_blocks: int = 16  # pairs
    short_prompts: int = 300  # of a block

    @property
    def shape(self) -> Shape:
        """Of one block of the trace that both fleets serve."""
        return Shape(conversations=self.conversations)


QUICK = Sizes(18, 2, 102, 3, 150)


def run(*, quick: bool = False) -> Report:
    """The whole benchmark, two minutes; `quick` half a minute."""
    sizes = QUICK if quick else Sizes()
    stated = conditions(
        workers=WORKERS, block_size=BLOCK, kv_blocks_of_a_worker=KV_BLOCKS, prefill_tokens_per_second=1e6 / ROW_US,
        step_ms=STEP_MS, conversations_of_a_block=sizes.conversations, pairs_of_blocks=sizes.talk_blocks,
        turns=sizes.shape.turns, lanes=sizes.shape.lanes, system_tokens=sizes.shape.system_tokens,
        think_ms=sizes.shape.think_ms,
    )  # fmt: skip
    with own_redis() as one, own_redis() as other:
        report = asyncio.run(_measure(one.url, other.url, sizes))
    report.conditions = {**stated, "load_average_after": load_average()}
    return report


async def _measure(prefix_url: str, load_url: str, sizes: Sizes) -> Report:
    async with _fleet(prefix_url, "prefix") as prefix, _fleet(load_url, "load") as load:
        shorts = await _short(prefix, load, sizes)
        serial = await _serial(prefix_url, prefix, sizes)
        routed, loaded = await _talk(prefix, load, sizes)
    best = oracle(routed)
    figures = {
        "prefix": _shown(routed),
        "least_loaded": _shown(loaded),
        "oracle_cached_share": round(best, 4),
        "serial": serial,
        "short_prompts": {name: spread([s for block in found for s in block]) for name, found in shorts.items()},
    }
    return Report("routing", {}, figures, _targets(routed, loaded, best, serial, shorts))


def _targets(
    routed: Measured, loaded: Measured, best: float, serial: dict[str, int], shorts: dict[str, list[list[float]]]
) -> list[Target]:
    p95 = percentile(routed.seconds, 0.95) / percentile(loaded.seconds, 0.95)
    short = median_ratio(shorts["prefix"], shorts["least_loaded"])
    enough = sum(map(len, shorts["prefix"])) >= SHORT_ENOUGH
    equal = serial["predicted_equal"] / max(1, serial["predicted"])
    return [
        target("cached_share_of_oracle", routed.cached_share / best, "ratio", f">= {SHARE_GOAL}"),
        target("predicted_equal", equal, "share", f">= {EQUAL_GOAL}", enough=serial["predicted"] >= SERIAL_ENOUGH),
        target("p95_vs_least_loaded", p95, "ratio", "<= 0.7"),
        target("short_vs_least_loaded", short, "ratio", "<= 1.03", enough=enough),
    ]


def _shown(found: Measured) -> dict[str, Any]:
    share = {name: found.workers.count(name) for name in sorted(set(found.workers))}
    return {**spread(found.seconds), "p95_ms": round(percentile(found.seconds, 0.95) * 1000, 3),
            "cached_share": round(found.cached_share, 4), "starts": share}  # fmt: skip


def oracle(found: Measured) -> float:
    """The cached share of one cache as large as all of them, asked in the order of the first verdicts."""
    cache = FakeBlockCache(WORKERS * KV_BLOCKS, BLOCK)
    cached = 0
    for number, prompt in enumerate(found.prompts):
        cached += cache.cached(prompt, "")
        cache.computed(found.whole[number][:-1], "")  # the last token is never computed
    return cached / sum(map(len, found.prompts))


# --- the phases --------------------------------------------------------------------------------------------------


@asynccontextmanager
async def _fleet(url: str, routing: Routing) -> AsyncIterator[Client]:
    """WORKERS workers that route in one way, and a client of theirs."""
    model = f"kv_blocks={KV_BLOCKS},block_size={BLOCK},row_us={ROW_US},step_ms={STEP_MS}"
    async with AsyncExitStack() as stack:
        for n in range(WORKERS):
            spec = WorkerSpec(url, EngineSpec("fake", model), name=f"w{n}", routing=routing)
            await stack.enter_async_context(worker(spec))
        yield await stack.enter_async_context(client(url, TARGET_ID))


async def _short(prefix: Client, load: Client, sizes: Sizes) -> dict[str, list[list[float]]]:
    found: dict[str, list[list[float]]] = {"prefix": [], "least_loaded": []}
    for n in range(sizes.short_blocks):
        order = [("prefix", prefix), ("least_loaded", load)]
        for name, one in order if n % 2 else reversed(order):
            found[name].append((await short_prompts(one, sizes.short_prompts, 6, n)).seconds)
    return found


async def _talk(prefix: Client, load: Client, sizes: Sizes) -> tuple[Measured, Measured]:
    routed, loaded = Measured(), Measured()
    for n in range(sizes.talk_blocks):
        order = [(prefix, routed), (load, loaded)]
        for one, into in order if n % 2 else reversed(order):
            await talk(one, sizes.shape, n + 1, into)
    return routed, loaded


async def _serial(url: str, one: Client, sizes: Sizes) -> dict[str, int]:
    """One session start at a time; what the workers say of their predictions."""
    await asyncio.sleep(BEATS_SECONDS)
    before = await _predictions(url)
    shape = replace(
        sizes.shape,
        conversations=sizes.serial,
        lanes=1,
        think_ms=0.0,
        user_tokens=(16, 40),
        answer_tokens=2,
        systems_seed=2,
    )
    await talk(one, shape, 0, Measured())
    await asyncio.sleep(BEATS_SECONDS)
    after = await _predictions(url)
    return {name: after[name] - before[name] for name in after}


async def _predictions(url: str) -> dict[str, int]:
    names = ("predicted", "predicted_equal", "passed_on", "kept", "stolen")
    async with connect(url) as redis:
        beats: list[dict[bytes, bytes]] = [
            await redis.hgetall(keys.beat(TARGET_ID, f"w{n}"))  # type: ignore[misc]  # typed as sync or async
            for n in range(WORKERS)
        ]
    return {name: sum(int(beat.get(name.encode(), 0)) for beat in beats) for name in names}
