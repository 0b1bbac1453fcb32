"""`demo`: all of it on this machine: start, ask a dozen questions with and without drafts, compare, stop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from pilotfish.cli.options import DRAFT, MACHINE, TARGET, AsJson, takes

if TYPE_CHECKING:
    from pilotfish.protocol.settings import Settings

DEMO_OPTIONS = (
    "redis_url", "tls_ca", "allow_plaintext", "tenant", "temperature", "top_k", "top_p", "min_p", "seed",
    "max_tokens", "deadline_ms",
)  # fmt: skip


@takes(*DEMO_OPTIONS, *TARGET, *DRAFT, *MACHINE)
def demo(
    settings: Settings,
    prompts: Annotated[int, typer.Option("--prompts", min=1, max=400, help="How many questions to ask.")] = 12,
    as_json: AsJson = False,
) -> None:
    """Watch it work: Redis, a worker and an agent start here, answer a dozen questions, and end.

    Each question goes through the queue twice: in exact mode (drafted here, verified by the target), then without
    drafts. Exit code 1 if the two texts differ.
    """
    import asyncio

    from pilotfish.cli.demonstration import run

    if not asyncio.run(run(settings, prompts, as_json=as_json)):
        raise typer.Exit(1)
