from __future__ import annotations

import json
import re
from datetime import date, timedelta
from random import Random

import pytest

from pilotfish.demo import corpus, tasks
from pilotfish.demo.number_tasks import DAYS, MONTHS, in_words
from pilotfish.demo.pair import EVAL_FILE

SMALL = {
    word: n for n, word in enumerate("zero one two three four five six seven eight nine ten eleven twelve".split())
}
SMALL |= {w: 13 + n for n, w in enumerate("thirteen fourteen fifteen sixteen seventeen eighteen nineteen".split())}
SMALL |= {w: 20 + 10 * n for n, w in enumerate("twenty thirty forty fifty sixty seventy eighty ninety".split())}


def words_to_number(text: str) -> int:
    total = part = 0
    for word in text.replace(" and ", " ").split():
        if word == "hundred":
            part *= 100
        elif word == "thousand":
            total, part = 1000 * part, 0
        else:
            part += SMALL[word]
    return total + part


def numbers_in(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


def every_equation_holds(text: str) -> bool:
    """Each side of each `=` has the same value, once units are taken off."""
    parts = [re.sub(r"[a-z]+", "", part) for part in text.split("=")]
    return len({eval(part) for part in parts}) == 1  # noqa: S307


def date_of(text: str) -> date:
    day, month, year = re.search(r"(\d+) ([A-Z][a-z]+) (\d{4})", text).groups()  # type: ignore[union-attr]
    return date(int(year), MONTHS.index(month) + 1, int(day))


def check_weekday(prompt: str, answer: str) -> bool:
    start = next(day for day in DAYS if day in prompt)
    return answer.endswith(f"It is {DAYS[(DAYS.index(start) + numbers_in(prompt)[0]) % 7]}.")


def check_units(prompt: str, answer: str) -> bool:
    factor = {"km": 1000, "m": 100, "kg": 1000, "h": 60, "min": 60}
    a, b = numbers_in(prompt)
    unit = re.search(r"\d+ (km|m|kg|h|min) \d+", prompt).group(1)  # type: ignore[union-attr]
    return numbers_in(answer)[-1] == a * factor[unit] + b and numbers_in(answer)[2] == a * factor[unit]


def check_function(prompt: str, answer: str) -> bool:
    space: dict[str, object] = {}
    exec(answer, space)  # noqa: S102
    verb, n = re.search(r"(adds|subtracts|multiplies by|divides by) (\d+)", prompt).groups()  # type: ignore[union-attr]
    of = {"adds": 100 + int(n), "subtracts": 100 - int(n), "multiplies by": 100 * int(n), "divides by": 100 / int(n)}
    name = next(key for key in space if not key.startswith("__"))
    return name in prompt and space[name](100) == of[verb]  # type: ignore[operator]


def check_backwards(prompt: str, answer: str) -> bool:
    forwards, back = answer.split(", backwards ")
    return forwards == back[::-1] and forwards.replace(" ", "") in prompt


def listed(prompt: str, n_words: int) -> list[str]:
    return prompt.rsplit(": ", 1)[1].split()[-n_words:] if ": " in prompt else prompt.split()[-n_words:]


CHECKS = {
    "add": lambda p, a: numbers_in(a)[2] == sum(numbers_in(p)) and every_equation_holds(a),
    "subtract": lambda p, a: numbers_in(a)[2] == abs(numbers_in(p)[0] - numbers_in(p)[1]) and every_equation_holds(a),
    "running_sum": lambda p, a: (
        numbers_in(a)[-1] == sum(numbers_in(p)) and all(map(every_equation_holds, a.split(",")))
    ),
    "times": lambda p, a: numbers_in(a)[-1] == numbers_in(p)[0] * numbers_in(p)[1] and every_equation_holds(a),
    "sort": lambda p, a: numbers_in(a) == sorted(numbers_in(p), reverse="down" in p or "high to" in p),
    "largest": lambda p, a: numbers_in(a)[-1] == (max if "largest" in p else min)(numbers_in(p)),
    "count": lambda p, a: numbers_in(a) == list(range(numbers_in(p)[0], numbers_in(p)[1] + 1, numbers_in(p)[2])),
    "number_words": lambda p, a: words_to_number(a) == numbers_in(p)[0],
    "next_day": lambda p, a: date_of(a.split(" is ")[1]) - date_of(p) == timedelta(1),
    "weekday": check_weekday,
    "units": check_units,
    "reverse_words": lambda p, a: a.split()[::-1] == listed(p, 99),
    "alphabet": lambda p, a: a.split() == sorted(listed(p, 99)),
    "dedupe": lambda p, a: a.split() == list(dict.fromkeys(listed(p, 99))),
    "spell": lambda p, a: p.rstrip(".?").split()[-1] == a.replace(" ", ""),
    "backwards": check_backwards,
    "record": lambda p, a: all(str(value) in p for value in json.loads(a).values()) and len(json.loads(a)) == 3,
    "function": check_function,
}


@pytest.mark.parametrize("family", tasks.FAMILIES)
def test_answers_are_right_by_another_computation(family: str) -> None:
    rng = Random(5)
    for _ in range(300):
        task = tasks.draw(rng, family)
        assert CHECKS[family](task.prompt, task.answer), task


def test_number_words_are_readable_back() -> None:
    assert [n for n in range(1, 10000) if words_to_number(in_words(n)) != n] == []


@pytest.mark.parametrize("family", tasks.FAMILIES)
def test_training_never_draws_held_out_operands(family: str) -> None:
    rng = Random(6)
    assert not any(tasks.held_out(family, tasks.draw(rng, family).operands) for _ in range(500))
    assert all(tasks.held_out(family, tasks.draw(rng, family, evaluation=True).operands) for _ in range(20))


def test_evaluation_file_is_what_the_generators_make() -> None:
    rows = [json.loads(line) for line in EVAL_FILE.read_text().splitlines()]
    asked = [row for row in rows if row["answer"] is not None]
    assert asked == tasks.evaluation_set(20)
    assert len(asked) >= 240
    assert sum(row["family"] == "code" for row in rows) == 40


def test_a_family_without_more_questions_ends_and_does_not_loop() -> None:
    rows = tasks.evaluation_set(50)
    days = [row["prompt"] for row in rows if row["family"] == "weekday"]
    assert len(days) == len(set(days)) < 50
    assert sum(row["family"] == "add" for row in rows) == 50


def test_no_evaluation_question_turns_up_in_training() -> None:
    asked = {json.loads(line)["prompt"] for line in EVAL_FILE.read_text().splitlines()}
    rng = Random(7)
    assert not any(tasks.draw_any(rng)[1].prompt in asked for _ in range(20000))


@pytest.mark.slow
def test_library_files_are_on_one_side_only() -> None:
    sides = {name: corpus.held_out(name) for name, _ in corpus.files()}
    assert {True, False} == set(sides.values())
    assert not set(corpus.texts(evaluation=True)) & set(corpus.texts())
