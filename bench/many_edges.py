"""`bench load`: 256 edges on one Redis, workers with a 20 ms engine; overload, and a flood from one tenant.

Everything is real but the engine, which takes 20 ms a step and computes nothing; the edges speak raw commands
(`load_edges.py`). Overhead is the time from the edge's XADD to its answer without the engine's own, as the verdict
tells it. On two cores Redis, the worker, its engine and all edges share what there is: the CPU seconds of each per
job are figures, since they say where more cores would go.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final

import redis as sync_redis

from pilotfish.bench.children import Child, child, own_redis
from pilotfish.bench.conditions import conditions, load_average
from pilotfish.bench.load_edges import ROWS, TARGET, Tenant
from pilotfish.bench.report import Report, Target, target
from pilotfish.bench.stats import percentile, spread
from pilotfish.protocol import keys
from pilotfish.protocol.quota import Quota

STEP_MS: Final = 20
ENGINE: Final = f"step_ms={STEP_MS}"
EDGES: Final = 256
THINK_SECONDS: Final = 0.5  # of an edge between two rounds: eight tokens at 60 ms
WIDE: Final = 256  # places of a worker that is not to be the limit
NARROW: Final = 4  # places of one that is: its engine is the limit then, and not two cores
WARM_UP_SECONDS: Final = 0.7
LATENCIES_ENOUGH: Final = 1_000
SETTLED_SECONDS: Final = 6.0  # the last answer comes within
FLOOD: Final = 4.0  # times its quota


@dataclass(frozen=True, slots=True)
class Sizes:
    """Seconds of each phase."""

    calm: float = 10.0
    growth: float = 5.0
    overload: float = 10.0
    flood: float = 4.0
    flood_blocks: int = 4


QUICK: Final = Sizes(5.0, 2.0, 5.0, 2.0, 2)


def run(*, quick: bool = False) -> Report:
    """About a minute and a half; `quick` about half a minute."""
    return asyncio.run(_measure(QUICK if quick else Sizes()))


async def _measure(sizes: Sizes) -> Report:
    stated = conditions(engine=ENGINE, edges=EDGES, think_seconds=THINK_SECONDS, rows_per_job=ROWS)
    calm = await _calm(sizes.calm)
    growth = {str(count): await _growth(count, sizes.growth) for count in (1, 2, 4)}
    overload = await _overload(growth["1"]["jobs_per_second"], sizes.overload)
    flood = await _flood(sizes.flood, sizes.flood_blocks)
    stated["redis_server"] = calm.pop("redis_server")
    stated["load_average_after"] = load_average()
    figures = {"calm": calm, "growth": growth, "overload": overload, "flood": flood}
    return Report("load", stated, figures, _targets(figures))


def _targets(figures: dict[str, Any]) -> list[Target]:
    calm, growth, overload, flood = (figures[name] for name in ("calm", "growth", "overload", "flood"))
    enough = calm["overhead"]["n"] >= LATENCIES_ENOUGH
    grown = growth["4"]["jobs_per_second"] / growth["1"]["jobs_per_second"]
    unanswered = sum(phase["unanswered"] for phase in (calm, *growth.values(), overload, flood))  # a deaf edge's too
    return [
        target("p50_ms", calm["overhead"]["p50_ms"], "ms", "<= 5", enough=enough),
        target("p99_ms", calm["overhead"]["p99_ms"], "ms", "<= 20", enough=enough),
        target("jobs_per_second", calm["jobs_per_redis_core"], "jobs/s per Redis core", ">= 4000"),
        target("growth_4_workers", grown, "x", ">= 3"),
        target("starved", overload["starved"], "tenants", "== 0"),
        target("unanswered", unanswered, "jobs", "== 0"),
        target("flood_p95_ratio", flood["p95_ratio"], "x", "<= 1.1", enough=len(flood["blocks"]) >= 4),
    ]


# --- what is running -----------------------------------------------------------------------------------------


@dataclass(slots=True)
class Bench:
    """One Redis with its workers, and what each has used of the processor."""

    url: str
    control: sync_redis.Redis
    workers: list[Child]

    def cpu(self) -> dict[str, float]:
        """CPU seconds so far."""
        told = self.control.info("cpu")
        redis = float(told["used_cpu_user"]) + float(told["used_cpu_sys"])  # type: ignore[index]
        engines = [pid for worker in self.workers for pid in _children(worker.pid)]
        workers = sum(_cpu_seconds(worker.pid) for worker in self.workers)
        return {"redis": redis, "workers": workers, "engines": sum(map(_cpu_seconds, engines)),
                "edges": time.process_time()}  # fmt: skip


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@asynccontextmanager
async def _bench(workers: int, places: int, tenants: Sequence[Tenant], **quotas: Quota) -> AsyncIterator[Bench]:
    """Redis, workers that serve these tenants, and every edge connected."""
    with ExitStack() as stack:
        server = stack.enter_context(own_redis())
        control = stack.enter_context(sync_redis.Redis.from_url(server.url))
        control.sadd(keys.TENANTS, *(tenant.name for tenant in tenants))
        for name, quota in quotas.items():
            control.hset(keys.QUOTAS, name, quota.text())
        environment = {"REDIS_URL": server.url}
        names = (f"load-{number}" for number in range(workers))
        running = [
            stack.enter_context(child("load_worker", name, ENGINE, str(places), environment=environment))
            for name in names
        ]
        async with AsyncExitStack() as edges:
            for tenant in tenants:
                await tenant.open(server.url)
                edges.callback(tenant.close)
            yield Bench(server.url, control, running)


async def _counted(bench: Bench, tenants: Sequence[Tenant], seconds: float) -> dict[str, Any]:
    """Let everyone run; what was answered within `seconds`, after warming up, and its cost; then all come to rest."""
    for tenant in tenants:
        tenant.begin()
    await asyncio.sleep(WARM_UP_SECONDS)
    for tenant in tenants:
        tenant.begin()
    before, done, since = bench.cpu(), _verdicts(tenants), time.monotonic()
    await asyncio.sleep(seconds)
    lasted, after, answered = time.monotonic() - since, bench.cpu(), _verdicts(tenants) - done
    used = {name: after[name] - before[name] for name in after}
    return {
        "unanswered": await _unanswered(tenants),
        "jobs_per_second": round(answered / lasted, 1),
        "jobs_per_redis_core": round(answered / max(0.01, used["redis"]), 1),
        "cpu_ms_per_job": {name: round(1000 * spent / max(1, answered), 4) for name, spent in used.items()},
        "cores_busy": round(sum(used.values()) / lasted, 2),
    }


def _verdicts(tenants: Sequence[Tenant]) -> int:
    return sum(tenant.answered["verdict"] for tenant in tenants)


# --- phases --------------------------------------------------------------------------------------------------


async def _calm(seconds: float) -> dict[str, Any]:
    """256 edges of four tenants that draft in between; one worker with room for all of them."""
    tenants = [Tenant(f"t{number}", EDGES // 4, THINK_SECONDS) for number in range(4)]
    async with _bench(1, WIDE, tenants) as bench:
        found = await _counted(bench, tenants, seconds)
        latency = [value for tenant in tenants for value in tenant.seen.latency]
        overhead = [value for tenant in tenants for value in tenant.seen.overhead]
        found["redis_server"] = str(bench.control.info("server")["redis_version"])  # type: ignore[index]
    return {**found, "latency": spread(latency), "overhead": spread(overhead)}


async def _growth(workers: int, seconds: float) -> dict[str, Any]:
    """Everyone asks at once and again: jobs a second of workers whose engines are the limit."""
    tenants = [Tenant(f"t{number}", EDGES // 4, 0.0) for number in range(4)]
    async with _bench(workers, NARROW, tenants) as bench:
        return await _counted(bench, tenants, seconds)


async def _overload(capacity: float, seconds: float) -> dict[str, Any]:
    """Twice what the worker of `_growth` served, most of it from one tenant; one job in ten may wait 0.4 s only."""
    offered = {"large": 1.4 * capacity, "middle": 0.4 * capacity, "small": 0.2 * capacity}
    tenants = {name: Tenant(name, 64) for name in offered}
    async with _bench(1, NARROW, list(tenants.values())) as bench:
        lanes = [
            tenants[name].flood(share * rate, seconds, deadline_ms=deadline)
            for name, rate in offered.items()
            for share, deadline in ((0.9, 30_000), (0.1, 400))
        ]
        await asyncio.gather(*lanes)
        unanswered = await _unanswered(list(tenants.values()))
        left = bench.control.xlen(keys.jobs(TARGET, "large"))
    shown = {name: _fate(tenant, offered[name]) for name, tenant in tenants.items()}
    share = _verdicts(list(tenants.values())) / len(tenants)
    starved = sum(fate["verdict"] < 0.8 * min(0.9 * fate["sent"], share) for fate in shown.values())
    about = {
        "offered_over_capacity": 2.0,
        "capacity_per_second": capacity,
        "equal_share": round(share, 1),
        "starved": starved,
        "unanswered": unanswered,
        "left_in_stream": left,
    }
    return {**about, "tenants": shown}


def _fate(tenant: Tenant, offered: float) -> dict[str, Any]:
    codes = dict(tenant.seen.codes)
    waited = round(1000 * percentile(tenant.seen.latency, 0.95), 1) if tenant.seen.latency else None
    return {"offered_per_second": round(offered, 1), "sent": tenant.seen.sent, "verdict": 0, **codes, "p95_ms": waited}


async def _unanswered(tenants: Sequence[Tenant]) -> int:
    """Nobody sends any more: what is still owed then will never come, or there is nobody left who would hear it."""
    for tenant in tenants:
        tenant.stop()
    await _settled(tenants)
    return sum(tenant.owed for tenant in tenants)


async def _settled(tenants: Sequence[Tenant]) -> None:
    """Until nobody is owed anything."""
    loop = asyncio.get_running_loop()
    until = loop.time() + SETTLED_SECONDS
    while any(tenant.owed for tenant in tenants) and loop.time() < until:  # noqa: ASYNC110  # nobody says when
        await asyncio.sleep(0.05)


async def _flood(seconds: float, blocks: int) -> dict[str, Any]:
    """A steady tenant beside one with a quota, that keeps to it, and asks for FLOOD times as much, in turns."""
    granted = 100.0  # jobs a second
    steady, loud = Tenant("steady", EDGES // 2, THINK_SECONDS), Tenant("loud", EDGES // 2)
    found: list[dict[str, Any]] = []
    async with _bench(1, WIDE, [steady, loud], loud=Quota(rows_per_second=granted * ROWS)):
        steady.begin()
        await loud.flood(0.8 * granted, WARM_UP_SECONDS)
        for _ in range(blocks):
            found.append({"without": await _block(steady, loud, 0.8 * granted, seconds),
                          "with": await _block(steady, loud, FLOOD * granted, seconds)})  # fmt: skip
            await _settled([loud])
        unanswered = await _unanswered([steady, loud])
    ratios = [pair["with"]["p95_ms"] / pair["without"]["p95_ms"] for pair in found]
    about = {"p95_ratio": round(median(ratios), 3), "quota_per_second": granted, "unanswered": unanswered}
    return {**about, "blocks": found}


async def _block(steady: Tenant, loud: Tenant, per_second: float, seconds: float) -> dict[str, Any]:
    steady.begin()
    loud.begin()
    await loud.flood(per_second, seconds)
    latency = spread(steady.seen.latency)
    latency["p95_ms"] = round(1000 * percentile(steady.seen.latency, 0.95), 2)
    return {"p95_ms": latency["p95_ms"], "p50_ms": latency["p50_ms"], "n": latency["n"], "loud": dict(loud.seen.codes)}
