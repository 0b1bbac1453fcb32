"""`top`: the whole fleet on a terminal, from Redis alone: workers, agents, queues, and how fast all of it goes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from pilotfish.cli.options import BROKER, AsJson, takes

if TYPE_CHECKING:
    from pilotfish.cli.fleet_view import Glimpse
    from pilotfish.protocol.broker import RedisBytes
    from pilotfish.protocol.settings import Settings


WIDE = 200  # columns of a file or pipe: nothing is cut there


@takes(*BROKER)
def top(
    settings: Settings,
    every: Annotated[float, typer.Option("--every", min=0.1, max=60, help="Seconds between two looks.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Look twice, print what happened between, and end.")] = False,
    as_json: AsJson = False,
) -> None:
    """Watch workers, agents and queues of the whole fleet. Where there is no terminal it prints once."""
    import sys

    from pilotfish.cli.processes import run

    if as_json or once or not sys.stdout.isatty():
        run(_once(settings, every, as_json))
    else:
        run(_watch(settings, every))


async def _once(settings: Settings, every: float, as_json: bool) -> None:
    import asyncio
    import json
    import sys

    from rich.console import Console

    from pilotfish.cli import requests
    from pilotfish.cli.fleet_view import screen, view

    async with requests.shell(settings) as broker:
        before = await _glimpse(broker.redis, settings.tenant)
        await asyncio.sleep(every)
        seen = view(before, await _glimpse(broker.redis, settings.tenant))
    if as_json:
        print(json.dumps(seen.as_json()))
    else:
        width = None if sys.stdout.isatty() else WIDE
        Console(highlight=False, width=width).print(screen(seen))


async def _watch(settings: Settings, every: float) -> None:
    """Until Ctrl-C. A Redis that goes away is told, and waited for."""
    import asyncio

    from rich.live import Live
    from rich.text import Text

    from pilotfish.cli import requests
    from pilotfish.cli.fleet_view import screen, view
    from pilotfish.cli.processes import check_cancelled
    from pilotfish.protocol.errors import BrokerError

    async with requests.shell(settings) as broker:
        before = await _glimpse(broker.redis, settings.tenant)
        with Live(screen(view(before, before)), screen=True, auto_refresh=False) as live:
            while True:
                await asyncio.sleep(every)
                check_cancelled()
                try:
                    now = await _glimpse(broker.redis, settings.tenant)
                    live.update(screen(view(before, now)), refresh=True)
                    before = now
                except BrokerError as error:
                    live.update(Text(str(error)), refresh=True)


async def _glimpse(redis: RedisBytes, tenant: str) -> Glimpse:
    import time

    from pilotfish.cli.fleet_view import Glimpse
    from pilotfish.protocol import inspection

    return Glimpse(time.monotonic(), await inspection.look(redis, tenant))
