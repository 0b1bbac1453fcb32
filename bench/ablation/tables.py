"""One table per plot: what the CSV files hold, and all that the plots and the report may show.

A table's rows are plain values; a name with a unit in it is in that unit. `low` and `high` bound the 95 % interval of
`bootstrap.py` and are empty where there are too few prompts. The baseline is in every table it can be in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Final

from pilotfish.bench.ablation import bootstrap
from pilotfish.bench.ablation.bootstrap import Interval, Sums
from pilotfish.bench.ablation.data import Data, Row, Table
from pilotfish.bench.ablation.draft_tables import confidence, corrections, positions
from pilotfish.bench.ablation.measures import MEASURES, Measure
from pilotfish.bench.ablation.presets import BASELINE

REFERENCES = ("cloud_only", "edge_only")


def all_tables(data: Data) -> dict[str, Table]:
    """Every table by name; those without a row are left out."""
    made = (Table(name, list(rows(data))) for name, rows in TABLES.items())
    return {table.name: table for table in made if table.rows}


# --- figures of every cell -----------------------------------------------------------------------------------


def summary(data: Data) -> Iterator[Row]:
    """Every figure of every cell, and how it compares with the baseline's over the same prompts."""
    for (variant, rtt), records in data.cells.items():
        for name, measure in data.measures.items():
            found = data.interval(variant, rtt, name)
            if found is None:
                continue
            against = None
            if variant != BASELINE:
                against = bootstrap.compare(records, data.cells[BASELINE, rtt], measure)
            yield {
                "variant": variant, "rtt_ms": rtt, "measure": name, "unit": measure.unit,
                "value": found.value, "low": found.low, "high": found.high,
                "requests": len(records), "failed": sum(bool(r["failure"]) for r in records),
                "compared_by": "difference" if measure.share else "ratio",
                "vs_baseline": against and against.interval.value,
                "vs_low": against and against.interval.low, "vs_high": against and against.interval.high,
                "verdict": against.verdict if against else "",
            }  # fmt: skip


def latency(data: Data) -> Iterator[Row]:
    """Times of every request: what the distributions are made of."""
    first, further = MEASURES["first_token_ms"], MEASURES["ms_per_token"]
    for (variant, rtt), records in data.cells.items():
        for record in records:
            if first.applies(record):
                each = further.over(record) / further.under(record) if further.applies(record) else None
                yield {"variant": variant, "rtt_ms": rtt, "seed": record["seed"], "prompt": record["prompt"],
                       "first_token_ms": first.over(record), "ms_per_token": each}  # fmt: skip


def _figures(*names: str) -> Callable[[Data], Iterator[Row]]:
    """Some figures of every cell, side by side."""

    def rows(data: Data) -> Iterator[Row]:
        for variant, rtt in data.cells:
            found = {name: data.interval(variant, rtt, name) for name in names}
            if all(found.values()):
                yield {"variant": variant, "rtt_ms": rtt} | {
                    f"{name}{part}": getattr(one, attribute)
                    for name, one in found.items()
                    for part, attribute in (("", "value"), ("_low", "low"), ("_high", "high"))
                }

    return rows


def pareto(data: Data) -> Iterator[Row]:
    """Accuracy and cloud rows; on the frontier: nobody at this RTT is both as accurate and cheaper, or the reverse."""
    rows = list(_figures("cloud_rows_per_token", "accuracy")(data))
    for row in rows:
        peers = [other for other in rows if other["rtt_ms"] == row["rtt_ms"]]
        yield {**row, "on_frontier": not any(_dominates(other, row) for other in peers)}


def _dominates(one: Row, other: Row) -> bool:
    gains = (one["accuracy"] - other["accuracy"], other["cloud_rows_per_token"] - one["cloud_rows_per_token"])
    return bool(min(gains) >= 0 and max(gains) > 0)


# --- speed against RTT ---------------------------------------------------------------------------------------


def speed_by_rtt(data: Data) -> Iterator[Row]:
    """Speed at each RTT, if there are several."""
    if len(data.rtts) > 1:
        yield from _figures("tokens_per_second", "ms_per_token")(data)


def break_even(data: Data) -> Iterator[Row]:
    """The RTT at which the baseline is as fast as the cloud alone, and as the edge alone."""
    if len(data.rtts) < 2:
        return
    for reference in REFERENCES:
        if reference not in data.variants:
            continue
        found = bootstrap.break_even(data.rtts, *_lines(data, BASELINE, reference))
        speeds = [data.interval(one, data.rtts[0], "tokens_per_second") for one in (BASELINE, reference)]
        one = found.interval
        yield {
            "variant": BASELINE, "reference": reference, "rtt_ms": one and one.value, "low": one and one.low,
            "high": one and one.high, "share_of_resamples": found.share,
            "faster_at_lowest_rtt": max(zip(speeds, (BASELINE, reference), strict=True), key=_speed)[1],
        }  # fmt: skip


def _speed(pair: tuple[Interval | None, str]) -> float:
    return pair[0].value if pair[0] else 0.0


def _lines(data: Data, *variants: str) -> list[list[Sums]]:
    """Seconds per token at each RTT, over the prompts and seeds that succeeded everywhere."""
    measure = MEASURES["tokens_per_second"]
    cells = {(v, rtt): [r for r in data.cells[v, rtt] if measure.applies(r)] for v in variants for rtt in data.rtts}
    common = set.intersection(*({(r["prompt"], r["seed"]) for r in records} for records in cells.values()))
    slow = Measure("", "", "", "", measure.under, measure.over)
    return [
        [bootstrap.sums([r for r in cells[v, rtt] if (r["prompt"], r["seed"]) in common], slow) for rtt in data.rtts]
        for v in variants
    ]


# --- bytes and money -----------------------------------------------------------------------------------------


def wire(data: Data) -> Iterator[Row]:
    """Bytes between agent and Redis, by direction."""
    for row in _figures("wire_bytes_per_token")(data):
        records = [r for r in data.cells[row["variant"], row["rtt_ms"]] if not r["failure"]]
        tokens = max(1, sum(len(r["ids"]) for r in records))
        parts = {f"{name}_bytes_per_token": sum(r[f"wire_{name}"] for r in records) / tokens for name in ("up", "down")}
        yield row | parts


def cost(data: Data) -> Iterator[Row]:
    """Cost of a thousand tokens at the prices given, by who is paid."""
    if not data.prices:
        return
    for row in _figures("cost_per_1k_tokens")(data):
        records = [r for r in data.cells[row["variant"], row["rtt_ms"]] if not r["failure"]]
        tokens = max(1, sum(len(r["ids"]) for r in records))
        parts = [data.prices.parts(r) for r in records]
        yield row | {f"{name}_per_1k_tokens": 1000 * sum(p[name] for p in parts) / tokens for name in parts[0]}


def failures(data: Data) -> Iterator[Row]:
    """Every request that failed, by name."""
    for record in data.records:
        if record["failure"]:
            yield {"variant": record["variant"], "rtt_ms": record["rtt_ms"], "seed": record["seed"],
                   "prompt": record["prompt"], **record["failure"]}  # fmt: skip


TABLES: Final[dict[str, Callable[[Data], Iterable[Row]]]] = {
    "summary": summary,
    "latency": latency,
    "throughput": _figures("tokens_per_second"),
    "pareto": pareto,
    "confidence": confidence,
    "positions": positions,
    "corrections": corrections,
    "rtt": speed_by_rtt,
    "break_even": break_even,
    "wire": wire,
    "cost": cost,
    "failures": failures,
}
