"""`calibrate`: from a wish (how much may differ, or how much shall stay here) to a setting, and what it will do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from pilotfish.cli.options import BROKER, DRAFT, MACHINE, AsJson, takes

if TYPE_CHECKING:
    from pilotfish.protocol.settings import Settings


@takes(*BROKER, "target", "agent", "temperature", "max_tokens", "max_disagreement", *DRAFT, *MACHINE)
def calibrate(
    settings: Settings,
    target_offload: Annotated[
        float | None, typer.Option("--target-offload", help="Share of tokens that shall stay unverified: 0 to 1.")
    ] = None,
    prompts: Annotated[
        str, typer.Option("--prompts", metavar="FILE|-|demo", help="Learn from these first, one a line; demo: ours.")
    ] = "",
    as_json: AsJson = False,
) -> None:
    """Turn a wish into a setting of `gated` mode, and say what to expect, with an interval.

    Reads what agents of this machine have learnt (they do so while they serve). With --prompts it first learns from
    those: each is answered in exact mode, which needs a worker. Exit code 1 if what is known is not enough.
    """
    from pilotfish.cli import calibration
    from pilotfish.cli.processes import run
    from pilotfish.cli.run import fetch_draft
    from pilotfish.cli.talk import say
    from pilotfish.protocol.errors import UsageError

    if target_offload is not None and not 0 < target_offload <= 1:
        raise UsageError(f"--target-offload {target_offload:g} is no share of the tokens: take more than 0, at most 1")
    quality = None
    if prompts:
        fetch_draft(settings)
        quality = run(calibration.learn(settings, calibration.prompt_lines(prompts)))
    learnt = calibration.known(settings)
    report = calibration.Report.of(learnt, settings.max_disagreement, target_offload, quality)
    calibration.show(report, as_json=as_json)
    if prompts:
        say("an agent that has answered requests already knows this once it starts again")
    if not report.enough:
        raise typer.Exit(1)
