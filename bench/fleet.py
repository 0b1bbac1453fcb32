"""`bench fleet`: from 10 to 100,000 edges on paper, by costs measured in the same run, and held against real fleets.

A small real fleet gives what a round costs Redis, worker and engine (`fleet_costs.py`); a simulation of queues and
batches (`fleet_model.py`) says what more edges would do: where each part saturates, how many Redis and workers keep all
of them below 70 %, what to shard first. The prediction is compared with real fleets that the costs were not taken of.
"""

from __future__ import annotations

import asyncio
from dataclasses import asdict, replace
from typing import Any, Final

from pilotfish.bench.conditions import conditions, load_average
from pilotfish.bench.fleet_costs import CALIBRATED_AT, Measured, Presence, calibrate
from pilotfish.bench.fleet_model import BUSY_SHARE, PARTS, Costs, Fleet, Outcome, saturation, simulate, sized
from pilotfish.bench.report import Report, target
from pilotfish.protocol import cores

EDGES: Final = (10, 100, 1_000, 10_000, 100_000)
QUICK_EDGES: Final = (10, 100, 1_000, 10_000)
REAL_EDGES: Final = (2, 4, 16, 32)
QUICK_REAL_EDGES: Final = (4, 16)
SECONDS, QUICK_SECONDS = 4.0, 1.5
RTT_MS: Final = 40.0
ENGINES_MS: Final = (None, 20.0)  # steps: the fake engine's as measured; a large target's, as `bench load` has it
MAXCLIENTS: Final = 10_000  # Redis' default


def run(*, quick: bool = False) -> Report:
    """Measure, hold the model against it, simulate."""
    seconds, at = (QUICK_SECONDS, QUICK_REAL_EDGES) if quick else (SECONDS, REAL_EDGES)
    costs, there, real = asyncio.run(calibrate(seconds, at))
    checks = [check(costs, one) for one in real]
    apart = replace(costs, host_ms=0.0)  # devices of their own, far away
    tables = {
        name: table(priced, QUICK_EDGES if quick else EDGES) for name, priced in engines(apart).items()
    }  # fmt: skip
    stated = conditions(
        engine="fake", rtt_ms=RTT_MS, calibrated_at=CALIBRATED_AT, seconds=seconds, load_average_after=load_average()
    )
    figures = {
        "costs": {name: round(value, 4) for name, value in asdict(costs).items()},
        "commands_per_round": {str(one.edges): round(one.commands, 1) for one in real},
        "edge_at_rest": {name: round(value, 3) for name, value in asdict(there).items()},
        "against_real_fleets": checks, **tables, "shard_first": advice(engines(apart), there),
    }  # fmt: skip
    worst = max((abs(one["error"]) for one in checks if one["counts"]), default=None)
    aims = [target("prediction_error", worst, "of measured rounds/s, the worst", "<= 0.2", enough=not quick)]
    return Report("fleet", stated, figures, aims)


def check(costs: Costs, real: Measured) -> dict[str, Any]:
    """What the model says of a real fleet on this machine, where one process plays all the edges.

    It knows queues and no processor that all of them share: a fleet that fills the machine is shown and does not count.
    """
    said = simulate(costs, Fleet(real.edges))
    return {
        "edges": real.edges, "measured_rounds_per_s": round(real.rounds_per_s, 1),
        "predicted_rounds_per_s": round(said.rounds_per_s, 1),
        "error": round(said.rounds_per_s / real.rounds_per_s - 1, 3), "busiest": said.limit,
        "cores_used": round(real.cores, 2), "counts": real.cores <= BUSY_SHARE * len(cores.available()),
    }  # fmt: skip


def engines(costs: Costs) -> dict[str, Costs]:
    """The same fleet with each engine."""
    return {
        f"engine_{priced.step_ms:.0f}_ms": priced
        for priced in (costs if ms is None else replace(costs, step_ms=ms) for ms in ENGINES_MS)
    }


def table(costs: Costs, counts: tuple[int, ...]) -> dict[str, Any]:
    """Where one of each part saturates; for each number of edges, one of everything and a fleet of the right size."""
    return {
        "edges_at_which_one_saturates": saturation(costs, RTT_MS),
        "one_of_each": {str(edges): told(costs, Fleet(edges, rtt_ms=RTT_MS)) for edges in counts},
        "sized": {str(edges): told(costs, sized(costs, edges, RTT_MS)) for edges in counts},
    }


def told(costs: Costs, fleet: Fleet) -> dict[str, Any]:
    """A row; where Redis has no time left for jobs, that is all."""
    size = {"workers": fleet.workers, "redis": fleet.shards}
    try:
        found: Outcome = simulate(costs, fleet)
    except ValueError as error:
        return {**size, "why": str(error)}
    busy = {part: round(found.busy[part], 2) for part in PARTS}
    return {
        **size, "tokens_per_s": round(found.tokens_per_s), "p50_ms": round(found.p50_ms, 1),
        "p99_ms": round(found.p99_ms, 1), "busy": busy, "busiest": found.limit,
    }  # fmt: skip


def advice(priced: dict[str, Costs], there: Presence) -> dict[str, Any]:
    """What to add first, and the edges at which Redis' connections are used up before its core is."""
    at = {name: saturation(costs, RTT_MS) for name, costs in priced.items()}
    return {
        **{name: " then ".join(sorted(parts, key=parts.__getitem__)) for name, parts in at.items()},
        "edges_until_maxclients": int(MAXCLIENTS / max(there.connections, 0.1)), "maxclients": MAXCLIENTS,
    }  # fmt: skip
