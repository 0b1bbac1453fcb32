"""`config show` and `doctor`: what is set and by whom, and what this machine has and lacks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from pilotfish.cli.options import OPTIONS, AsJson, Help, takes

if TYPE_CHECKING:
    from pilotfish.protocol.settings import Settings

app = typer.Typer(help="Look at the settings.", no_args_is_help=True)


@app.callback()
def _config(help: Help = False) -> None: ...


@app.command()
@takes(*(name for name in OPTIONS if name != "log_level"))
def show(
    settings: Settings,
    origin: Annotated[bool, typer.Option("--origin", help="Say where each value comes from.")] = False,
    as_json: AsJson = False,
) -> None:
    """Print every setting as the other commands would see it: flag, else environment, else file, else default."""
    import json

    shown, origins = settings.shown(), settings.origins()
    if as_json:
        values = settings.model_dump(mode="json") | ({"redis_url": shown["redis_url"]} if settings.redis_url else {})
        both = {name: {"value": value, "origin": origins[name]} for name, value in values.items()}
        print(json.dumps(both if origin else values, indent=2))
        return
    wide, value_wide = max(map(len, shown)), max(map(len, shown.values()))
    for name, value in shown.items():
        print(f"{name:{wide}}  {value:{value_wide}}  {origins[name]}" if origin else f"{name:{wide}}  {value}")


@takes("redis_url", "tls_ca", "allow_plaintext", "draft_model", "preset", "cache_dir")
def doctor(settings: Settings, as_json: AsJson = False) -> None:
    """Look at this machine: Python, packages, engines, Redis, models, memory. Exit code 1 if something is wrong."""
    from rich.console import Console

    from pilotfish.cli.doctor import as_json as in_json
    from pilotfish.cli.doctor import checks, healthy, render

    found = checks(settings)
    if as_json:
        print(in_json(found))
    else:
        Console().print(render(found))
    if not healthy(found):
        raise typer.Exit(1)
