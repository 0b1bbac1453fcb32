"""Text that is on every machine with Python: the standard library's own sources and docstrings.

A file belongs to the evaluation side by the hash of its name. Knows nothing of tokens.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from random import Random

SKIPPED = {
    "site-packages",
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "encodings",
    "pydoc_data",
    "turtledemo",
}
EVAL_ONE_IN = 12


def held_out(name: str) -> bool:
    """True for the files that only the evaluation may use."""
    return hashlib.sha256(name.encode()).digest()[0] % EVAL_ONE_IN == 0


def files() -> Iterator[tuple[str, Path]]:
    """(name below the library's root, path) of each source file, sorted by name."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = ((path.relative_to(root), path) for path in root.rglob("*.py"))
    yield from sorted((name.as_posix(), path) for name, path in found if not SKIPPED & set(name.parts))


@cache
def texts(evaluation: bool = False) -> list[str]:
    """The files of one side of the split, plain ASCII ones only."""
    chosen = (path.read_bytes() for name, path in files() if held_out(name) is evaluation)
    return [raw.decode().expandtabs(4) for raw in chosen if raw.isascii() and len(raw) > 500]


def passage(rng: Random, text: str, n_chars: int) -> str:
    """About n_chars of a text from the start of a line."""
    start = text.rfind("\n", 0, rng.randrange(len(text))) + 1
    return text[start : start + n_chars]


def evaluation_prefixes(n: int, seed: int = 20260101) -> list[str]:
    """Beginnings of code from held-out files, 80 to 600 characters long, cut at a line's end."""
    rng, sources = Random(seed), texts(evaluation=True)
    found: list[str] = []
    while len(found) < n:
        cut = passage(rng, rng.choice(sources), rng.randrange(80, 600)).rpartition("\n")[0]
        if len(cut) >= 60 and cut.strip():
            found.append(cut + "\n")
    return found
