"""`chat`: a conversation with an agent of its own, in this process; the history goes along with every turn."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from pilotfish.cli.options import BROKER, DRAFT, MACHINE, REQUEST, Trace, takes

if TYPE_CHECKING:
    from pilotfish.protocol.settings import Settings


@takes(*BROKER, "target", "agent", *REQUEST, *DRAFT, *MACHINE)
def chat(
    settings: Settings,
    system: Annotated[str, typer.Option("--system", help="What the model is told first.")] = "",
    trace: Trace = False,
) -> None:
    """Talk with the model. Ctrl-C stops an answer; /new forgets the conversation; /exit or Ctrl-D ends it.

    Needs a worker, but no running agent. With --mode edge_only it needs no Redis either.
    """
    from pilotfish.cli.conversation import Conversation, Talk
    from pilotfish.cli.run import fetch_draft

    fetch_draft(settings)
    with Conversation(settings, system) as conversation:
        Talk(conversation, trace=trace).run()
