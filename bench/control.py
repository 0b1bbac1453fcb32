"""`bench control`: the stop rule and pipelining against every fixed K, on what the demo pair really says.

The pair's texts, drafts and scores are recorded once; a virtual clock then replays any way of drafting at any t_d and
round trip, with the engine's own times measured in the same run. A live run through a delay proxy checks the replay.
Nothing here is told to the rule: it learns acceptance and rate as it goes, from the first token on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

from pilotfish.bench.conditions import conditions, load_average
from pilotfish.bench.control_fixed import Totals, all_totals, best
from pilotfish.bench.control_live import live
from pilotfish.bench.control_record import Record, acceptance, record_all
from pilotfish.bench.control_replay import Outcome, replay
from pilotfish.bench.control_times import Times
from pilotfish.bench.report import Report, Target, target
from pilotfish.bench.sides import edge_cores, engine_cores
from pilotfish.edge_agent.task import WINDOW

TOKEN_MS = (0.3, 5.0, 15.0)
RTT_MS = (0.0, 10.0, 30.0, 50.0, 100.0)
CHANGE_MS = (10.0, 100.0)  # round trips before and after the change in the middle of a run
LIVE = ((5.0, 10.0), (5.0, 50.0), (15.0, 50.0))  # t_d and round trip of the live runs
TOKENS_ENOUGH = 5_000
WAYS: dict[str, dict[str, Any]] = {
    "stop_rule": {"drafting": "always", "window": 1},
    "pipelined": {"drafting": "always", "window": WINDOW},
    "auto": {"drafting": "auto", "window": WINDOW},
}


@dataclass(frozen=True, slots=True)
class Sizes:
    """Every `stride`-th prompt is recorded; every `live_stride`-th of them runs live, in `blocks`."""

    stride: int = 1
    live_stride: int = 20
    blocks: int = 5


QUICK = Sizes(stride=16, live_stride=8, blocks=1)


def run(*, quick: bool = False) -> Report:
    """The whole benchmark on the demo pair."""
    from pilotfish.demo import pair

    sizes = QUICK if quick else Sizes()
    stated = conditions(
        ("llama-cpp-python",), models={"target": pair.TARGET_DIR.name, "draft": pair.DRAFT_DIR.name}, temperature=0,
        sizes=asdict(sizes), window=WINDOW, engine_cores=engine_cores(), edge_cores=edge_cores(),
    )  # fmt: skip
    records, stop_ids = record_all(pair.target_gguf(), pair.draft_gguf(), pair.EVAL_FILE, sizes.stride)
    some = records[:: sizes.live_stride]
    runs = asyncio.run(run_live(pair.target_gguf(), pair.draft_gguf(), some, stop_ids, sizes.blocks))
    times = middle([one.times for one in runs])
    figures = Replays(records, stop_ids, times).figures()
    figures["live"] = live_figures(runs, stop_ids)
    stated |= {"load_average_after": load_average(), "measured_ms": asdict(times), "acceptance": acceptance(records)}
    return Report("control", stated, figures, targets(figures, enough=figures["tokens"] >= TOKENS_ENOUGH))


class Replays:
    """Every cell of t_d and round trip, on one record."""

    def __init__(self, records: Sequence[Record], stop_ids: frozenset[int], times: Times) -> None:
        self.records, self.stop_ids, self.times = records, stop_ids, times
        self.fixed = all_totals(records, stop_ids)
        self.mean_length = fmean(len(record.text) for record in records)

    def figures(self) -> dict[str, Any]:
        """All cells, what one K for all of them would have cost, and a round trip that changes."""
        cells = [self.cell(token, rtt) for token in TOKEN_MS for rtt in RTT_MS]
        return {
            "tokens": sum(len(record.text) for record in self.records),
            "acceptance": acceptance(self.records),
            "tokens_per_answer": round(self.mean_length, 1),
            "cells": cells,
            "one_k_for_all": self.one_k(cells),
            "rtt_changes": self.changing(),
        }

    def play(self, times: Times, **task: Any) -> Outcome:
        """One replay."""
        return replay(self.records, times, self.stop_ids, **task)

    def cell(self, token_ms: float, rtt_ms: float) -> dict[str, Any]:
        """Tokens per second of each way; steps and rows of the cloud per token for those that draft by the rule."""
        times = replace(self.times, token=token_ms, rtt=rtt_ms)
        fixed = best(self.fixed, times)
        played = {name: self.play(times, **task) for name, task in WAYS.items()}
        rates = {"best_fixed_k": fixed.rate(times), **{name: one.rate for name, one in played.items()}}
        rates["cloud_only"] = self.play(times, mode="cloud_only").rate
        return {
            "t_d_ms": token_ms,
            "rtt_ms": rtt_ms,
            "best_k": fixed.k,
            "tokens_per_s": {name: round(1000 * rate, 2) for name, rate in rates.items()},
            "stop_rule_vs_best": round(rates["stop_rule"] / rates["best_fixed_k"], 4),
            "pipelined_vs_best": round(rates["pipelined"] / rates["best_fixed_k"], 4),
            "mean_draft": {name: round(one.mean_draft(), 2) for name, one in played.items()},
            "steps_per_token": {name: round(one.steps / one.tokens, 3) for name, one in played.items()},
            "rows_per_token": {name: round(one.rows / one.tokens, 3) for name, one in played.items()},
            "ceded_share": round(played["auto"].ceded / played["auto"].tokens, 3),
            "predicted_ms_per_token": round(predicted := times.predicted_ms(acceptance(self.records)), 2),
            "predicted_with_ends_ms_per_token": round(predicted + times.away() / self.mean_length, 2),
            "pipelined_ms_per_token": round(1 / rates["pipelined"], 2),
            "best_fixed_k_ms_per_token": round(1 / rates["best_fixed_k"], 2),
        }

    def one_k(self, cells: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The time of all cells together: the one K that is best over all, and the rule."""
        grid = [replace(self.times, token=cell["t_d_ms"], rtt=cell["rtt_ms"]) for cell in cells]
        mean = {one.k: fmean(one.rate(t) / best(self.fixed, t).rate(t) for t in grid) for one in self.fixed}
        k = max(mean, key=lambda one: mean[one])
        ours = fmean(cell["stop_rule_vs_best"] for cell in cells)
        return {"best_k": k, "mean_of_best": round(mean[k], 4), "stop_rule_mean_of_best": round(ours, 4)}

    def changing(self) -> dict[str, Any]:
        """The round trip grows when the clock passes the middle: drafts follow, and how fast what comes after is."""
        before, after = (replace(self.times, token=5.0, rtt=rtt) for rtt in CHANGE_MS)
        middle = self.play(before, **WAYS["stop_rule"]).ms / 2000
        changed = self.play(replace(before, rtt=lambda second: CHANGE_MS[second >= middle]), **WAYS["stop_rule"])
        settled = (middle + changed.ms / 1000) / 2
        return {
            "t_d_ms": 5.0,
            "rtt_ms": CHANGE_MS,
            "mean_draft_before": round(changed.mean_draft(middle / 2, middle), 2),
            "mean_draft_after": round(changed.mean_draft(settled), 2),
            "best_k": [best(self.fixed, times).k for times in (before, after)],
            "vs_best_fixed_k": round(self.best_over_change(before, after, middle) / changed.ms, 4),
        }

    def best_over_change(self, before: Times, after: Times, middle: float) -> float:
        """Ms of the one K that is fastest over the same change, its tokens spread evenly over its rounds."""

        def ms(one: Totals) -> float:
            first, second = one.ms(before), one.ms(after)
            share = min(1.0, 1000 * middle / first)
            return share * first + (1 - share) * second

        return min(map(ms, self.fixed))


