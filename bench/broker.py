"""`bench broker`: what a round costs on the queue, with everything real but the engine.

The worker (`noop_worker.py`) and the edge (`broker_edge.py`) run the product's own code in two processes, against a
bare stream echo in blocks that alternate (so that noise hits both), and against stock arq. Messages have real sizes.
`broker_phases.py` measures; this sets sizes and judges.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from pilotfish.bench import broker_edge, broker_phases
from pilotfish.bench.broker_phases import RTT_MS, Blocks
from pilotfish.bench.children import own_redis
from pilotfish.bench.conditions import conditions, load_average
from pilotfish.bench.report import Report, Target, target
from pilotfish.bench.stats import median_ratio, percentile, spread
from pilotfish.cli.redis_server import PrivateRedis

ROUNDS_ENOUGH, WAN_ENOUGH, IDLE_SECONDS_ENOUGH = 1000, 20, 5.0


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much of everything one run measures. Rounds are per block; a pair is one block of echo and one of ours."""

    pairs: int = 8
    rounds_1: int = 400
    rounds_16: int = 1600
    wan_rounds: int = 80
    idle_seconds: float = 10.0
    arq_rounds: int = 8
    arq_fast_rounds: int = 150


QUICK = Sizes(4, 300, 800, 30, 5.0, 3, 50)


def run(*, quick: bool = False) -> Report:
    """The whole benchmark, about a minute and a half; `quick` about half a minute."""
    sizes = QUICK if quick else Sizes()
    with own_redis() as server:
        return asyncio.run(_measure(server, sizes))


async def _measure(server: PrivateRedis, sizes: Sizes) -> Report:
    stated = _conditions(server, sizes)
    blocks = await broker_phases.against_echo(server.url, sizes.pairs, sizes.rounds_1, sizes.rounds_16)
    with broker_phases.noop_worker(server.url) as worker:
        idle = await broker_phases.idle_cpu(server.url, worker, sizes.idle_seconds)
        wan, ping = await broker_phases.over_wan(server.url, sizes.wan_rounds)
    arq = await broker_phases.stock_arq(server.url, sizes.arq_rounds, sizes.arq_fast_rounds)
    figures = _figures(blocks) | {
        "wan": {"rtt_ms": RTT_MS, "ping": spread(ping), "ours": spread(wan)},
        "idle_cpu_percent": round(idle, 3),
        "stock_arq": {name: found.shown() for name, found in arq.items()},
    }
    stated["load_average_after"] = load_average()
    return Report("broker", stated, figures, _targets(blocks, wan, idle, sizes))


def _conditions(server: PrivateRedis, sizes: Sizes) -> dict[str, Any]:
    return conditions(
        redis_server=server.server.partition(" (")[0], pairs_of_blocks=sizes.pairs, draft_tokens=broker_edge.K,
        prompt_tokens=broker_edge.PROMPT_TOKENS, tail_tokens=broker_edge.TAIL_TOKENS,
        rounds_per_session=broker_edge.ROUNDS_PER_SESSION, **broker_phases.message_bytes(),
    )  # fmt: skip


def _figures(blocks: Blocks) -> dict[str, Any]:
    rounds = {f"{name}_{in_flight}_in_flight": found.shown() for (name, in_flight), found in blocks.items()}
    return {**rounds, "p50_ratio_to_echo_16": round(_ratio(blocks, 16), 3)}


def _ratio(blocks: Blocks, in_flight: int) -> float:
    return median_ratio(blocks["ours", in_flight].seconds, blocks["echo", in_flight].seconds)


def _targets(blocks: Blocks, wan: list[float], idle: float, sizes: Sizes) -> list[Target]:
    one, many = blocks["ours", 1], blocks["ours", 16]
    enough = len(one.all) >= ROUNDS_ENOUGH
    return [
        target("p50_ratio_to_echo", _ratio(blocks, 1), "ratio", "<= 1.4", enough=enough),
        target("p99_ms", percentile(one.all, 0.99) * 1000, "ms", "<= 3", enough=enough),
        target("commands_per_round", max(one.commands_per_round, many.commands_per_round), "commands", "<= 10",
               enough=enough),
        target("wan_rtts", percentile(wan, 0.5) * 1000 / RTT_MS, "RTT", "<= 1.1", enough=len(wan) >= WAN_ENOUGH),
        target("idle_cpu_percent", idle, "%", "< 1", enough=sizes.idle_seconds >= IDLE_SECONDS_ENOUGH),
    ]  # fmt: skip
