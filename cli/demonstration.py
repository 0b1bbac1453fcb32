"""The demo itself: questions through the queue in two modes, shown live, then side by side.

Starts and stops its own Redis (unless REDIS_URL is set), worker and agent. Knows the queue as a shell does, no model.
"""

from __future__ import annotations

import json
import secrets
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain, zip_longest
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pilotfish.cli.pair import Pair, logs_folder, some_redis
from pilotfish.cli.processes import stop_signals
from pilotfish.cli.render import acceptance, legend, traced, visible
from pilotfish.cli.requests import Answer, Pieces, follow
from pilotfish.cli.submit import new_prompt
from pilotfish.cli.talk import say
from pilotfish.protocol.errors import Cancelled, ModelError
from pilotfish.protocol.messages import Mode, Summary
from pilotfish.protocol.settings import Settings
from pilotfish.protocol.shell import ShellBroker

DRAFTED: Mode = "exact"
ALONE: Mode = "cloud_only"
ANSWER_TOKENS = 72  # no answer of the evaluation file is longer


@dataclass(frozen=True, slots=True)
class Question:
    """One row of the evaluation file; code to continue has no answer."""

    family: str
    prompt: str
    answer: str | None


@dataclass(slots=True)
class Run:
    """A mode's answers, one per question."""

    mode: Mode
    answers: list[Answer] = field(default_factory=list)

    @property
    def total(self) -> Summary:
        """The sum of what the answers cost."""
        parts = [answer.summary or Summary() for answer in self.answers]
        names = ("tokens", "accepted", "corrected", "continued", "rounds", "cloud_rows", "cloud_steps", "total_ms")
        return Summary(**{name: sum(getattr(part, name) for part in parts) for name in names})

    def right(self, questions: Sequence[Question]) -> int:
        """How many answers are the expected ones, to the letter."""
        return sum(a.text.strip() == q.answer for a, q in zip(self.answers, questions, strict=True) if q.answer)


