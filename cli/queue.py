"""`queue ls` and `queue peek`: what waits, who serves, what an entry says. Nothing is consumed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from pilotfish.cli.options import BROKER, AsJson, Help, takes

if TYPE_CHECKING:
    from pilotfish.protocol.inspection import Peer, Queue
    from pilotfish.protocol.settings import Settings

app = typer.Typer(help="Look at the queue without changing it.", no_args_is_help=True)


@app.callback()
def _queue(help: Help = False) -> None: ...


@app.command()
@takes(*BROKER)
def ls(settings: Settings, as_json: AsJson = False) -> None:
    """List streams (length, in somebody's hands, age of the oldest), workers and agents."""
    import asyncio
    import json

    found = asyncio.run(_look(settings))
    if as_json:
        print(json.dumps(found.as_json()))
    else:
        _show(found)


@app.command()
@takes(*BROKER)
def peek(
    settings: Settings,
    stream: Annotated[str, typer.Argument(help="A stream as `queue ls` names it; unset: all of them.")] = "",
    dlq: Annotated[bool, typer.Option("--dlq", help="Dead letters only.")] = False,
    count: Annotated[int, typer.Option("-n", min=1, max=10_000, help="At most so many of each stream.")] = 10,
    as_json: AsJson = False,
) -> None:
    """Print the oldest entries as JSON, one per line (with --json: as one list), without taking them."""
    import asyncio
    import json

    entries = asyncio.run(_peek(settings, stream, dlq, count))
    for entry in [entries] if as_json else entries:
        print(json.dumps(entry, ensure_ascii=False))


async def _look(settings: Settings) -> Queue:
    from pilotfish.cli import requests
    from pilotfish.protocol import inspection

    async with requests.shell(settings) as broker:
        return await inspection.look(broker.redis, settings.tenant)


async def _peek(settings: Settings, stream: str, dlq: bool, count: int) -> list[dict[str, Any]]:
    from pilotfish.cli import requests
    from pilotfish.protocol import inspection

    async with requests.shell(settings) as broker:
        chosen = [stream]
        if not stream:
            found = await inspection.look(broker.redis, settings.tenant)
            chosen = [one.key for one in found.streams if one.kind == "dead letters" or not dlq]
        return [entry for key in chosen for entry in await inspection.peek(broker.redis, key, count)]


# --- for people ----------------------------------------------------------------------------------------------


def _show(found: Queue) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    table = Table("stream", "kind", *(_right(name) for name in ("length", "taken", "oldest")), box=None, pad_edge=False)
    for one in found.streams:
        table.add_row(Text(one.key), one.kind, str(one.length), str(one.pending), age(one.oldest_ms))
    console.print(table if found.streams else "no streams: nothing has been queued or served here")
    for target in found.targets:
        console.print(Text(f"\ntarget {target.id}  {target.name}"))
        for worker in target.workers:
            console.print(Text(f"  worker {_line(worker)}"))
    console.print(Text("\nagents" if found.agents else "\nno agents"))
    for agent in found.agents:
        console.print(Text(f"  agent {_line(agent)}"))


def _right(name: str) -> Any:
    from rich.table import Column

    return Column(name, justify="right")


def _line(peer: Peer) -> str:
    said = "  ".join(f"{field}={value}" for field, value in peer.beat.items())
    return f"{peer.name}  {said if peer.alive else 'gone'}"


def age(ms: int | None) -> str:
    """A span as a person says it."""
    if ms is None:
        return "-"
    for size, unit in ((86_400_000, "d"), (3_600_000, "h"), (60_000, "min"), (1_000, "s")):
        if ms >= size:
            return f"{ms / size:.0f} {unit}"
    return f"{ms} ms"
