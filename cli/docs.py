"""docs/cli.md from the commands themselves; a test fails when the page is stale.

python -m pilotfish.cli.docs > docs/cli.md
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

WIDTH = 100
INTRO = """\
# The command line

Written by `python -m pilotfish.cli.docs > docs/cli.md`; a test fails when this page is stale.

Data goes to stdout, talk to stderr. Exit codes: 0 done; 1 failed; 2 asked for something that cannot be (a flag, a
file, a prompt, a pair); 3 Redis, a worker or an agent did not answer; 130 stopped by Ctrl-C, or cancelled. Every option
that names a setting can also be set by `PILOTFISH_<NAME>` or in a settings file: `pilotfish config show --origin` says
which holds.
"""


def page() -> str:
    """The whole page."""
    import typer

    from pilotfish.cli.main import app

    root = typer.main.get_command(app)
    return "\n".join([INTRO, *(_section(command, help_text) for command, help_text in helps(root, "pilotfish", None))])


def helps(command: Any, name: str, parent: Any) -> Iterator[tuple[str, str]]:
    """(command line, help) of a command and all below it."""
    context = command.make_context(name, [], parent=parent, resilient_parsing=True, terminal_width=WIDTH)
    yield context.command_path, command.get_help(context)
    for below, subcommand in getattr(command, "commands", {}).items():
        yield from helps(subcommand, below, context)


def _section(command: str, help_text: str) -> str:
    return f"## {command}\n\n```\n{help_text.strip()}\n```\n"


if __name__ == "__main__":
    print(page(), end="")
