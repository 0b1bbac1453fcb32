"""`bench chaos`: texts stay right while everything breaks. 20,000 rounds under a seeded plan of faults.

    python -m pilotfish.bench.chaos --seed 7 --rounds 2000 [--flips]     the run that a report says was broken

Real Redis, real processes, the fake engine. Targets: how many rounds, `different` texts (`chaos_judge.py`), `lost`
requests and jobs, `hung` ones. The plan of a seed replays; its interleaving on a machine does not.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import time
from collections import Counter
from collections.abc import Awaitable
from dataclasses import dataclass, field
from typing import Any, Final

from pilotfish.bench.chaos_fleet import AGENTS, EVERY_FAULT, WORKERS, fleet, switches
from pilotfish.bench.chaos_judge import complaint
from pilotfish.bench.chaos_load import DEADLINE_SECONDS, Load
from pilotfish.bench.chaos_plan import TICK_SECONDS, faults
from pilotfish.bench.chaos_wire import read_both
from pilotfish.bench.conditions import conditions, load_average
from pilotfish.bench.report import Report, target
from pilotfish.protocol.tasks import end_tasks

ROUNDS: Final = 20_000
FLIPPED_SHARE: Final = 0.25  # of the rounds: workers that disagree at near-ties
QUICK_SECONDS: Final = 5.0
QUICK_DEADLINE_SECONDS: Final = 10.0
AT_ONCE: Final = 16
CALM_SECONDS: Final = 20.0  # after the last fault, beside what a generation may take
HEALED_SECONDS: Final = 120.0
DRAINED_SECONDS: Final = 20.0
SHOWN: Final = 5


@dataclass(slots=True)
class Outcome:
    """One fleet's run."""

    seed: int
    flips: bool
    rounds: int = 0
    tokens: int = 0
    seconds: float = 0.0
    ends: Counter[str] = field(default_factory=Counter)
    told: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    degraded: int = 0
    cut_off: int = 0
    different: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    hung: list[str] = field(default_factory=list)

    @property
    def replay(self) -> str:
        """The command."""
        command = f"python -m pilotfish.bench.chaos --seed {self.seed} --rounds {max(1, self.rounds)}"
        return command + " --flips" * self.flips

    @property
    def broken(self) -> bool:
        """Whether anything was."""
        return bool(self.different or self.lost or self.hung)


def run(*, quick: bool = False) -> Report:
    """Two fleets: workers that agree, then workers that do not. The seed is new each time unless CHAOS_SEED is set."""
    seed = int(os.environ.get("CHAOS_SEED") or time.time_ns() % 1_000_000)
    parts = ((False, 1 - FLIPPED_SHARE), (True, FLIPPED_SHARE))
    outcomes = []
    for flips, share in parts:
        short = {"seconds": QUICK_SECONDS * share * 2, "deadline_seconds": QUICK_DEADLINE_SECONDS} if quick else {}
        outcomes.append(asyncio.run(storm(seed, int(ROUNDS * share), flips=flips, **short)))
    return report(outcomes)


async def storm(
    seed: int,
    rounds: int,
    *,
    flips: bool,
    seconds: float | None = None,
    deadline_seconds: float = DEADLINE_SECONDS,
) -> Outcome:
    """One fleet under the seed's faults until so many rounds have ended (or seconds have passed); then calm.

    Every wait has an end: what is not over by then is `hung`, with its name.
    """
    read_both()
    load, started = Load(seed, AT_ONCE, deadline_seconds), time.monotonic()
    outcome = Outcome(seed, flips)
    async with fleet(seed, load.heard, flips=flips) as running:
        load.fleet = running
        writing, blowing = asyncio.create_task(load.run()), time.monotonic()
        for fault in faults(seed):
            late = seconds is not None and time.monotonic() - blowing > seconds
            if late or writing.done() or load.rounds >= rounds:
                break
            if fault:
                running.strike(fault)
            await asyncio.sleep(TICK_SECONDS)
        load.stop()
        if not await over(running.healed(), HEALED_SECONDS):
            outcome.hung.append(f"not undone after {HEALED_SECONDS:g} s: what was done to {', '.join(running.victims)}")
        if not await over(writing, load.hung_seconds + CALM_SECONDS):
            load.give_up()
        left = await _drained(running)
        codes = await running.end()
        outcome.faults = running.done
        outcome.lost += [f"{count} left in {stream}" for stream, count in left.items()]
        outcome.lost += [f"{name}: {', '.join(why)}" for name, why in running.crashes.items()]
        outcome.hung += [f"{name} ended with {code} at SIGTERM" for name, code in codes.items()]
    outcome.seconds = round(time.monotonic() - started, 1)
    _judge(outcome, load)
    return outcome


