"""`cache index|lookup|forget`: what the cloud's workers hold, who is warm for a prompt, one worker made to start over.

The looking is in `cloud_inspection.py`; nothing here is reserved or changed, but by `forget`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from pilotfish.cli.options import BROKER, AsJson, takes

if TYPE_CHECKING:
    from pilotfish.cli.cloud_inspection import Indexed, Warmth
    from pilotfish.protocol.settings import Settings


@takes(*BROKER, "target")
def index(settings: Settings, as_json: AsJson = False) -> None:
    """List what each worker holds: blocks, prefill rate, tokens queued, predictions that came true."""
    import asyncio
    import json
    from dataclasses import asdict

    found = asyncio.run(_index(settings))
    if as_json:
        print(json.dumps([asdict(one) for one in found]))
        return
    for one in found:
        print(f"target {one.target}  worker {one.worker}  {_held(one)}")
    if not found:
        print("nobody keeps an index: no worker runs, none has a prefix cache, or --routing is off")


@takes(*BROKER, "target", "cache_key", "draft_model")
def lookup(
    settings: Settings,
    prompt: Annotated[str, typer.Argument(help="The prompt; - reads it from stdin.")],
    raw: Annotated[bool, typer.Option("--raw", help="No chat template.")] = False,
    as_json: AsJson = False,
) -> None:
    """Say how many tokens of a prompt each worker has cached for this tenant. Nothing is reserved."""
    import asyncio
    import json
    import sys
    from dataclasses import asdict

    text = sys.stdin.read() if prompt == "-" else prompt
    found = asyncio.run(_lookup(settings, text, raw))
    if as_json:
        print(json.dumps([asdict(one) for one in found]))
        return
    for one in found:
        print(f"worker {one.worker}  {one.cached_tokens} of {one.tokens} tokens cached")
    if not found:
        print("nobody keeps an index: no worker runs, none has a prefix cache, or --routing is off")


@takes(*BROKER, "target")
def forget(settings: Settings, worker: Annotated[str, typer.Argument(help="As `cache index` names it.")]) -> None:
    """Drop a worker's part of the index; it tells it again with its next beat. Its own cache stays."""
    import asyncio

    asyncio.run(_forget(settings, worker))
    print(f"the index knows nothing of {worker} until its next beat")


def _held(one: Indexed) -> str:
    equal = f"{one.predicted_equal}/{one.predicted} predictions equal" if one.predicted else "no predictions yet"
    return f"{one.blocks} of {one.kv_blocks} blocks  {one.rate:.0f} tokens/s  {one.queued} tokens queued  {equal}"


async def _index(settings: Settings) -> list[Indexed]:
    from pilotfish.cli import cloud_inspection, requests

    async with requests.shell(settings) as broker:
        return await cloud_inspection.indexed(broker.redis, settings.target or "")


async def _lookup(settings: Settings, text: str, raw: bool) -> list[Warmth]:
    from pilotfish.cli import cloud_inspection, requests

    async with requests.shell(settings) as broker:
        return await cloud_inspection.warmth(broker.redis, settings, text, chat=not raw)


async def _forget(settings: Settings, worker: str) -> None:
    from pilotfish.cli import cloud_inspection, requests

    async with requests.shell(settings) as broker:
        await cloud_inspection.forget(broker.redis, settings.target or "", worker)


def join(app: typer.Typer) -> None:
    """Make these commands part of a group."""
    for command in (index, lookup, forget):
        app.command()(command)
