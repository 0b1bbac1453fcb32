"""Task families over words, letters and little pieces of code: each is a pure function of a random generator.

Knows nothing of tokenization, nor of which operands are kept for evaluation (`tasks.py` decides).
"""

from __future__ import annotations

import json
from random import Random

from pilotfish.demo.number_tasks import Task

WORDS = (
    "apple bread chair door eagle flower garden house island jacket kettle lemon mountain needle orange paper queen "
    "river stone table umbrella village window yellow zebra anchor basket candle desert engine forest guitar hammer "
    "iron jungle kitchen ladder mirror nation ocean pencil quiet rabbit silver tiger uncle valley winter yard air "
    "boat cloud dog earth fire glass hill ice jar king leaf moon night oak pearl rain salt tree"
).split()
NAMES = "Ann Ben Cleo Dan Eva Finn Gus Hana Ivo June Kim Leo Mia Noor Olga Paul".split()
CITIES = "Rome Oslo Lima Cairo Delhi Paris Quito Tokyo Berlin Dublin Madrid Havana".split()
VERBS = {"adds": "+", "subtracts": "-", "multiplies by": "*", "divides by": "/"}


def syllables(rng: Random, n: int) -> str:
    """A made-up word of n consonant-vowel pairs."""
    return "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(n))


def reverse_words(rng: Random) -> Task:
    """Four to seven words, last first."""
    words = rng.sample(WORDS, rng.choice([4, 5, 6, 7]))
    listed = " ".join(words)
    ask = rng.choice([f"Reverse the words: {listed}", f"Say backwards: {listed}", f"Write in reverse order: {listed}"])
    return Task(ask, " ".join(reversed(words)), tuple(words))


def alphabet(rng: Random) -> Task:
    """Four to six words in alphabetical order."""
    words = rng.sample(WORDS, rng.choice([4, 5, 6]))
    listed = " ".join(words)
    ask = rng.choice([f"Sort by alphabet: {listed}", f"Put in alphabetical order: {listed}"])
    return Task(ask, " ".join(sorted(words)), tuple(words))


def dedupe(rng: Random) -> Task:
    """The words without their repeats."""
    kinds = rng.sample(WORDS, rng.choice([3, 4, 5]))
    words = [*kinds, *rng.choices(kinds, k=rng.choice([2, 3]))]
    rng.shuffle(words)
    listed = " ".join(words)
    ask = rng.choice([f"Remove the repeats: {listed}", f"Keep each word once: {listed}"])
    return Task(ask, " ".join(dict.fromkeys(words)), tuple(words))


def spell(rng: Random) -> Task:
    """The letters of a made-up word."""
    word = syllables(rng, rng.choice([3, 4, 5]))
    ask = rng.choice([f"Spell {word}.", f"Spell the word {word}.", f"What are the letters of {word}?"])
    return Task(ask, " ".join(word), (word,))


def backwards(rng: Random) -> Task:
    """The letters of a made-up word, forwards and then backwards."""
    word = syllables(rng, rng.choice([2, 3]))
    ask = rng.choice([f"Spell {word} backwards.", f"Reverse the letters of {word}."])
    return Task(ask, f"{' '.join(word)}, backwards {' '.join(reversed(word))}", (word,))


def record(rng: Random) -> Task:
    """A sentence as JSON."""
    name, city, age = rng.choice(NAMES), rng.choice(CITIES), rng.randrange(18, 90)
    said = {"name": name, "age": age, "city": city}
    ask = rng.choice([f"Make JSON: {name} from {city} is {age}.", f"As JSON: {name}, {age}, lives in {city}"])
    return Task(ask, json.dumps(said), (name, city, age))


def function(rng: Random) -> Task:
    """A one-line Python function."""
    name, verb, n = syllables(rng, 2), rng.choice([*VERBS]), rng.randrange(2, 100)
    ask = rng.choice([f"Write a function {name} that {verb} {n}.", f"Python function {name}: {verb} {n}"])
    return Task(ask, f"def {name}(x):\n    return x {VERBS[verb]} {n}", (name, verb, n))
