"""`cache`: the draft's saved KV states on this device's disk, and what running agents say of theirs in memory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pilotfish.cli.options import BROKER, AsJson, Help, takes
from pilotfish.cli.talk import say

if TYPE_CHECKING:
    from pilotfish.cache.state_folder import Stored
    from pilotfish.protocol.settings import Settings

app = typer.Typer(
    help="Look at the draft's saved KV states and at what the cloud's workers hold.", no_args_is_help=True
)
Names = Annotated[list[str] | None, typer.Argument(help="States as `cache ls` names them, or how these begin.")]


@app.callback()
def _cache(help: Help = False) -> None: ...


@app.command()
@takes("cache_dir")
def ls(settings: Settings, as_json: AsJson = False) -> None:
    """List the states on disk, the last used one first. What they are of stays private: ids are not shown."""
    import json

    found = [described(one) for one in stored(settings)]
    if as_json:
        print(json.dumps(found))
    else:
        _show(found, settings)


@app.command()
@takes(*BROKER, "cache_dir")
def stats(settings: Settings, as_json: AsJson = False) -> None:
    """Sum up the states on disk, and what running agents count: hits, misses, tokens not prefilled, evictions."""
    import asyncio
    import json

    from pilotfish.cli.render import counted
    from pilotfish.protocol.errors import BrokerError

    found = [described(one) for one in stored(settings)]
    disk = {"states": len(found), **{what: sum(one[what] for one in found) for what in ("tokens", "bytes")}}
    try:
        agents = asyncio.run(_agents(settings))
    except BrokerError as error:
        agents = {}
        say(f"agents are not asked: {error}", "WARNING")
    if as_json:
        print(json.dumps({"disk": disk, "agents": agents}))
        return
    print(
        f"disk   {counted(disk['states'], 'state')}  {counted(disk['tokens'], 'token')}  {disk['bytes'] / 1e6:.1f} MB"
    )
    for name, told in agents.items():
        print(f"agent  {name}  " + "  ".join(f"{what}={value}" for what, value in told.items()))
    if not agents:
        print("no agent that takes prompts is known: what agents have in memory is theirs to count")


@app.command("export")
@takes("cache_dir")
def export_(
    settings: Settings,
    file: Annotated[Path, typer.Argument(help="The archive to write.")],
    names: Names = None,
) -> None:
    """Write states, all or those named, to a file for another agent of the same model build. It holds private ids."""
    from pilotfish.cache.state_archive import export_states
    from pilotfish.cli.render import counted

    count = export_states(reversed(chosen(settings, names)), file)  # an import keeps the last ones, if not all
    print(f"{counted(count, 'state')} exported to {file}")


@app.command("import")
@takes("draft_model", "context", "edge_cache_disk_mb", "cache_dir")
def import_(
    settings: Settings,
    file: Annotated[Path, typer.Argument(help="An archive that `cache export` wrote.")],
) -> None:
    """Add an archive's states to those on disk. Another model build's are refused: exit code 2, and what differs.

    Import only what an agent you trust has exported: llama.cpp reads these bytes as its own memory.
    """
    from pilotfish.cache.state_archive import import_states
    from pilotfish.cli.render import counted
    from pilotfish.edge_agent.launch import draft_path, state_folder
    from pilotfish.protocol.errors import UsageError

    if not settings.edge_cache_disk_mb:
        raise UsageError("no disk is set aside for states: set edge_cache_disk_mb, here and for the agent")
    folder = state_folder(settings, draft_path(settings))
    found = import_states(file, folder)
    print(f"{counted(found.kept, 'state')} imported; agents that run find them at once")
    if found.left_out:
        room = f"longer than {settings.context} tokens, or beyond {settings.edge_cache_disk_mb:g} MB"
        say(f"{counted(found.left_out, 'state')} left out: {room}; see --context and --edge-cache-disk-mb", "WARNING")


@app.command()
@takes("cache_dir")
def evict(
    settings: Settings,
    names: Names = None,
    everything: Annotated[bool, typer.Option("--all", help="Remove every state.")] = False,
) -> None:
    """Remove states from disk. What a running agent has in memory goes when the agent ends."""
    from pilotfish.cli.render import counted
    from pilotfish.protocol.errors import UsageError

    if bool(names) == everything:
        raise UsageError("say which states to remove, as `pilotfish cache ls` names them, or --all")
    removed = stored(settings) if everything else chosen(settings, names)
    for one in removed:
        try:
            one.path.unlink(missing_ok=True)
        except OSError as error:
            raise UsageError(f"{one.path} cannot be removed: {error.strerror or error}") from error
    print(f"{counted(len(removed), 'state')} removed")


# --- what is there -------------------------------------------------------------------------------------------


def stored(settings: Settings) -> list[Stored]:
    """The states on disk with their headers, the last used one first. Raises UsageError if they cannot be read."""
    from pilotfish.cache.state_folder import entries, look
    from pilotfish.edge_agent.launch import states_path
    from pilotfish.protocol.errors import UsageError

    folder = states_path(settings)
    try:
        found = [one for entry in entries(folder) if (one := look(entry.path))]
    except OSError as error:
        raise UsageError(f"the saved states in {folder} cannot be read: {error.strerror or error}") from error
    return sorted(found, key=lambda one: -one.used_ns)


def chosen(settings: Settings, names: list[str] | None) -> list[Stored]:
    """Those that are named, else all. Raises UsageError for a name of none, and for no states at all."""
    from pilotfish.protocol.errors import UsageError

    found = stored(settings)
    if not found:
        raise UsageError("there are no saved states: an agent with --edge-cache-disk-mb above 0 writes them")
    for name in names or []:
        if not name or not any(one.path.stem.startswith(name) for one in found):
            raise UsageError(f"there is no saved state {name!r}: `pilotfish cache ls` names those there are")
    return [one for one in found if not names or one.path.stem.startswith(tuple(names))]


def described(one: Stored) -> dict[str, Any]:
    """A state in plain values."""
    from time import time_ns

    assert one.header
    return {
        "name": one.path.stem,
        "model": one.header.model,
        "build": one.header.build.model_dump(),
        "tokens": one.header.tokens,
        "bytes": one.n_bytes,
        "unused_ms": max(0, time_ns() - one.used_ns) // 1_000_000,
    }


async def _agents(settings: Settings) -> dict[str, dict[str, str]]:
    """Agent -> what its beat says of its cache; nobody where no Redis is set and none runs. Raises BrokerError."""
    from pilotfish.cli import redis_server, requests
    from pilotfish.protocol import inspection

    if not settings.redis_url and not redis_server.find():
        return {}
    async with requests.shell(settings) as broker:
        found = await inspection.look(broker.redis, settings.tenant)
    said = {peer.name: {k: v for k, v in peer.beat.items() if k.startswith("cache_")} for peer in found.agents}
    return {name: told for name, told in said.items() if told}


def _show(found: list[dict[str, Any]], settings: Settings) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from pilotfish.cli.queue import age
    from pilotfish.edge_agent.launch import states_path

    if not found:
        print(f"no saved states in {states_path(settings)}: an agent with --edge-cache-disk-mb above 0 writes them")
        return
    table = Table("state", "model", "kv", "tokens", "MB", "used", box=None, pad_edge=False)
    for one in found:
        megabytes, used = f"{one['bytes'] / 1e6:.1f}", f"{age(one['unused_ms'])} ago"
        table.add_row(one["name"], Text(one["model"]), one["build"]["kv"], str(one["tokens"]), megabytes, used)
    Console(highlight=False, soft_wrap=True).print(table)
