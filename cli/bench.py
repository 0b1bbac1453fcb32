"""`bench`: run a benchmark and show its targets, or print its object as JSON."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from pilotfish.cli.options import AsJson
from pilotfish.protocol.errors import UsageError

Report = dict[str, Any]


def bench(
    name: Annotated[str, typer.Argument(help="Which one; `ls` lists them, `all` runs every one.")] = "ls",
    quick: Annotated[bool, typer.Option("--quick", help="Small samples: each within 45 s, or 120 s.")] = False,
    minutes: Annotated[float | None, typer.Option("--minutes", help="How long `soak` runs; 30 unless --quick.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure, and say whether the targets are met. Exit code 1 if one is not."""
    from pilotfish.bench import registry

    if name == "ls":
        _list(as_json)
        return
    if minutes is not None and (name != "soak" or minutes <= 0):
        raise UsageError("--minutes is how long `bench soak` runs: give a number above 0, and no other benchmark")
    names = list(registry.NAMES) if name == "all" else [name]
    missed = 0
    for one in names:
        report = registry.run(one, quick, **({} if minutes is None else {"minutes": minutes}))
        _show(report, as_json)
        missed += any(target["met"] is False for target in report["targets"])
    if missed:
        raise typer.Exit(1)


def _list(as_json: bool) -> None:
    import json

    from pilotfish.bench.registry import NAMES, SUMMARIES

    words = {name: SUMMARIES.get(name, "") for name in NAMES}
    if as_json:
        print(json.dumps([{"name": name, "about": about} for name, about in words.items()]))
        return
    for name, about in words.items():
        print(f"{name:12} {about}")


def _show(report: Report, as_json: bool) -> None:
    """One JSON object per line, or a table of targets with the figures below."""
    import json

    if as_json:
        print(json.dumps(report), flush=True)
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    table = Table("target", "value", "goal", "", title=report["name"], title_justify="left", box=None, pad_edge=False)
    for target in report["targets"]:
        value = "-" if target["value"] is None else f"{target['value']:g} {target['unit']}"
        table.add_row(target["name"], Text(value), Text(target["goal"]), Text(*MARKS[target["met"]]))
    console.print(table)
    for name, value in report["figures"].items():
        console.print(Text(f"  {name}: {json.dumps(value)}", style="dim"))


MARKS = {True: ("met", "green"), False: ("MISSED", "red"), None: ("not measured long enough", "yellow")}
