"""`bench index`: what the prefix index costs in memory, per lookup, and when a worker dies.

Eight workers hold blocks of their own and prefixes of common conversations; a lookup asks for one conversation of 1,000
blocks and is the real one, reservation included. llm-d's and AIBrix's layouts (`index_peers.py`) hold the same on a
Redis of their own, one after the other. Redis' own time (commandstats) stands beside the round trip: it does not depend
on the client, and it is what everybody else waits for.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Final

import redis as sync_redis

from pilotfish.bench.children import own_redis
from pilotfish.bench.conditions import conditions, load_average
from pilotfish.bench.index_peers import AIBrix, LlmD, Peer
from pilotfish.bench.report import Report, Target, target
from pilotfish.bench.stats import percentile, spread
from pilotfish.cache.prefix_index import BATCH_BLOCKS, PrefixIndex, Share, buckets_for
from pilotfish.protocol.broker import connect

WORKERS: Final = 8
BLOCKS_OF_A_WORKER: Final = 125_000
PREFIX_BLOCKS: Final = 1_000
CONVERSATIONS: Final = 8
BLOCK_TOKENS: Final = 32
TARGET_ID: Final = "0" * 16
LEASE_MS: Final = 600_000  # nobody beats here
PEERS: Final[dict[str, Callable[[sync_redis.Redis], Peer]]] = {"llm_d": LlmD, "aibrix": AIBrix}


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much one run measures; ours always holds a million entries."""

    lookups: int = 10_000
    peer_lookups: int = 500
    peer_blocks: int = BLOCKS_OF_A_WORKER  # of a worker


QUICK = Sizes(2_000, 100, 12_500)


@dataclass(frozen=True, slots=True)
class World:
    """What workers hold: `held[w]` in the order it was stored."""

    held: list[list[bytes]]
    conversations: list[list[bytes]]

    @property
    def entries(self) -> int:
        """(block, worker) pairs."""
        return sum(map(len, self.held))


def world(blocks: int) -> World:
    """Every worker holds the first part of every conversation, of random length, and blocks nobody else has."""
    rng = random.Random(6)
    talks = [[rng.randbytes(8) for _ in range(PREFIX_BLOCKS)] for _ in range(CONVERSATIONS)]
    held = []
    for _ in range(WORKERS):
        known = [block for talk in talks for block in talk[: rng.randrange(PREFIX_BLOCKS)]]
        held.append([*known, *(rng.randbytes(8) for _ in range(blocks - len(known)))])
    return World(held, talks)


def name(worker: int) -> str:
    """A worker's name, as long as real ones."""
    return f"vllm-{worker:06x}"


def run(*, quick: bool = False) -> Report:
    """The whole benchmark, two minutes; `quick` half a minute."""
    sizes = QUICK if quick else Sizes()
    stated = conditions(
        ("hiredis",), workers=WORKERS, blocks_of_a_worker=BLOCKS_OF_A_WORKER, prefix_blocks=PREFIX_BLOCKS,
        peers_blocks_of_a_worker=sizes.peer_blocks, lookups=sizes.lookups,
    )  # fmt: skip
    with own_redis() as server:
        stated["redis_server"] = server.server.partition(" (")[0]
        ours = asyncio.run(_ours(server.url, sizes))
    figures: dict[str, Any] = {"ours": ours}
    for peer, opened in PEERS.items():
        with own_redis() as server, sync_redis.Redis.from_url(server.url) as client:
            figures[peer] = _peer(client, opened(client), sizes)
    stated["load_average_after"] = load_average()
    return Report("index", stated, figures, _targets(ours, sizes))


def _targets(ours: dict[str, Any], sizes: Sizes) -> list[Target]:
    enough = sizes.lookups >= 1_000
    return [
        target("mb_per_million", ours["mb_per_million"], "MB", "<= 12"),
        target("p50_ms", ours["lookup"]["p50_ms"], "ms", "<= 0.6", enough=enough),
        target("p99_ms", ours["lookup"]["p99_ms"], "ms", "<= 1.5", enough=enough),
        target("reap_ms", ours["reap"]["redis_ms"], "ms", "<= 5"),
    ]


