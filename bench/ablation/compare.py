"""Two runs against each other: the same modes, RTTs, seeds and prompts, before and after a change.

Paired like the comparisons inside a run. What differs besides the figures (code, packages, machine) is told as well.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pilotfish.bench.ablation import bootstrap
from pilotfish.bench.ablation import manifest as manifests
from pilotfish.bench.ablation.data import Data, Row
from pilotfish.bench.ablation.measures import MEASURES
from pilotfish.bench.ablation.records import read
from pilotfish.protocol.errors import UsageError


def compare(one: Path, other: Path) -> tuple[list[Row], list[str]]:
    """(a row for each figure of each cell that both have, `other` against `one`; what else differs, in words).

    Raises UsageError if they asked different prompts or have no cell in common.
    """
    before, after = (Data(manifests.read(folder), read(folder)) for folder in (one, other))
    asked = [data.manifest["experiment"]["prompts"]["sha256"] for data in (before, after)]
    if asked[0] != asked[1]:
        raise UsageError(f"{one} and {other} asked different prompts: only runs over the same file can be compared")
    rows = list(_rows(before, after))
    if not rows:
        raise UsageError(
            f"{one} and {other} have no mode and RTT in common: `pilotfish ablate list` shows what they have"
        )
    return rows, list(_differences(before.manifest, after.manifest))


def _rows(before: Data, after: Data) -> Iterator[Row]:
    for cell in (cell for cell in before.cells if cell in after.cells):
        for name, measure in MEASURES.items():
            found = bootstrap.compare(after.cells[cell], before.cells[cell], measure)
            if found:
                yield {
                    "variant": cell[0], "rtt_ms": cell[1], "measure": name, "pairs": found.pairs,
                    "compared_by": "difference" if measure.share else "ratio", "value": found.interval.value,
                    "low": found.interval.low, "high": found.interval.high, "verdict": found.verdict,
                }  # fmt: skip


def _differences(before: dict[str, Any], after: dict[str, Any]) -> Iterator[str]:
    """Conditions that are not the same: the last sitting of each counts."""
    for name in ("code", "packages", "cpu", "cores", "python"):
        a, b = before["sittings"][-1][name], after["sittings"][-1][name]
        if a != b:
            yield f"{name}: {_short(a)} against {_short(b)}"
    for variant, own in before["models"].items():
        for side, told in after["models"].get(variant, own).items():
            if told != own[side]:
                yield f"{variant}, {side}: {_short(own[side])} against {_short(told)}"
    for variant, own in before["settings"].items():
        other = after["settings"].get(variant, own)
        for name in own:
            if own[name] != other.get(name):
                yield f"{variant}, {name}: {own[name]} against {other.get(name)}"


def _short(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
