"""The command `pilotfish`: which commands there are, and how each of them ends.

Data goes to stdout, talk to stderr. Exit codes: 0 done, 1 failed, 2 asked for something that cannot be, 3 Redis or the
cloud did not answer, 130 stopped by Ctrl-C. An error is one sentence that says what to do. Every command imports what
it needs when it runs, so that `--help` is instant.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from pilotfish.cli import (
    ablate,
    acl,
    bench,
    cache,
    cache_index,
    calibrate,
    chat,
    config,
    demo,
    health,
    models,
    queue,
    run,
    submit,
    tenants,
    top,
)
from pilotfish.cli.options import Help
from pilotfish.cli.talk import say
from pilotfish.protocol.errors import PilotfishError

app = typer.Typer(
    name="pilotfish",
    help="A small model drafts on this device; a large one in the cloud answers for what the small one is unsure of.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(demo.demo)
app.command()(run.up)
app.command()(run.agent)
app.command()(run.worker)
app.command()(submit.submit)
app.command()(submit.result)
app.command()(submit.cancel)
app.command()(chat.chat)
app.command()(top.top)
app.add_typer(queue.app, name="queue")
app.add_typer(cache.app, name="cache")
cache_index.join(cache.app)
app.add_typer(models.app, name="models")
app.command()(acl.acl)
app.add_typer(tenants.app, name="tenants")
app.command()(calibrate.calibrate)
app.command()(bench.bench)
app.add_typer(ablate.app, name="ablate")
app.command()(config.doctor)
app.command()(health.health)
app.add_typer(config.app, name="config")


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(version("pilotfish"))
        raise typer.Exit


@app.callback()
def _pilotfish(
    debug: Annotated[bool, typer.Option("--debug", help="Log everything, and show where an error came from.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and end.", is_eager=True, callback=_version)
    ] = False,
    help: Help = False,
) -> None:
    import logging

    logging.basicConfig(stream=sys.stderr, level="WARNING", format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    if debug:
        logging.getLogger("pilotfish").setLevel("DEBUG")


def main(args: list[str] | None = None) -> None:
    """Run one command and leave with its exit code."""
    code = run_command(sys.argv[1:] if args is None else args)
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _discard_stdout()
    sys.exit(code)


def run_command(args: list[str]) -> int:
    """Run one command; every way to end becomes an exit code and at most one sentence on stderr."""
    try:
        return app(args, prog_name="pilotfish", standalone_mode=False) or 0
    except PilotfishError as error:
        return _told(str(error), error.exit_code)
    except typer.TyperException as error:  # unknown command or option, a missing argument
        return _misused(error)
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except (BrokenPipeError, SystemExit):  # `pilotfish ... | head`: typer turns it into sys.exit, and nothing else
        _discard_stdout()
        return 0
    except Exception as error:
        where = "" if _debugging() else ". Run `pilotfish --debug ...` to see where"
        return _told(f"unexpected {type(error).__name__}: {error}{where}", 1)


def _told(sentence: str, code: int) -> int:
    if _debugging():
        import traceback

        traceback.print_exc()
    say(f"pilotfish: {sentence}", "ERROR")
    return code


def _misused(error: typer.TyperException) -> int:
    """The parser's complaint as one line, with where to read on; a group without a command shows its help."""
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "pilotfish"
    complaint = getattr(error, "format_message", lambda: str(error))()
    if complaint.startswith("Usage:"):
        print(complaint, file=sys.stderr)
        return 2
    return _told(f"{' '.join(complaint.split()).rstrip('.')}. See `{command} --help`", 2)


def _debugging() -> bool:
    logging = sys.modules.get("logging")
    return bool(logging and logging.getLogger("pilotfish").isEnabledFor(logging.DEBUG))


def _discard_stdout() -> None:
    """Nobody reads it any more; the interpreter's own flush at exit must not complain."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
