"""A submitted prompt from the shell's side: send it, follow it, print it, stop it."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

from pilotfish.cli.processes import check_cancelled
from pilotfish.cli.redis_url import redis_url
from pilotfish.cli.render import as_json, legend, summary_line, traced, visible
from pilotfish.protocol.broker import connect, ping
from pilotfish.protocol.errors import AnswerLost, Cancelled, PilotfishError, UsageError
from pilotfish.protocol.messages import (
    Accepted,
    CancelRequest,
    Failed,
    Finished,
    Origin,
    Prompt,
    Summary,
    Text,
    ToShell,
)
from pilotfish.protocol.settings import Settings
from pilotfish.protocol.shell import ShellBroker

GOODBYE_SECONDS = 2.0
Pieces = list[tuple[str, Origin]]


class Printer(Protocol):
    """Shows an answer: its pieces as they come, and its end."""

    def pieces(self, new: Pieces) -> None:
        """More of the text is final."""
        ...

    def end(self, answer: Answer) -> None:
        """The answer is over, or all that is there has been read."""
        ...


@dataclass
class Answer:
    """What an agent has said about one request so far."""

    request: str
    agent: str = ""
    ids: list[int] = field(default_factory=list)
    said: Pieces = field(default_factory=list)
    last: Finished | Failed | None = None

    def add(self, message: ToShell) -> Pieces:
        """Take one message in; returns the pieces that are new. An agent that took over starts again from token 0.

        Raises AnswerLost where the text does not join on to what was said before: nobody wrote such a text.
        """
        match message:
            case Accepted():
                self.agent = message.agent
            case Text():
                known = len(self.ids) - message.start
                self._check_joins(message)
                fresh = list(zip(message.pieces, message.origins, strict=True))[max(0, known) :]
                self.ids += message.ids[max(0, known) :]
                self.said += fresh
                return fresh
            case _:
                self.last = message
        return []

    def _check_joins(self, message: Text) -> None:
        end = len(self.ids)
        if message.start > end:
            raise AnswerLost(f"tokens {end} to {message.start - 1} of request {self.request} are lost: submit it again")
        overlap = self.ids[message.start : message.start + len(message.ids)]
        if list(message.ids[: len(overlap)]) != overlap:
            raise AnswerLost(
                f"two agents answered request {self.request} differently, one took it over: submit it again"
            )

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(piece for piece, _ in self.said)

    @property
    def summary(self) -> Summary | None:
        """What it cost, once it is finished."""
        return self.last.summary if isinstance(self.last, Finished) else None

    def check(self) -> None:
        """Raise what ended it, unless it ended by itself."""
        if isinstance(self.last, Failed):
            raise failure(self.last)
        if self.last and self.last.reason == "cancelled":
            raise Cancelled(f"request {self.request} was cancelled")


def failure(failed: Failed) -> PilotfishError:
    """The agent's error as one of ours: its sentence, and the exit code of its kind."""
    error = PilotfishError(failed.sentence)
    kinds = {kind.code: kind for kind in _tree(PilotfishError)}
    error.code, error.exit_code = failed.code, kinds.get(failed.code, PilotfishError).exit_code
    return error


def _tree(kind: type[PilotfishError]) -> list[type[PilotfishError]]:
    return [kind, *(below for child in kind.__subclasses__() for below in _tree(child))]


# --- talking to Redis ----------------------------------------------------------------------------------------


@asynccontextmanager
async def shell(settings: Settings) -> AsyncIterator[ShellBroker]:
    """The shell's side of the broker, once Redis has answered."""
    url = redis_url(settings)
    async with connect(url) as redis:
        await ping(redis, url)
        yield ShellBroker(redis, settings.tenant)


async def send(settings: Settings, prompt: Prompt) -> None:
    """Queue a prompt. Raises NoAgent when there is nobody to take it."""
    async with shell(settings) as broker:
        await broker.submit(prompt)


async def submit(settings: Settings, prompt: Prompt, printer: Printer) -> Answer:
    """Queue a prompt and print its answer. When this task is cancelled, so is the request."""
    async with shell(settings) as broker:
        await broker.submit(prompt)
        answer = Answer(prompt.request)
        try:
            await follow(broker, answer, printer)
        except asyncio.CancelledError:
            await stop(broker, answer)
            printer.end(answer)
            raise
    answer.check()
    return answer


async def follow(broker: ShellBroker, answer: Answer, printer: Printer, *, to_end: bool = True) -> None:
    """Feed printer and answer with everything said about the request."""
    try:
        async for message in broker.output(answer.request, follow=to_end):
            check_cancelled()
            if fresh := answer.add(message):
                printer.pieces(fresh)
    except PilotfishError:
        printer.end(answer)
        raise
    printer.end(answer)


