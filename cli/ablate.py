"""`ablate`: switch parts off, measure what each contributes, and read a report that says what it does not show."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pilotfish.cli.options import DRAFT, MACHINE, TARGET, AsJson, Help, takes
from pilotfish.protocol.errors import UsageError

if TYPE_CHECKING:
    from pilotfish.bench.ablation.experiment import Experiment
    from pilotfish.bench.ablation.measures import Prices
    from pilotfish.bench.ablation.run import Progress
    from pilotfish.protocol.settings import Settings

HOME = Path("ablations")  # where runs go that are not told where
QUICK = {"seeds": 1, "per_family": 1, "lessons": 10}
DRAWS = ("max_tokens", "temperature", "top_k", "top_p", "min_p", "deadline_ms")

ENGINE = tuple(name for name in TARGET if name != "cache_key")  # each run has a Redis, and tenants, of its own

app = typer.Typer(help="Measure what each part contributes.", no_args_is_help=True)

Run = Annotated[Path, typer.Argument(help="Folder of a run, as `ablate list` names it.")]
CloudHour = Annotated[float, typer.Option("--price-cloud-hour", min=0, help="Price of an hour of the cloud's engine.")]
EdgeHour = Annotated[float, typer.Option("--price-edge-hour", min=0, help="Price of an hour of drafting.")]
Gigabyte = Annotated[float, typer.Option("--price-gigabyte", min=0, help="Price of a gigabyte on the wire.")]


@app.callback()
def _ablate(help: Help = False) -> None: ...


@app.command()
@takes(*DRAWS, *DRAFT, *ENGINE, *MACHINE)
def run(
    settings: Settings,
    modes: Annotated[str, typer.Option("--modes", help="all, or some: a,b+c,a+SETTING=VALUE.")] = "all",
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Replicates of everything.")] = 5,
    rtt: Annotated[str, typer.Option("--rtt", help="Round-trip times edge to Redis, in ms.")] = "0,50",
    prompts: Annotated[Path | None, typer.Option("--prompts", help="JSON lines: prompt, answer, family.")] = None,
    per_family: Annotated[int | None, typer.Option("--per-family", min=1, help="Prompts of each family.")] = None,
    lessons: Annotated[int, typer.Option("--lessons", min=0, help="Prompts the gate learns from first.")] = 40,
    out: Annotated[Path | None, typer.Option("--out", help="Folder of the run; one that is there goes on.")] = None,
    one_worker: Annotated[bool, typer.Option("--one-worker", help="Never two workers at once: less memory.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="One seed, a prompt of each family: two minutes.")] = False,
    price_cloud_hour: CloudHour = 0.0,
    price_edge_hour: EdgeHour = 0.0,
    price_gigabyte: Gigabyte = 0.0,
    as_json: AsJson = False,
) -> None:
    """Run every mode over the same prompts on real processes, and write a report.

    Modes: baseline (always runs), no_confidence, no_draft_verify, no_kv_cache, edge_only, cloud_only; parts join with
    +, any setting is a part. Settings given as options hold for every mode; a mode's own come last. A run that was
    stopped goes on with the same command and --out. Exit code 1 if a request failed: the report names it.
    """
    from pilotfish.bench.ablation.experiment import Experiment
    from pilotfish.bench.ablation.measures import Prices

    sizes = QUICK if quick else {"seeds": seeds, "per_family": per_family, "lessons": lessons}
    experiment = Experiment(
        out or _new_folder(), modes, rtt_ms=_numbers(rtt), prompts=prompts, together=not one_worker,
        settings=_chosen(settings), **sizes,
    )  # fmt: skip
    _measure(experiment)
    failed = _report(experiment.out, Prices(price_cloud_hour, price_edge_hour, price_gigabyte), as_json)
    if failed:
        raise typer.Exit(1)


@app.command("list")
def list_(
    folder: Annotated[Path, typer.Argument(help="Where runs are.")] = HOME,
    as_json: AsJson = False,
) -> None:
    """List runs: how far, how many failures, what was asked."""
    import json

    from pilotfish.bench.ablation.catalogue import runs

    found = runs(folder)
    if as_json:
        print(json.dumps(found))
        return
    for one in found:
        state = "finished" if one["finished"] else f"{one['requests']} of {one['wanted']}"
        failed = f", {one['failed']} failed" if one["failed"] else ""
        print(f"{one['folder']}  {one['begun']}  {state}{failed}  {', '.join(one['variants'])}")
    if not found:
        raise UsageError(f"there are no runs in {folder}: `pilotfish ablate run --quick` makes one")


@app.command()
def report(
    run: Run,
    price_cloud_hour: CloudHour = 0.0,
    price_edge_hour: EdgeHour = 0.0,
    price_gigabyte: Gigabyte = 0.0,
    as_json: AsJson = False,
) -> None:
    """Write a run's tables, plots and reports again, finished or not; with prices, its costs too."""
    from pilotfish.bench.ablation.measures import Prices

    _report(run, Prices(price_cloud_hour, price_edge_hour, price_gigabyte), as_json)


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(help="The run before.")],
    b: Annotated[Path, typer.Argument(help="The run after.")],
    as_json: AsJson = False,
) -> None:
    """Compare two runs, the second against the first, over the prompts and seeds both have.

    They were not measured at the same time: what the machine did meanwhile is in the difference, and in no interval.
    """
    import json

    from pilotfish.bench.ablation.compare import compare as compared

    rows, differences = compared(a, b)
    if as_json:
        print(json.dumps({"rows": rows, "differences": differences}))
        return
    for words in (*differences, "time: the machine may have changed in between, which no interval knows"):
        print(f"differs: {words}")
    _show(rows)


