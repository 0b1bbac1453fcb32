"""Executions of hostile input: coverage-guided, from a seed, with an eye on memory.

`mutations.Guided` goes on from what reached new lines. FUZZ_EXECUTIONS says how many in all (`make fuzz`: a million),
FUZZ_SEED which; both are printed with a failure. Of them the codec has a half, a worker a quarter, an agent the rest.
"""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mutations import Guided

log = logging.getLogger("fuzz")
EXECUTIONS = int(os.environ.get("FUZZ_EXECUTIONS", "50000"))
SEED = int(os.environ.get("FUZZ_SEED") or random.SystemRandom().randrange(2**32))
GROWTH_MB = 16.0


def rss_mb() -> float:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def fuzzed(guided: Guided, count: int, next_input: Callable[[], bytes], target: Callable[[bytes], None]) -> None:
    """`count` executions; memory after the first fifth is what it is at the end."""
    settled = 0.0
    for number in range(count):
        if number == count // 5:
            settled = rss_mb()
        data = next_input()
        try:
            guided.execute(target, data)
        except BaseException as error:
            error.add_note(f"FUZZ_SEED={SEED} FUZZ_EXECUTIONS={EXECUTIONS}, execution {number}: {data.hex()[:4000]}")
            raise
    grown = rss_mb() - settled
    assert grown < GROWTH_MB, f"{grown:.1f} MB more after {count} executions (FUZZ_SEED={SEED})"
    reached = (count, len(guided.arcs), len(guided.corpus), grown)
    log.info("%d executions, %d arcs reached, corpus of %d, %+.1f MB", *reached)


@contextmanager
def complaints() -> Iterator[list[str]]:
    """Errors that we logged meanwhile: exceptions nobody meant. Milder ones are not made: pytest would keep them."""
    found: list[str] = []
    handler = logging.Handler(logging.ERROR)
    handler.emit = lambda record: found.append(handler.format(record))  # type: ignore[method-assign]
    ours = logging.getLogger("pilotfish")
    ours.addHandler(handler)
    level = ours.level
    ours.setLevel(logging.ERROR)
    try:
        yield found
    finally:
        ours.setLevel(level)
        ours.removeHandler(handler)