async def stop(broker: ShellBroker, answer: Answer) -> None:
    """Cancel a request, and wait a moment for its end. Nobody has taken it yet: it is withdrawn."""
    note = CancelRequest(request=answer.request)
    if not answer.agent:
        await broker.withdraw(answer.request, Finished(request=answer.request, reason="cancelled", summary=Summary()))
        return
    await broker.tell_agent(answer.agent, note)
    again = Answer(answer.request)
    with suppress(TimeoutError, PilotfishError):
        async with asyncio.timeout(GOODBYE_SECONDS):
            async for message in broker.output(answer.request, follow=True):
                again.add(message)
    answer.last = again.last


async def result(settings: Settings, request: str, printer: Printer, *, to_end: bool) -> None:
    """Print what is there, or with `to_end` all there will be. Raises UsageError for a request nobody knows."""
    async with shell(settings) as broker:
        answer = Answer(request)
        await known(broker, answer)
        answer = Answer(request)  # from the beginning, this time for the printer
        await follow(broker, answer, printer, to_end=to_end)
    if answer.last is None:
        raise PilotfishError(f"request {request} is not finished: `pilotfish result --wait {request}` follows it")
    answer.check()


async def cancel(settings: Settings, request: str) -> None:
    """Stop a request that may run or wait."""
    async with shell(settings) as broker:
        answer = Answer(request)
        await known(broker, answer)
        if answer.last:
            print(f"request {request} is over already", file=sys.stderr)
            return
        await stop(broker, answer)
    print(f"request {request} is cancelled", file=sys.stderr)


async def known(broker: ShellBroker, answer: Answer) -> None:
    """Read what has been said. Raises UsageError when nothing has, and the request is not waiting either."""
    async for message in broker.output(answer.request, follow=False):
        answer.add(message)
    if not (answer.agent or answer.last or await _waiting(broker, answer.request)):
        raise UsageError(f"nobody knows request {answer.request}: results are kept for an hour, ids are of one tenant")


async def _waiting(broker: ShellBroker, request: str) -> bool:
    from pilotfish.protocol.inspection import prompts

    return any(getattr(prompt, "request", "") == request for prompt in await prompts(broker.redis, broker.tenant))


# --- printing ------------------------------------------------------------------------------------------------


def printer(*, as_json: bool, trace: bool) -> Printer:
    """How to show an answer."""
    if as_json:
        return JsonPrinter(trace=trace)
    return TracePrinter() if trace else PlainPrinter()


class PlainPrinter:
    """Text to stdout as it comes, the summary to stderr."""

    def pieces(self, new: Pieces) -> None:
        """As they are; on a terminal, control characters as pictures."""
        text = "".join(piece for piece, _ in new)
        self._write(visible(text) if sys.stdout.isatty() else text)

    def _write(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    def end(self, answer: Answer) -> None:
        """A line end, so that the shell's prompt starts on a line of its own."""
        if answer.said:
            self._write("\n")
        if answer.summary:
            print(summary_line(answer.summary), file=sys.stderr)


class TracePrinter(PlainPrinter):
    """Each token in the style of its origin (none where stdout is no terminal); the legend on stderr."""

    def __init__(self) -> None:
        from rich.console import Console

        self.console = Console(highlight=False, markup=False, emoji=False)
        Console(stderr=True, highlight=False).print(legend())

    def pieces(self, new: Pieces) -> None:
        """Styled."""
        self.console.print(traced(new), end="", soft_wrap=True)
        sys.stdout.flush()


@dataclass
class JsonPrinter:
    """One object at the end."""

    trace: bool = False

    def pieces(self, new: Pieces) -> None:
        """They come with the end."""

    def end(self, answer: Answer) -> None:
        """See `described`."""
        print(json.dumps(described(answer, trace=self.trace), ensure_ascii=False))


def described(answer: Answer, *, trace: bool) -> dict[str, Any]:
    """An answer as JSON: text, how it ended, what it cost, and with `trace` its tokens."""
    last = answer.last
    body: dict[str, Any] = {"request": answer.request, "agent": answer.agent, "text": answer.text}
    body["reason"] = last.reason if isinstance(last, Finished) else "failed" if last else "unfinished"
    if isinstance(last, Failed):
        body["error"] = {"code": last.code, "sentence": last.sentence}
    if answer.summary:
        body["summary"] = as_json(answer.summary)
    if trace:
        tokens = zip(answer.ids, answer.said, strict=True)
        body["tokens"] = [{"id": i, "text": piece, "origin": origin} for i, (piece, origin) in tokens]
    return body
