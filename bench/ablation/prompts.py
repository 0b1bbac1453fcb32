"""What is asked: the evaluation set, or a user's own prompts with checkable answers, as JSON lines.

    {"prompt": "Add 2 and 3.", "answer": "2 + 3 = 5", "family": "add"}

`answer` may be null or missing: then speed is measured and accuracy is not. `family` groups prompts, "raw" continues
the text as it stands instead of asking it as a chat (the default for the family "code").
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from random import Random
from typing import Any

from pilotfish.protocol.errors import UsageError

CODE = "code"
FIELDS = ("prompt", "answer", "family", "raw")


@dataclass(frozen=True, slots=True)
class Question:
    """One prompt; `number` is its line in the file, counted from 1, and its name everywhere."""

    number: int
    prompt: str
    answer: str | None = None
    family: str = ""
    raw: bool = False


@dataclass(frozen=True, slots=True)
class Questions:
    """What is measured, what the parts that learn may learn from beforehand, and where both come from."""

    asked: list[Question]
    lessons: list[Question]
    source: dict[str, Any]


def evaluation_file() -> Path:
    """The demo's: 360 questions of 18 families, 40 pieces of code."""
    from pilotfish.demo.pair import EVAL_FILE

    return EVAL_FILE


def choose(file: Path | None, per_family: int | None, n_lessons: int) -> Questions:
    """The first `per_family` of each family (None: all), families in turn; lessons are prompts that are not asked.

    Raises UsageError for a file that cannot be read, has a malformed line, or is empty.
    """
    path = file or evaluation_file()
    rows = read(path)
    asked = in_turn(rows, per_family)
    left = [row for row in in_turn(rows, None) if row not in asked]
    lessons = left[:n_lessons]
    if len(lessons) < n_lessons:
        lessons += _more(n_lessons - len(lessons)) if file is None else asked[: n_lessons - len(lessons)]
    source = {
        "name": path.name if file else "the demo pair's evaluation set",
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "asked": len(asked),
        "with_answer": sum(row.answer is not None for row in asked),
        "lessons_are_asked_too": any(row in asked for row in lessons),
    }
    return Questions(asked, lessons, source)


def _more(count: int) -> list[Question]:
    """Questions of the demo's families whose operands are not in the evaluation set."""
    from pilotfish.demo import tasks

    rng, found = Random(20_26), []
    for number in range(count):
        family, task = tasks.draw_any(rng)
        found.append(Question(-1 - number, task.prompt, task.answer, family))
    return found


def in_turn(rows: Iterable[Question], per_family: int | None) -> list[Question]:
    """The first of every family, then the second, and so on, up to `per_family`."""
    families: dict[str, list[Question]] = {}
    for row in rows:
        families.setdefault(row.family, []).append(row)
    turns = zip_longest(*(one[:per_family] for one in families.values()))
    return [row for row in chain.from_iterable(turns) if row is not None]


# --- the file ------------------------------------------------------------------------------------------------


def read(path: Path) -> list[Question]:
    """Every line; blank ones are skipped. Raises UsageError that names a malformed line by its number."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}): give a file of JSON lines") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not UTF-8 text: convert it first") from None
    lines = enumerate(text.split("\n"), 1)  # not splitlines: JSON may hold line breaks of Unicode, editors count none
    found = [_question(path, number, line) for number, line in lines if line.strip()]
    if not found:
        raise UsageError(f"{path} holds no prompts: one JSON object a line, with prompt, answer and family")
    return found


def _question(path: Path, number: int, line: str) -> Question:
    where = f"{path}, line {number}"
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UsageError(f"{where} is no JSON object: {error.msg} at character {error.colno}") from None
    if not isinstance(row, dict):
        raise UsageError(f'{where} is no JSON object: write {{"prompt": ..., "answer": ..., "family": ...}}')
    if unknown := sorted(row.keys() - set(FIELDS)):
        raise UsageError(f"{where} has a field {unknown[0]!r}: it takes {', '.join(FIELDS)}")
    prompt, answer, family = row.get("prompt"), row.get("answer"), row.get("family", "")
    if not isinstance(prompt, str) or not prompt.strip():
        raise UsageError(f"{where} has no prompt: it needs a text that is not empty")
    if not _is_text(prompt):
        raise UsageError(f"{where} has half a surrogate pair in its prompt: write the character itself")
    if not isinstance(answer, str | None):
        raise UsageError(f"{where} has an answer that is no text: quote it, or use null where there is none")
    if not isinstance(family, str):
        raise UsageError(f"{where} has a family that is no text: quote it")
    raw = row.get("raw", family == CODE)
    if not isinstance(raw, bool):
        raise UsageError(f"{where} has a raw that is neither true nor false")
    return Question(number, prompt, answer, family, raw)


def _is_text(said: str) -> bool:
    try:
        return bool(said.encode())
    except UnicodeEncodeError:
        return False
