"""The report: Markdown for a repository, and one HTML file that needs nothing else.

Both are made from the same blocks, in the order a reader asks: what came out, may I believe it, how was it measured.
Knows tables and plots; measures nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from pilotfish.bench.ablation import manifest as manifests
from pilotfish.bench.ablation import plots, records
from pilotfish.bench.ablation.data import Data, Row, Table
from pilotfish.bench.ablation.document import Block, as_html, as_markdown
from pilotfish.bench.ablation.measures import Prices
from pilotfish.bench.ablation.presets import BASELINE
from pilotfish.bench.ablation.tables import all_tables
from pilotfish.bench.ablation.words import CAPTIONS, LIMITS, METHOD
from pilotfish.cli.render import counted

TABLES, PLOTS, MARKDOWN, HTML = "tables", "plots", "report.md", "report.html"

SHOWN: Final = (  # measure, heading, decimals
    ("tokens_per_second", "tokens/s", 0), ("first_token_ms", "first token, ms", 1), ("accuracy", "accuracy", 3),
    ("cloud_rows_per_token", "rows/token", 2), ("cloud_steps_per_token", "steps/token", 2),
    ("unverified", "unverified", 3), ("never_sent", "never sent", 3), ("wire_bytes_per_token", "bytes/token", 0),
    ("cost_per_1k_tokens", "cost/1k", 4),
)  # fmt: skip
COMPARED: Final = ("tokens_per_second", "first_token_ms", "accuracy", "same_text", "cloud_rows_per_token",
                   "wire_bytes_per_token", "cost_per_1k_tokens")  # fmt: skip


def write(folder: Path, prices: Prices | None = None) -> Path:
    """Tables, plots and both reports of a run, anew; returns the HTML file. Raises UsageError if there is no run.

    Prices are kept with the run; None: those it was given before.
    """
    data = load(folder, prices)
    tables = all_tables(data)
    for name in (TABLES, PLOTS):
        _emptied(folder / name)
    for table in tables.values():
        table.write(folder / TABLES)
    pictures = {}
    for name, figure in plots.figures(tables, data.variants):
        file = f"{PLOTS}/{name}.png"
        pictures[file] = plots.as_bytes(figure, "svg")
        (folder / file).write_bytes(plots.as_bytes(figure, "png"))
    said = list(blocks(data, tables))
    (folder / MARKDOWN).write_text(as_markdown(said), encoding="utf-8")
    (folder / HTML).write_text(as_html(said, pictures), encoding="utf-8")
    return folder / HTML


def load(folder: Path, prices: Prices | None = None) -> Data:
    """A run's manifest and requests; `tables.py` has what can be made of them. Raises UsageError if there is none."""
    manifest = manifests.read(folder)
    if prices:
        manifest["prices"] = asdict(prices)
        manifests.write(folder, manifest)
    return Data(manifest, records.read(folder), Prices(**manifest.get("prices", {})))


