"""What the demo pair is asked in benchmarks: the fixed evaluation file, and fresh questions of the same kinds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

CODE = "code"
TASK_TOKENS, CODE_TOKENS = 72, 64  # longest answers


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt; code to continue has no answer, and stands behind no chat template."""

    family: str
    prompt: str
    answer: str | None

    @property
    def chat(self) -> bool:
        """Whether the prompt is a person's."""
        return self.answer is not None

    @property
    def limit(self) -> int:
        """Tokens of an answer at most."""
        return TASK_TOKENS if self.chat else CODE_TOKENS


def evaluation(path: Path) -> list[Question]:
    """The fixed evaluation file."""
    return [Question(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def calibration(count: int, but: Sequence[Question]) -> list[Question]:
    """Questions of the same families and code of the same kind, none of them in `but`; none was trained on either."""
    from pilotfish.demo import corpus, tasks

    taken = {question.prompt for question in but}
    asked = [Question(**row) for row in tasks.evaluation_set(count // len(tasks.FAMILIES) + 40, seed=20260202)]
    code = [Question(CODE, text, None) for text in corpus.evaluation_prefixes(2 * count // 10 + 40, seed=20260202)]
    asked, code = ([one for one in some if one.prompt not in taken] for some in (asked, code))
    return spread(spread(asked, count - count // 10) + spread(code, count // 10), count)


def spread(rows: Sequence[Question], limit: int) -> list[Question]:
    """`limit` questions, as many of each family as can be, in an order that mixes them; always the same."""
    families: dict[str, list[Question]] = {}
    for row in rows:
        families.setdefault(row.family, []).append(row)
    turns = max(map(len, families.values()), default=0)
    mixed = [family[i] for i in range(turns) for family in families.values() if i < len(family)][:limit]
    Random(7).shuffle(mixed)
    return mixed
