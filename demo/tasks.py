"""The families, how often each is trained on, and which operands are never trained on.

A question belongs to the evaluation side by the hash of its operands, so no phrasing of it is ever seen in training.
Knows nothing of models.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from random import Random

from pilotfish.demo import number_tasks, word_tasks
from pilotfish.demo.number_tasks import Task

EVAL_ONE_IN = 10
BARREN_MOST = 500  # draws without a new question: the family has no more

FAMILIES: dict[str, tuple[Callable[[Random], Task], float]] = {
    "add": (number_tasks.add, 12),
    "subtract": (number_tasks.subtract, 18),
    "running_sum": (number_tasks.running_sum, 9),
    "times": (number_tasks.times, 3),
    "sort": (number_tasks.sort, 12),
    "largest": (number_tasks.largest, 4),
    "count": (number_tasks.count, 7),
    "number_words": (number_tasks.number_words, 3),
    "next_day": (number_tasks.next_day, 3),
    "weekday": (number_tasks.weekday, 3),
    "units": (number_tasks.units, 3),
    "reverse_words": (word_tasks.reverse_words, 9),
    "alphabet": (word_tasks.alphabet, 8),
    "dedupe": (word_tasks.dedupe, 9),
    "spell": (word_tasks.spell, 8),
    "backwards": (word_tasks.backwards, 5),
    "record": (word_tasks.record, 1.5),
    "function": (word_tasks.function, 2),
}


def held_out(family: str, operands: tuple[object, ...]) -> bool:
    """True for the tenth of all operands that only the evaluation may use."""
    text = json.dumps([family, *operands])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % EVAL_ONE_IN == 0


def draw(rng: Random, family: str, evaluation: bool = False) -> Task:
    """One question of a family, from the training side unless `evaluation`."""
    make, _ = FAMILIES[family]
    while True:
        task = make(rng)
        if held_out(family, task.operands) is evaluation:
            return task


def draw_any(rng: Random, weights: dict[str, float] | None = None) -> tuple[str, Task]:
    """(family, training question), the family by weight."""
    chances = weights or {name: weight for name, (_, weight) in FAMILIES.items()}
    family = rng.choices([*chances], [*chances.values()])[0]
    return family, draw(rng, family)


def evaluation_set(per_family: int, seed: int = 20260101) -> list[dict[str, str]]:
    """Fixed evaluation questions, all different, as {"family", "prompt", "answer"}; fewer where there are no more."""
    rng, rows = Random(seed), []
    for family in FAMILIES:
        found: dict[str, Task] = {}
        barren = 0  # draws since the last new one: a week has few days
        while len(found) < per_family and barren < BARREN_MOST:
            task = draw(rng, family, evaluation=True)
            barren = barren + 1 if (key := json.dumps(task.operands)) in found else 0
            found[key] = task
        rows += [{"family": family, "prompt": t.prompt, "answer": t.answer} for t in found.values()]
    return rows