# --- ours --------------------------------------------------------------------------------------------------------


async def _ours(url: str, sizes: Sizes) -> dict[str, Any]:
    here = world(BLOCKS_OF_A_WORKER)
    async with connect(url) as client:
        index = PrefixIndex(client, TARGET_ID, lease_ms=LEASE_MS)
        empty, started = (await client.info("memory"))["used_memory"], perf_counter()
        shares = [await fill(index, name(w), blocks) for w, blocks in enumerate(here.held)]
        filled = perf_counter() - started
        memory = (await client.info("memory"))["used_memory"] - empty
        await client.config_resetstat()
        lookups = await _lookups(index, here, sizes.lookups)
        in_redis = _redis_ms(await client.info("commandstats")) / sizes.lookups
        reaped = await _reap(index, client, shares[0])
    return {
        "entries": here.entries,
        "mb_per_million": round(memory / here.entries, 3),
        "publish_seconds_per_100k": round(filled / here.entries * 100_000, 3),
        "lookup": {**spread(lookups), "redis_ms": round(in_redis, 4)},
        "reap": {"entries": len(here.held[0]), **reaped},
    }


async def fill(index: PrefixIndex, worker: str, blocks: Sequence[bytes]) -> Share:
    """Register a worker and publish what it holds."""
    share = await index.register(worker, buckets_for(len(blocks)))
    for start in range(0, len(blocks), BATCH_BLOCKS):
        await index.publish(share, blocks[start : start + BATCH_BLOCKS])
    return share


async def _lookups(index: PrefixIndex, here: World, count: int) -> list[float]:
    seconds = []
    for i in range(count + 50):
        talk = here.conversations[i % CONVERSATIONS]
        started = perf_counter()
        await index.route(name(i % WORKERS), len(talk) * BLOCK_TOKENS, BLOCK_TOKENS, talk)
        seconds.append(perf_counter() - started)
    return seconds[50:]  # without the warm-up


async def _reap(index: PrefixIndex, client: Any, share: Share) -> dict[str, Any]:
    """One worker dies; what its removal costs Redis, in all and by the longest call."""
    await index.leave(share)
    calls: list[float] = []
    left = 1
    while left:
        await client.config_resetstat()
        left = await index.reap()
        calls.append(_redis_ms(await client.info("commandstats")))
    return {"redis_ms": round(sum(calls), 4), "longest_call_ms": round(max(calls), 4), "calls": len(calls)}


# --- the others --------------------------------------------------------------------------------------------------


def _peer(client: sync_redis.Redis, peer: Peer, sizes: Sizes) -> dict[str, Any]:
    here = world(sizes.peer_blocks)
    empty = client.info("memory")["used_memory"]  # type: ignore[index]  # typed as sync or async
    for w, blocks in enumerate(here.held):
        peer.fill(name(w), blocks)
    memory = client.info("memory")["used_memory"] - empty  # type: ignore[index]
    client.config_resetstat()
    seconds = []
    for i in range(sizes.peer_lookups):
        started = perf_counter()
        peer.lookup(here.conversations[i % CONVERSATIONS])
        seconds.append(perf_counter() - started)
    in_redis = _redis_ms(client.info("commandstats")) / sizes.peer_lookups
    client.config_resetstat()
    peer.drop(name(0))
    dropped = _redis_ms(client.info("commandstats"))
    return {
        "entries": here.entries,
        "mb_per_million": round(memory / here.entries, 3),
        "lookup": {**spread(seconds), "p50_ms": percentile(seconds, 0.5) * 1000, "redis_ms": round(in_redis, 4)},
        "reap": {"redis_ms": round(dropped, 3)} if dropped else {"waits_seconds": 120},
    }


def _redis_ms(stats: Any) -> float:
    """Time Redis spent in commands; a script's own commands are in its EVALSHA."""
    outer = ("evalsha", "eval", "mget", "hkeys", "hdel", "scan")
    return float(sum(stats[key]["usec"] for key in (f"cmdstat_{each}" for each in outer) if key in stats)) / 1000
