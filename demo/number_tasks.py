"""Task families over numbers, dates and units: each is a pure function of a random generator.

Knows nothing of tokenization, nor of which operands are kept for evaluation (`tasks.py` decides).
"""

from __future__ import annotations

from datetime import date, timedelta
from random import Random
from typing import NamedTuple

ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen"
).split()
TENS = "- - twenty thirty forty fifty sixty seventy eighty ninety".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
BIG_UNITS = {"km": ("m", 1000), "m": ("cm", 100), "kg": ("g", 1000), "h": ("min", 60), "min": ("s", 60)}


class Task(NamedTuple):
    """One question. Equal operands mean the same question, however it is phrased."""

    prompt: str
    answer: str
    operands: tuple[object, ...]


def number(rng: Random, largest_digits: int = 3) -> int:
    """A number whose count of digits is 2 or more, the longest the likeliest."""
    digits = rng.choice([2] + [largest_digits] * 2)
    return rng.randrange(10 ** (digits - 1), 10**digits)


def add(rng: Random) -> Task:
    """Two numbers, the answer repeats the question."""
    a, b = number(rng), number(rng)
    ask = rng.choice([f"Add {a} and {b}.", f"What is {a} + {b}?", f"What is the sum of {a} and {b}?", f"{a} plus {b}?"])
    return Task(ask, f"{a} + {b} = {a + b}", (min(a, b), max(a, b)))


def subtract(rng: Random) -> Task:
    """The smaller from the larger."""
    b, a = sorted((number(rng), number(rng)))
    ask = rng.choice([f"Subtract {b} from {a}.", f"What is {a} - {b}?", f"{a} minus {b}?", f"Take {b} away from {a}."])
    return Task(ask, f"{a} - {b} = {a - b}", (a, b))


def running_sum(rng: Random) -> Task:
    """Three or four numbers, every partial sum written out."""
    numbers = [rng.randrange(1, 80) for _ in range(rng.choice([3, 4]))]
    total, steps = numbers[0], []
    for n in numbers[1:]:
        steps.append(f"{total} + {n} = {total + n}")
        total += n
    listed = " ".join(map(str, numbers))
    ask = rng.choice([f"Add up {listed} step by step.", f"Sum step by step: {listed}", f"Running sum of {listed}?"])
    return Task(ask, ", ".join(steps), tuple(numbers))


def times(rng: Random) -> Task:
    """Two digits by one, through tens and ones."""
    a, b = rng.randrange(11, 100), rng.randrange(2, 10)
    tens, ones = a // 10 * 10, a % 10
    steps = f"{a} * {b} = {tens} * {b} + {ones} * {b} = {tens * b} + {ones * b} = {a * b}"
    ask = rng.choice([f"What is {a} * {b}?", f"Multiply {a} by {b}.", f"{a} times {b}?", f"Product of {a} and {b}?"])
    return Task(ask, steps, (a, b))


def sort(rng: Random) -> Task:
    """Five or six numbers, a quarter of the time downwards."""
    numbers = rng.sample(range(1, 100), rng.choice([5, 6]))
    listed, down = " ".join(map(str, numbers)), rng.random() < 0.25
    ask = rng.choice([f"Sort {listed}", f"Put in order: {listed}", f"Sort these numbers: {listed}"])
    if down:
        ask = rng.choice([f"Sort downwards: {listed}", f"Sort from high to low: {listed}"])
    return Task(ask, " ".join(map(str, sorted(numbers, reverse=down))), tuple(numbers))


def largest(rng: Random) -> Task:
    """Or the smallest, of four or five numbers."""
    numbers = [rng.randrange(1, 1000) for _ in range(rng.choice([4, 5]))]
    listed, word = " ".join(map(str, numbers)), rng.choice(["largest", "smallest"])
    best = max(numbers) if word == "largest" else min(numbers)
    ask = rng.choice([f"Which is the {word} of {listed}?", f"Find the {word}: {listed}"])
    return Task(ask, f"The {word} of {listed} is {best}.", tuple(numbers))


def count(rng: Random) -> Task:
    """From a number to another in steps."""
    start, step, n = rng.randrange(1, 200), rng.randrange(2, 13), rng.randrange(6, 12)
    numbers = [start + step * i for i in range(n)]
    by = rng.choice([f"in steps of {step}", f"by {step}"])
    ask = rng.choice(["Count from {} to {} {}.", "List the numbers from {} to {} {}."])
    return Task(ask.format(start, numbers[-1], by), " ".join(map(str, numbers)), (start, step, n))


def in_words(n: int) -> str:
    """A number below 10,000 in English words."""
    if n < 20:
        return ONES[n]
    if n < 100:
        return TENS[n // 10] + (f" {ONES[n % 10]}" if n % 10 else "")
    size, name = (100, "hundred") if n < 1000 else (1000, "thousand")
    joint = " and " if n % size < 100 else " "
    return f"{in_words(n // size)} {name}" + (joint + in_words(n % size) if n % size else "")


def number_words(rng: Random) -> Task:
    """A number in English."""
    n = rng.choice([rng.randrange(20, 1000), rng.randrange(1000, 10000), rng.randrange(1000, 10000)])
    ask = rng.choice([f"Write {n} in words.", f"Spell out the number {n}.", f"How do you say {n}?"])
    return Task(ask, in_words(n), (n,))


def named(day: date) -> str:
    """28 February 2023."""
    return f"{day.day} {MONTHS[day.month - 1]} {day.year}"


def next_day(rng: Random) -> Task:
    """The day after a date, ends of months more often than they come."""
    day = date(1990, 1, 1) + timedelta(rng.randrange(14600))
    if rng.random() < 0.4:
        day = day.replace(day=28) + timedelta(rng.randrange(4))
    after = day + timedelta(1)
    ask = rng.choice(["What day comes after {}?", "Which date follows {}?", "What is the day after {}?"])
    return Task(ask.format(named(day)), f"The day after {named(day)} is {named(after)}.", (day.isoformat(),))


def weekday(rng: Random) -> Task:
    """The day of the week some days later, through whole weeks and a walk."""
    start, n = rng.randrange(7), rng.randrange(8, 70)
    weeks, rest = divmod(n, 7)
    walk = ", ".join(DAYS[(start + i) % 7] for i in range(rest + 1))
    ask = rng.choice(["What day is {} days after {}?", "Which weekday comes {} days after {}?"])
    answer = f"{n} = {weeks} * 7 + {rest}. {walk}. It is {DAYS[(start + n) % 7]}."
    return Task(ask.format(n, DAYS[start]), answer, (start, n))


def units(rng: Random) -> Task:
    """Two units to the smaller one."""
    big = rng.choice([*BIG_UNITS, "h", "min"])
    small, factor = BIG_UNITS[big]
    a, b = rng.randrange(1, 13), rng.randrange(1, factor)
    ask = rng.choice([f"Convert {a} {big} {b} {small} to {small}.", f"How many {small} is {a} {big} {b} {small}?"])
    return Task(
        ask, f"{a} {big} {b} {small} = {a * factor} {small} + {b} {small} = {a * factor + b} {small}", (big, a, b)
    )
