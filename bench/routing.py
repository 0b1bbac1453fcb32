"""`bench routing`: prefix-aware routing against least-loaded, with three workers and conversations that share prompts.

Everything is the product's but the engine: the fake one pretends a prefix cache of its own (same block names, LRU) and
a prefill that takes time by the row. The oracle is one cache as large as all workers' together that sees every request:
no routing can reuse more. Two fleets, one for each way to route, stand side by side on Redis servers of their own;
they take turns, block by block, so that a machine that slows down slows down both. The first block meets the shared
prompts cold, however it is routed, and those few starts would be its 95th percentile: times are those of later blocks.
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
from pilotfish.cloud_worker.worker_process import WorkerSpec
from pilotfish.protocol import fleet, keys
from pilotfish.protocol.broker import connect

WORKERS: Final = 3
BLOCK: Final = 16
KV_BLOCKS: Final = 500  # of one worker: together they hold the conversations that go on, alone not the half of them
ROW_US: Final = 100.0  # 10,000 tokens/s
STEP_MS: Final = 2.0
TARGET_ID: Final = fleet.target_id(FakeVerifier().info.fingerprint)
BEATS_SECONDS: Final = 2 * keys.BEAT_EVERY_MS / 1000  # counts come with the workers' next beats
SHARE_GOAL, EQUAL_GOAL, P95_GOAL = 0.95, 0.999, 0.7
SERIAL_ENOUGH, SHORT_ENOUGH = 1_000, 2_000
P95_PAIRS, P95_TURNS = 4, 400  # twenty turns beyond the percentile, and blocks enough for one of them to be disturbed


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much one run measures."""

    conversations: int = 24  # of a block
    talk_blocks: int = 7  # pairs, the cold one first
    serial: int = 150  # conversations one after the other
    short_blocks: int = 48  # pairs, many and short: what slows a machine down lasts longer than one
    short_prompts: int = 100  # of a block

    @property
    def shape(self) -> Shape:
        """Of one block of the trace that both fleets serve."""
        return Shape(conversations=self.conversations)


QUICK = Sizes(12, 5, 102, 2, 60)


def run(*, quick: bool = False) -> Report:
    """The whole benchmark, three minutes; `quick` three quarters of one."""
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


Blocks = list[Measured]  # of one fleet, in the order it served them


def _targets(
    routed: Blocks, loaded: Blocks, best: float, serial: dict[str, int], shorts: dict[str, list[list[float]]]
) -> list[Target]:
    warm, rival = _warm(routed), _warm(loaded)
    turns = sum(map(len, warm))
    short = median_ratio(shorts["prefix"], shorts["least_loaded"])
    enough = sum(map(len, shorts["prefix"])) >= SHORT_ENOUGH
    equal = serial["predicted_equal"] / max(1, serial["predicted"])
    return [
        target("cached_share_of_oracle", cached_share(routed) / best, "ratio", f">= {SHARE_GOAL}"),
        target("predicted_equal", equal, "share", f">= {EQUAL_GOAL}", enough=serial["predicted"] >= SERIAL_ENOUGH),
        target("p95_vs_least_loaded", median_ratio(warm, rival, 0.95), "ratio", f"<= {P95_GOAL}",
               enough=len(warm) >= P95_PAIRS and turns >= P95_TURNS),
        target("short_vs_least_loaded", short, "ratio", "<= 1.03", enough=enough),
    ]  # fmt: skip


def _warm(found: Blocks) -> list[list[float]]:
    """The times of each block but the cold one."""
    return [block.seconds for block in found[1:] or found]


def _shown(found: Blocks) -> dict[str, Any]:
    warm = _warm(found)
    served = [name for block in found for name in block.workers]
    return {
        **spread([seconds for block in warm for seconds in block]),
        "p95_ms_of_blocks": [round(percentile(block, 0.95) * 1000, 3) for block in warm],
        "cached_share": round(cached_share(found), 4),
        "starts": {name: served.count(name) for name in sorted(set(served))},
    }


def cached_share(found: Blocks) -> float:
    """Of all prompt tokens, those the engines did not compute."""
    return sum(sum(block.cached) for block in found) / _prompt_tokens(found)


def oracle(found: Blocks) -> float:
    """The cached share of one cache as large as all of them, asked in the order of the first verdicts."""
    cache = FakeBlockCache(WORKERS * KV_BLOCKS, BLOCK)
    cached = 0
    for block in found:
        for number, prompt in enumerate(block.prompts):
            cached += cache.cached(prompt, "")
            cache.computed(block.whole[number][:-1], "")  # the last token is never computed
    return cached / _prompt_tokens(found)


def _prompt_tokens(found: Blocks) -> int:
    return sum(len(prompt) for block in found for prompt in block.prompts)


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


async def _talk(prefix: Client, load: Client, sizes: Sizes) -> tuple[Blocks, Blocks]:
    routed: Blocks = []
    loaded: Blocks = []
    for n in range(sizes.talk_blocks):
        order = [(prefix, routed), (load, loaded)]
        for one, into in order if n % 2 else reversed(order):
            into.append(Measured())
            await talk(one, sizes.shape, n + 1, into[-1])
    return routed, loaded


async def _serial(url: str, one: Client, sizes: Sizes) -> dict[str, int]:
    """One session start at a time; what the workers say of their predictions."""
    await asyncio.sleep(BEATS_SECONDS)
    before = await _predictions(url)
    shape = replace(
        sizes.shape,
        conversations=sizes.serial,
        system_tokens=20 * BLOCK,
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