async def over(what: Awaitable[Any], seconds: float) -> bool:
    """Whether it ended in time; else it is cancelled. Raises what it raises."""
    task = asyncio.ensure_future(what)
    await asyncio.wait({task}, timeout=seconds)
    if task.done():
        task.result()
        return True
    await end_tasks([task])
    return False


async def _drained(running: Any) -> dict[str, int]:
    deadline = time.monotonic() + DRAINED_SECONDS
    while True:
        left: dict[str, int] = await running.left()
        if not left or time.monotonic() > deadline:
            return left
        await asyncio.sleep(TICK_SECONDS)


def _judge(outcome: Outcome, load: Load) -> None:
    honest = switches(flips=outcome.flips)
    outcome.rounds, outcome.told, outcome.cut_off = (
        load.rounds,
        load.told,
        sum(fate.end == "killed" for fate in load.partial),
    )
    outcome.tokens = sum(len(fate.ids) for fate in load.fates)
    for fate in (*load.fates, *load.partial):
        if found := complaint(fate, honest):
            outcome.different.append(f"generation {fate.wish.number} ({fate.wish.mode}): {found}")
    for fate in load.fates:
        outcome.degraded += fate.degraded
        outcome.ends[fate.end if fate.end == "length" else fate.end.partition(":")[0]] += 1
        if fate.end != "length":
            outcome.lost.append(f"generation {fate.wish.number} ({fate.wish.mode}): {fate.end}")
    outcome.hung += [f"generation {wish.number} ({wish.mode}, submitted: {wish.submitted})" for wish in load.hung]


# --- telling -------------------------------------------------------------------------------------------------


def report(outcomes: list[Outcome]) -> Report:
    """Added up; a run that broke something says how to repeat it."""
    rounds = sum(one.rounds for one in outcomes)
    done = sum((one.faults for one in outcomes), Counter())
    enough = rounds >= ROUNDS and done.keys() >= EVERY_FAULT
    counts = {name: sum(len(getattr(one, name)) for one in outcomes) for name in ("different", "lost", "hung")}
    stated = conditions(workers=WORKERS, agents=AGENTS, at_once=AT_ONCE, seed=outcomes[0].seed, engine="fake")
    return Report(
        "chaos", stated | {"load_average_after": load_average()},
        {("near_ties" if one.flips else "agreeing"): told(one) for one in outcomes},
        [
            target("rounds", rounds, "rounds", f">= {ROUNDS}", enough=enough),
            *(target(name, n, "", "== 0", enough=enough or n > 0) for name, n in counts.items()),
        ],
    )  # fmt: skip


def told(one: Outcome) -> dict[str, Any]:
    """One run as figures."""
    figures: dict[str, Any] = {
        "rounds": one.rounds, "tokens": one.tokens, "seconds": one.seconds, "generations": dict(one.ends),
        "degraded": one.degraded, "cut_off_with_their_agent": one.cut_off,
        "failed_by_name_and_asked_again": dict(one.told), "faults": dict(one.faults),
    }  # fmt: skip
    if one.broken:
        figures["broken"] = {name: getattr(one, name)[:SHOWN] for name in ("different", "lost", "hung")}
        figures["replay"] = one.replay
    return figures


def main() -> None:
    """Repeat one run; exit code 1 if it breaks something."""
    parser = argparse.ArgumentParser(prog="python -m pilotfish.bench.chaos", description="One fleet, one seed.")
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--flips", action="store_true", help="workers disagree at near-ties")
    chosen = parser.parse_args()
    outcome = asyncio.run(storm(chosen.seed, chosen.rounds, flips=chosen.flips))
    print(json.dumps(told(outcome), indent=1))
    raise SystemExit(outcome.broken)


if __name__ == "__main__":
    main()