def questions(count: int) -> list[Question]:
    """The first of every family, then the second, and so on. Raises ModelError without the evaluation file."""
    from pilotfish.demo.pair import EVAL_FILE

    try:
        rows = [Question(**json.loads(line)) for line in EVAL_FILE.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise ModelError(f"{EVAL_FILE} cannot be read ({error.strerror}): install pilotfish again") from None
    families: dict[str, list[Question]] = {}
    for row in rows:
        families.setdefault(row.family, []).append(row)
    in_turn = chain.from_iterable(zip_longest(*families.values()))
    return [row for row in in_turn if row is not None][:count]


# --- the course of it ----------------------------------------------------------------------------------------


async def run(settings: Settings, count: int, *, as_json: bool) -> bool:
    """The whole demo; True if both modes gave the same texts."""
    import asyncio

    settings = settings.suggest(drafting="always")  # shown even where this machine's target is faster by itself
    asked, logs = questions(count), logs_folder()
    me = asyncio.current_task()
    assert me
    async with stop_signals() as told:
        told.add_done_callback(lambda _: me.cancel())
        try:
            with some_redis(settings, own=True) as (url, words):
                say(f"Redis: {words}")
                async with Pair(settings, url, logs) as pair:
                    await pair.start(say)
                    both = await _both(settings, pair, asked)
                    say("stopping agent, worker" + (", Redis" if words.startswith("private") else ""))
        except asyncio.CancelledError:
            say("")  # an answer was being written on this line
            raise Cancelled("stopped; nothing is left running") from None
    shutil.rmtree(logs, ignore_errors=True)  # kept only when something went wrong
    difference = first_difference(asked, *both)
    _report(asked, both, difference, as_json=as_json)
    return difference is None


async def _both(settings: Settings, pair: Pair, asked: list[Question]) -> tuple[Run, Run]:
    """Every question in both modes, after one that warms the engines up and is not counted."""
    broker = ShellBroker(pair.redis, settings.tenant)
    seed = secrets.randbits(32) if settings.seed is None else settings.seed
    screen = Screen()
    for mode in (DRAFTED, ALONE):
        await _ask(settings, broker, asked[0], mode, seed, lambda _: None)
    runs = Run(DRAFTED), Run(ALONE)
    for current in runs:
        screen.begin(current.mode)
        for question in asked:
            screen.question(question)
            current.answers.append(await _ask(settings, broker, question, current.mode, seed, screen.pieces))
            screen.end(current.answers[-1], question)
    return runs


async def _ask(
    settings: Settings, broker: ShellBroker, question: Question, mode: Mode, seed: int, show: Callable[[Pieces], None]
) -> Answer:
    chosen = settings.origins()["max_tokens"] != "default"
    most = settings.max_tokens if chosen else ANSWER_TOKENS
    wish = settings.model_copy(update={"mode": mode, "seed": seed, "max_tokens": most})
    prompt = new_prompt(wish, question.prompt, raw=question.answer is None)
    answer = Answer(prompt.request)
    await broker.submit(prompt)
    await follow(broker, answer, _Shown(show))
    answer.check()
    return answer


@dataclass
class _Shown:
    """A printer that only shows pieces."""

    pieces: Callable[[Pieces], None]

    def end(self, answer: Answer) -> None:
        """The screen has its own end."""


# --- the screen ----------------------------------------------------------------------------------------------


class Screen:
    """The live view on stderr: tokens as they come on a terminal, one plain line per answer elsewhere."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False, markup=False, emoji=False)
        self.live = self.console.is_terminal

    def begin(self, mode: Mode) -> None:
        """A heading."""
        words = "exact: drafted here, verified by the target" if mode == DRAFTED else "cloud_only: the target alone"
        self.console.print(Text(f"\n{words}", style="bold"))
        if self.live and mode == DRAFTED:
            self.console.print(legend())

    def question(self, question: Question) -> None:
        """What is asked; the answer follows on the same line."""
        shown = visible(question.prompt).replace("\n", "⏎")
        self.console.print(Text(shown if len(shown) <= 70 else f"{shown[:69]}…", style="dim"), end=" ")

    def pieces(self, new: Pieces) -> None:
        """Tokens in the style of their origin."""
        if self.live:
            on_one_line = [(text.replace("\n", "⏎"), origin) for text, origin in new]
            self.console.print(traced(on_one_line), end="", soft_wrap=True)

    def end(self, answer: Answer, question: Question) -> None:
        """How it went."""
        summary = answer.summary or Summary()
        if not self.live:
            self.console.print(Text(visible(answer.text).replace("\n", "⏎")), end="", soft_wrap=True)
        mark = "" if question.answer is None else " ✓" if answer.text.strip() == question.answer else " ✗"
        self.console.print(Text(f"{mark}  {summary.tokens} tokens, {summary.total_ms:.0f} ms", style="dim"))


# --- the report ----------------------------------------------------------------------------------------------


def first_difference(asked: Sequence[Question], one: Run, other: Run) -> str | None:
    """Where the two texts part, in words; None if they are equal token by token."""
    for question, a, b in zip(asked, one.answers, other.answers, strict=True):
        if a.ids != b.ids:
            at = next(i for i, (x, y) in enumerate(zip_longest(a.ids, b.ids)) if x != y)
            told = f"{_from(a, at)!r} ({one.mode}) against {_from(b, at)!r} ({other.mode})"
            return f"{question.prompt!r}, token {at}: {told}"
    return None


def _from(answer: Answer, at: int) -> str:
    return "".join(piece for piece, _ in answer.said[at : at + 8])


def figures(run: Run, asked: Sequence[Question]) -> dict[str, Any]:
    """A mode's sums, and the ratios a person compares."""
    total = run.total
    tokens = max(1, total.tokens)
    return {
        "tokens": total.tokens,
        "right": run.right(asked),
        "asked": sum(question.answer is not None for question in asked),
        "accepted": total.accepted,
        "corrected": total.corrected,
        "continued": total.continued,
        "acceptance": acceptance(total),
        "rounds": total.rounds,
        "cloud_steps_per_token": total.cloud_steps / tokens,
        "cloud_rows_per_token": total.cloud_rows / tokens,
        "tokens_per_second": 1000 * tokens / (total.total_ms or 1),
        "total_ms": total.total_ms,
    }


def _report(asked: list[Question], both: tuple[Run, Run], difference: str | None, *, as_json: bool) -> None:
    with_draft, without = (figures(one, asked) for one in both)
    if as_json:
        body = {"equal": difference is None, "difference": difference, DRAFTED: with_draft, ALONE: without}
        print(json.dumps(body))
        return
    console = Console(highlight=False, markup=False)
    console.print(comparison(with_draft, without))
    verdict = "the texts are equal, token by token" if difference is None else f"THE TEXTS DIFFER: {difference}"
    console.print(Text(verdict, style="bold green" if difference is None else "bold red"), soft_wrap=True)
    say("Both models share this machine, so compare steps and rows per token rather than times.")
    sys.stdout.flush()


def comparison(with_draft: dict[str, Any], without: dict[str, Any]) -> Table:
    """Both modes side by side."""
    table = Table("", "with drafts", "without", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, row in ROWS.items():
        table.add_row(name, row(with_draft), row(without))
    return table


ROWS: dict[str, Callable[[dict[str, Any]], str]] = {
    "tokens": lambda f: f"{f['tokens']}",
    "answers right": lambda f: f"{f['right']} of {f['asked']}",
    "accepted, corrected, continued": lambda f: f"{f['accepted']}, {f['corrected']}, {f['continued']}",
    "acceptance": lambda f: "-" if f["acceptance"] is None else f"{f['acceptance']:.2f}",
    "rounds": lambda f: f"{f['rounds']}",
    "cloud steps per token": lambda f: f"{f['cloud_steps_per_token']:.2f}",
    "cloud rows per token": lambda f: f"{f['cloud_rows_per_token']:.2f}",
    "tokens per second": lambda f: f"{f['tokens_per_second']:.0f}",
    "milliseconds": lambda f: f"{f['total_ms']:.0f}",
}