# --- parts ---------------------------------------------------------------------------------------------------


def _new_folder() -> Path:
    import time

    return HOME / time.strftime("%Y%m%d-%H%M%S")


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"--rtt {text!r} is no list of milliseconds: write 0,20,50") from None


def _chosen(settings: Settings) -> dict[str, Any]:
    """What the command line set; environment and file are read by the processes themselves."""
    given = (name for name, origin in settings.origins().items() if origin == "cli" and name != "log_level")
    values = ((name, getattr(settings, name)) for name in given)
    return {name: str(value) if isinstance(value, Path) else value for name, value in values}


def _measure(experiment: Experiment) -> None:
    """With a bar that knows how long it will take."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    from pilotfish.bench.ablation.run import Course
    from pilotfish.cli.processes import run
    from pilotfish.protocol.errors import Cancelled

    course = Course(experiment)
    columns = (BarColumn(30), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Bar(*columns, console=Console(stderr=True), speed_estimate_period=120) as bar:
        try:
            run(course.run(_shown(bar)))
        except Cancelled:
            again = f"the same command with --out {experiment.out} goes on from here"
            raise Cancelled(f"stopped; {again}") from None


def _shown(bar: Any) -> Progress:
    task = bar.add_task("", total=None)

    def show(done: int, total: int, what: str) -> None:
        bar.update(task, completed=done, total=total, description=what)

    return show


def _report(folder: Path, prices: Prices, as_json: bool) -> int:
    """Write it and say where; returns how many requests failed."""
    import json

    from pilotfish.bench.ablation.catalogue import described
    from pilotfish.bench.ablation.report import write

    file = write(folder, prices)
    told = described(folder)
    print(json.dumps({**told, "report": str(file)}) if as_json else file)
    return int(told["failed"])


def _show(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    from pilotfish.bench.ablation.report import verdict_words

    table = Table("mode", "RTT", "figure", "b against a", "pairs", box=None, pad_edge=False)
    for row in rows:
        table.add_row(row["variant"], f"{row['rtt_ms']:g} ms", row["measure"], verdict_words(row), str(row["pairs"]))
    Console(highlight=False, markup=False).print(table)