def _emptied(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for old in (*folder.glob("*.csv"), *folder.glob("*.png")):
        old.unlink()


# --- what it says --------------------------------------------------------------------------------------------


def blocks(data: Data, tables: dict[str, Table]) -> Iterator[Block]:
    """What the report says, in order."""
    yield Block("title", "Ablation report")
    yield Block("text", _what(data))
    yield from _warnings(data, tables)
    for rtt in data.rtts:
        yield Block("heading", f"Against the baseline, RTT {rtt:g} ms")
        yield _comparison(tables["summary"].rows, rtt)
    if "break_even" in tables:
        yield Block("heading", "Break-even")
        for row in tables["break_even"].rows:
            yield Block("text", _break_even(row, data))
    for name in (name for name in plots.DRAWN if name in tables):
        heading, caption = CAPTIONS[name]
        yield Block("heading", heading)
        yield Block("picture", heading, f"{PLOTS}/{name}.png")
        yield Block("text", caption)
    for rtt in data.rtts:
        yield Block("heading", f"All figures, RTT {rtt:g} ms")
        yield _figures(data, tables["summary"].rows, rtt)
    yield from _method(data)


def _what(data: Data) -> str:
    asked = data.manifest["experiment"]["prompts"]
    cells = len(data.variants) * len(data.rtts)
    return (
        f"{len(data.records)} of {cells * asked['asked'] * data.manifest['experiment']['seeds']} requests: "
        f"{len(data.variants)} variants, RTT {', '.join(f'{rtt:g}' for rtt in data.rtts)} ms, "
        f"{counted(data.manifest['experiment']['seeds'], 'seed')}, {asked['asked']} prompts of {asked['name']}, "
        f"{asked['with_answer']} of them with a checkable answer. Real processes: Redis, "
        f"worker, agent, and a proxy that delays. The baseline is {data.manifest['about'][BASELINE]}."
    )


def _warnings(data: Data, tables: dict[str, Table]) -> Iterator[Block]:
    """What a reader must know before any figure."""
    manifest = data.manifest
    if not manifest["finished"]:
        yield Block("warning", "This run is not finished: the same command goes on with it.")
    if manifest["experiment"]["seeds"] == 1:
        yield Block("warning", "One seed: what the gates happened to learn is in these figures and in no interval.")
    if manifest["experiment"]["prompts"]["lessons_are_asked_too"]:
        yield Block("warning", "The gate learnt from prompts that were measured as well: there were no others.")
    for part in ("code", "packages", "cpu"):
        if len({json.dumps(one[part], sort_keys=True) for one in manifest["sittings"]}) > 1:
            yield Block("warning", f"This run was interrupted, and its {part} changed in between.")
    if "failures" in tables:
        rows = tables["failures"].rows
        yield Block("warning", f"{counted(len(rows), 'failure')}: counted as wrong answers, and in no other figure.")
        yield _table(list(rows[0]), [[f"{value}" for value in row.values()] for row in rows])


def _figures(data: Data, rows: Sequence[Row], rtt: float) -> Block:
    known = {(row["variant"], row["measure"]): row for row in rows if row["rtt_ms"] == rtt}
    shown = [one for one in SHOWN if any(measure == one[0] for _, measure in known)]
    cells = [
        [variant, *(_figure(known.get((variant, name)), digits) for name, _, digits in shown)]
        for variant in data.variants
    ]
    return _table(["variant", *(words for _, words, _ in shown)], cells)


def _table(heads: Sequence[str], cells: Sequence[Sequence[str]]) -> Block:
    return Block("table", heads=heads, cells=cells)


def _figure(row: Row | None, digits: int) -> str:
    if row is None:
        return "–"
    value, *ends = (None if row[name] is None else f"{row[name]:.{digits}f}" for name in ("value", "low", "high"))
    return f"{value}" if ends in ([value, value], [None, None]) else f"{value} ({ends[0]} to {ends[1]})"


def _comparison(rows: Sequence[Row], rtt: float) -> Block:
    known = {(r["variant"], r["measure"]): r for r in rows if r["rtt_ms"] == rtt and r["verdict"]}
    names = [name for name in COMPARED if any(measure == name for _, measure in known)]
    titles = {row["measure"]: row["measure"].replace("_", " ") for row in rows}
    variants = list(dict.fromkeys(variant for variant, _ in known))
    cells = [[variant, *(_verdict(known.get((variant, name))) for name in names)] for variant in variants]
    return _table(["variant", *(titles[name] for name in names)], cells)


def _verdict(row: Row | None) -> str:
    if row is None:
        return "–"
    return verdict_words({**row, "value": row["vs_baseline"], "low": row["vs_low"], "high": row["vs_high"]})


def verdict_words(row: Row) -> str:
    """Such as "1.43 × (1.35 to 1.51), better", "no difference (0.97 to 1.04)", "equal" to the last digit."""
    digits, sign, unit = (3, "+", "") if row["compared_by"] == "difference" else (2, "", " ×")
    value = f"{row['value']:{sign}.{digits}f}{unit}"
    if row["low"] is None:
        return f"{value}, {row['verdict']}"
    interval = f"({row['low']:{sign}.{digits}f} to {row['high']:{sign}.{digits}f})"
    if row["low"] == row["high"] == (0 if sign else 1):
        return "equal"
    if row["verdict"] == "no difference":
        return f"no difference {interval}"
    return f"{value} {interval}, {row['verdict']}"


def _break_even(row: Row, data: Data) -> str:
    span = f"{data.rtts[0]:g} and {data.rtts[-1]:g} ms"
    if row["rtt_ms"] is None:
        return (
            f"Baseline and {row['reference']} do not cross between {span}: "
            f"{row['faster_at_lowest_rtt']} is ahead throughout. In "
            f"{100 * row['share_of_resamples']:.0f} % of the resamples they do cross."
        )
    interval = "" if row["low"] is None else f" ({row['low']:.1f} to {row['high']:.1f})"
    return (
        f"Baseline and {row['reference']} are equally fast at an RTT of {row['rtt_ms']:.1f} ms{interval}, by straight "
        f"lines between the RTTs measured; below it {row['faster_at_lowest_rtt']} is faster. They cross in "
        f"{100 * row['share_of_resamples']:.0f} % of the resamples."
    )


def _method(data: Data) -> Iterator[Block]:
    manifest = data.manifest
    yield Block("heading", "What this does not show")
    yield Block("text", LIMITS)
    yield Block("heading", "How it was measured")
    yield Block("text", METHOD)
    about = [[name, manifest["about"].get(name, "a combination"), _settings(manifest, name)] for name in data.variants]
    yield _table(["variant", "what it is", "settings that differ"], about)
    yield _table(["condition", ""], [[name, value] for name, value in _conditions(manifest).items()])
    where = (
        f"Raw rounds are in `{records.FILE}`, one table per plot in `{TABLES}/`, all settings in `{manifests.FILE}`."
    )
    yield Block("text", where)


def _conditions(manifest: dict[str, Any]) -> dict[str, str]:
    first, prompts = manifest["sittings"][0], manifest["experiment"]["prompts"]
    changed = " with changes" if first["code"].get("changed") else ""
    models: dict[str, dict[str, Any]] = next(iter(manifest["models"].values()), {})
    sides = {
        side: ", ".join(f"{key} {str(value)[:16]}" for key, value in told.items()) for side, told in models.items()
    }
    return {
        "code": first["code"].get("revision", "an installed package")[:12] + changed,
        "begun": first["started"],
        "machine": f"{first['cpu']}, {first['cores']} cores",
        "load average at each start": ", ".join(f"{one['load_average']}" for one in manifest["sittings"]),
        "packages": ", ".join(f"{name} {version}" for name, version in first["packages"].items()),
        **sides,
        "prompts": f"{prompts['name']}, SHA-256 {prompts['sha256'][:16]}",
        "lessons before each replicate": f"{manifest['experiment']['lessons']} prompts, for variants that learn",
    }


def _settings(manifest: dict[str, Any], name: str) -> str:
    """Against the baseline's."""
    base, own = manifest["settings"][BASELINE], manifest["settings"][name]
    found = own if name == BASELINE else {key: value for key, value in own.items() if base.get(key) != value}
    if name == BASELINE:
        found = {key: own[key] for key in ("mode", "max_tokens", "temperature", "engine")}
    return ", ".join(f"{key}={value}" for key, value in found.items()) or "none"
