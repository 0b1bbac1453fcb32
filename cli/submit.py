"""`submit`, `result` and `cancel`: a prompt through the queue, and its answer as it is committed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pilotfish.cli.options import BROKER, REQUEST, AsJson, Trace, takes
from pilotfish.protocol.errors import EmptyPrompt, UsageError

if TYPE_CHECKING:
    from pilotfish.protocol.messages import Prompt
    from pilotfish.protocol.settings import Settings

PATH_CHARS = 1024  # longer texts are never looked up as a path

Request = Annotated[str, typer.Argument(metavar="ID", help="The id that `submit` printed.")]
PromptText = Annotated[str, typer.Argument(metavar="PROMPT|-|FILE", help="The text, - for standard input, or a file.")]


@takes(*BROKER, *REQUEST, "draft_tokens")
def submit(
    settings: Settings,
    prompt: PromptText,
    text: Annotated[bool, typer.Option("--text", help="PROMPT is the text, even if a file is called so.")] = False,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text; no chat template.")] = False,
    wait: Annotated[bool, typer.Option("--wait/--detach", help="Stream the answer, or print the id and go.")] = True,
    trace: Trace = False,
    as_json: AsJson = False,
) -> None:
    """Send a prompt to any agent of the tenant and stream its answer.

    The answer goes to stdout as it becomes final, one line of figures to stderr. With --json one object is printed at
    the end, with --trace also each token and who wrote it. Ctrl-C stops the request everywhere. A PROMPT that names an
    existing file is read from it; --text says that it does not.
    """
    import json

    from pilotfish.cli import requests
    from pilotfish.cli.processes import run

    message = new_prompt(settings, prompt_text(prompt, literal=text), raw=raw)
    if wait:
        run(requests.submit(settings, message, requests.printer(as_json=as_json, trace=trace)))
        return
    run(requests.send(settings, message))
    print(json.dumps({"request": message.request, "seed": message.sampling.seed}) if as_json else message.request)


@takes(*BROKER)
def result(
    settings: Settings,
    request: Request,
    wait: Annotated[bool, typer.Option("--wait", help="Follow the answer to its end.")] = False,
    trace: Trace = False,
    as_json: AsJson = False,
) -> None:
    """Print what a submitted prompt has got so far; results are kept for an hour. Exit code 1 if it is unfinished."""
    from pilotfish.cli import requests
    from pilotfish.cli.processes import run

    checked(request)
    printer = requests.printer(as_json=as_json, trace=trace)
    run(requests.result(settings, request, printer, to_end=wait))


@takes(*BROKER)
def cancel(settings: Settings, request: Request) -> None:
    """Stop a submitted prompt, on its agent and in the cloud, or before anyone takes it."""
    from pilotfish.cli import requests
    from pilotfish.cli.processes import run

    checked(request)
    run(requests.cancel(settings, request))


# --- what was given ------------------------------------------------------------------------------------------


def prompt_text(prompt: str, *, literal: bool) -> str:
    """The text itself, of standard input, or of the file it names. Raises UsageError or EmptyPrompt."""
    text = prompt if literal else _read(prompt)
    if not text.strip():
        raise EmptyPrompt("the prompt is empty: give some text, a file, or - for standard input")
    return text


def _read(prompt: str) -> str:
    import sys

    try:
        if prompt == "-":
            return sys.stdin.read()
        path = Path(prompt)
        if len(prompt) <= PATH_CHARS and "\n" not in prompt and prompt:
            if path.is_file():
                return path.read_text(encoding="utf-8")
            if prompt.startswith(("/", "./", "../", "~/")) and " " not in prompt:
                raise UsageError(f"there is no file {prompt}: check the path, or add --text to send it as it is")
    except UnicodeDecodeError:
        source = "standard input" if prompt == "-" else prompt
        raise UsageError(f"{source} is not UTF-8 text: convert it first") from None
    except OSError as error:
        raise UsageError(f"{prompt} cannot be read ({error.strerror}): with --text it is the prompt itself") from None
    return prompt


def new_prompt(settings: Settings, text: str, *, raw: bool) -> Prompt:
    """A request with a fresh id. Raises UsageError for a text no message can hold."""
    import secrets

    from pydantic import ValidationError

    from pilotfish.edge_agent.launch import sampling
    from pilotfish.protocol.messages import Prompt

    if settings.privacy == "local_only":
        raise UsageError(
            "a submitted prompt travels through Redis, so it cannot be local_only: use `pilotfish chat` with "
            "--privacy local_only"
        )
    origins = settings.origins()  # what was not chosen here is the agent's to choose
    try:
        return Prompt(
            request=secrets.token_hex(16),
            text=text,
            raw=raw,
            mode=settings.mode,
            on_cloud_loss=settings.on_cloud_loss,
            max_tokens=settings.max_tokens,
            sampling=sampling(settings),
            draft_tokens=settings.draft_tokens,
            max_disagreement=None if origins["max_disagreement"] == "default" else settings.max_disagreement,
            deadline_ms=settings.deadline_ms,
        )
    except ValidationError as error:
        told = error.errors(include_url=False, include_input=False)[0]
        raise UsageError(f"the prompt is not possible: {told['msg']}. Shorten it") from None


def checked(request: str) -> None:
    """Raise UsageError for an id that cannot be one."""
    if len(request) != 32 or set(request) - set("0123456789abcdef"):
        raise UsageError(f"{request[:80]!r} is no request id: `pilotfish submit --detach` prints one (32 hex digits)")
