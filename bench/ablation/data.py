"""A run as its tables see it, and what a table is."""

from __future__ import annotations

import csv
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pilotfish.bench.ablation import bootstrap
from pilotfish.bench.ablation.bootstrap import Interval
from pilotfish.bench.ablation.measures import MEASURES, Measure, Prices, Record, cost_measure, with_same_text

Row = dict[str, Any]
Cells = dict[tuple[str, float], list[Record]]  # (variant, RTT) -> its requests, in the order of the manifest


@dataclass(frozen=True, slots=True)
class Data:
    """A run: its manifest, its requests."""

    manifest: dict[str, Any]
    records: list[Record]
    prices: Prices = field(default_factory=Prices)
    cells: Cells = field(init=False)

    def __post_init__(self) -> None:
        cells: Cells = {(variant, rtt): [] for variant in self.variants for rtt in self.rtts}
        for record in with_same_text(self.records):
            cells[record["variant"], record["rtt_ms"]].append(record)
        object.__setattr__(self, "cells", cells)

    @property
    def variants(self) -> list[str]:
        """Names, the baseline first."""
        return list(self.manifest["experiment"]["variants"])

    @property
    def rtts(self) -> list[float]:
        """In ms, rising."""
        return sorted(self.manifest["experiment"]["rtt_ms"])

    @property
    def measures(self) -> dict[str, Measure]:
        """Those of every run, and the cost if there are prices."""
        return {**MEASURES, **({"cost_per_1k_tokens": cost_measure(self.prices)} if self.prices else {})}

    def of(self, variant: str) -> list[Record]:
        """A variant's requests that did not fail, at every RTT."""
        return [r for rtt in self.rtts for r in self.cells[variant, rtt] if not r["failure"]]

    def interval(self, variant: str, rtt: float, measure: str) -> Interval | None:
        """One figure of one cell."""
        return bootstrap.sums(self.cells[variant, rtt], self.measures[measure]).interval()


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of one shape; `name` is that of the CSV file and of the plot."""

    name: str
    rows: list[Row]

    def write(self, folder: Path) -> Path:
        """As CSV."""
        path = folder / f"{self.name}.csv"
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(self.rows[0]) if self.rows else ["empty"])
            writer.writeheader()
            writer.writerows({name: _plain(value) for name, value in row.items()} for row in self.rows)
        return path


def _plain(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else "" if value is None else value
