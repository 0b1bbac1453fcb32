"""One subject of `bench edgecache` in a process of its own, so that its growth is the cache's and nobody else's.

python -m pilotfish.bench.edgecache_side ours|none|rival MODEL CONVERSATIONS: prints "ready" and one JSON object.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from random import Random
from statistics import median
from time import perf_counter
from typing import Any

from pilotfish.bench.children import say_ready
from pilotfish.bench.edgecache_subjects import Drafter, RamCache, Subject

LENGTHS = (250, 500, 1000)  # ids of a first turn
SYSTEM = 150  # ids that every conversation begins with
QUESTION = 40  # ids that a second turn adds
IDS = (300, 4000)  # plain tokens of the demo's vocabulary


def conversations(count: int, tokens: int) -> list[list[int]]:
    """Prompts of one length that share a beginning; the same for every subject."""
    random = Random(tokens)
    system = random_ids(Random(0), SYSTEM)
    return [system + random_ids(random, tokens - SYSTEM) for _ in range(count)]


def random_ids(random: Random, count: int) -> list[int]:
    """Token ids in no order at all."""
    return [random.randrange(*IDS) for _ in range(count)]


def resident_bytes() -> int:
    """Memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def first_turns(subject: Subject, prompts: Sequence[list[int]]) -> dict[str, Any]:
    """And what they leave in memory: as the process grows, and as the subject counts."""
    gc.collect()
    resident, counted = resident_bytes(), subject.counted_bytes
    cost = turns(subject, prompts)
    gc.collect()
    return {**cost, "grown_bytes": resident_bytes() - resident, "counted_bytes": subject.counted_bytes - counted}


def turns(subject: Subject, prompts: Sequence[list[int]]) -> dict[str, Any]:
    """Ask each prompt: ids in it, ids evaluated for it, time to its answer."""
    seconds, evaluated = [], 0
    for ids in prompts:
        start = perf_counter()
        evaluated += subject.answer(ids)
        seconds.append(perf_counter() - start)
    return {"tokens": sum(map(len, prompts)), "evaluated": evaluated, "p50_ms": round(1e3 * median(seconds), 3)}


def restore_ms_per_1k(subject: Subject, prompts: Sequence[list[int]]) -> float:
    """Median over the conversations, per 1,000 ids restored."""
    return median(1e6 * subject.restore(ids) / len(ids) for ids in prompts)


def from_disk(model: Path, prompts: Sequence[list[int]]) -> float:
    """Ours after a restart: each conversation is read from its file, checked and restored."""
    with tempfile.TemporaryDirectory() as folder:
        before = Drafter(model, folder=Path(folder))
        for ids in prompts:
            before.answer(ids)
        before.close()
        after = Drafter(model, folder=Path(folder))
        found = restore_ms_per_1k(after, prompts)
        after.close()
    return found


def run(which: str, model: Path, count: int) -> dict[str, Any]:
    """Everything of one subject: `count` conversations of each length."""
    by_length = {tokens: conversations(count, tokens) for tokens in LENGTHS}
    everyone = [ids for prompts in by_length.values() for ids in prompts]
    subject: Subject = RamCache(model) if which == "rival" else Drafter(model, cached=which == "ours")
    turns(subject, conversations(2, 2 * max(LENGTHS)))  # warm: what is allocated once is no growth
    figures: dict[str, Any] = {
        "first_turns": {tokens: first_turns(subject, prompts) for tokens, prompts in by_length.items()},
        "regenerations": turns(subject, everyone),
        "second_turns": turns(subject, [ids + random_ids(Random(n), QUESTION) for n, ids in enumerate(everyone)]),
    }
    if which != "none":
        figures["restore_ms_per_1k"] = restore_ms_per_1k(subject, everyone)
    subject.close()
    if which == "ours":
        figures["restore_from_disk_ms_per_1k"] = from_disk(model, everyone)
    return figures


if __name__ == "__main__":
    say_ready(json.dumps(run(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))))