# --- live ----------------------------------------------------------------------------------------------------


class Run(NamedTuple):
    """One live run of some answers: its speed in tokens per ms, and the times measured just before it."""

    way: str
    records: Sequence[Record]
    times: Times
    speed: float


async def run_live(
    target_model: Path, draft: Path, records: Sequence[Record], stop_ids: frozenset[int], blocks: int
) -> list[Run]:
    """Block after block of other answers: times of engine and broker, then each way in each cell of LIVE.

    A machine that slows down for a while slows down one block and its gauge.
    """
    found = list[Run]()
    async with live(target_model, draft) as running:
        for some in (records[block::blocks] for block in range(blocks)):
            times = await running.times(some, stop_ids)
            for token, rtt in LIVE:
                for name in ("stop_rule", "pipelined"):
                    speed = await running.measure(some, stop_ids, token, rtt, **WAYS[name])
                    cell = replace(times, token=running.agent.pace.token_ms, rtt=rtt)
                    found.append(Run(name, some, cell, speed))
    return found


def middle(times: Sequence[Times]) -> Times:
    """The median of what engine and broker took."""
    names = ("job", "row", "step", "broker")
    return Times(0.0, 0.0, **{name: median(getattr(one, name) for one in times) for name in names})


def live_figures(runs: Sequence[Run], stop_ids: frozenset[int]) -> list[dict[str, Any]]:
    """What ran live beside the replay of the same answers under the times of the same block: medians over blocks."""
    told = []
    for at in range(len(LIVE) * 2):
        same = runs[at :: len(LIVE) * 2]
        foretold = [replay(one.records, one.times, stop_ids, **WAYS[one.way]).rate for one in same]
        told.append(
            {
                "way": same[0].way,
                "t_d_ms": round(median(one.times.token for one in same), 2),
                "rtt_ms": same[0].times.rtt,
                "tokens_per_s": round(1000 * median(one.speed for one in same), 2),
                "replay_tokens_per_s": round(1000 * median(foretold), 2),
                "ratios": (ratios := [round(one.speed / rate, 3) for one, rate in zip(same, foretold, strict=True)]),
                "ratio": round(median(ratios), 4),
            }
        )
    return told


def targets(figures: dict[str, Any], *, enough: bool) -> list[Target]:
    """DESIGN section 11's two names, and what issue 4 promises beside them."""
    cells = figures["cells"]
    ratios = [cell["stop_rule_vs_best"] for cell in cells]
    at_50 = [c["pipelined_vs_best"] for c in cells if c["rtt_ms"] == 50.0 and c["t_d_ms"] >= 5]
    one_k = figures["one_k_for_all"]["stop_rule_mean_of_best"] / figures["one_k_for_all"]["mean_of_best"]
    off = max(abs(one["ratio"] - 1) for one in figures["live"])
    return [
        target("vs_best_fixed_k", min(ratios), "ratio", ">= 0.97", enough=enough),
        target("vs_best_fixed_k_mean", fmean(ratios), "ratio", ">= 1", enough=enough),
        target("vs_one_k_for_all", one_k, "ratio", "> 1", enough=enough),
        target("pipelined_vs_best_fixed_k_rtt50", min(at_50), "ratio", ">= 1.25", enough=enough),
        target("live_off_replay", off, "share", "<= 0.1", enough=enough),
    ]
