"""Raw rounds on disk: one request a line, its rounds in it, written when it is finished.

A run that was interrupted goes on from what is there; half a line at the end is what was being written, and is cut
off. Fields are those of `docs/ablations.md`. Knows files; nothing of processes or figures.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pilotfish.protocol.errors import UsageError

FILE = "rounds.jsonl"
Record = dict[str, Any]


class Key(NamedTuple):
    """Which request: a variant, an RTT in ms, a seed, a prompt by its number."""

    variant: str
    rtt_ms: float
    seed: int
    prompt: int


def key_of(record: Record) -> Key:
    """Its place in the experiment."""
    return Key(record["variant"], record["rtt_ms"], record["seed"], record["prompt"])


def read(folder: Path) -> list[Record]:
    """Every finished request. Raises UsageError for a folder without any, or a file that something else wrote to."""
    path = folder / FILE
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError:
        raise UsageError(f"{folder} holds no run: `pilotfish ablate list` shows those there are") from None
    return list(_parsed(path, lines[:-1]))  # what follows the last line break is unfinished


def _parsed(path: Path, lines: list[bytes]) -> Iterator[Record]:
    for number, line in enumerate(lines, 1):
        try:
            yield json.loads(line)
        except ValueError:
            raise UsageError(f"{path}, line {number} is broken: delete that line, and run again what it held") from None


class Log:
    """Appends records; each is on disk before the next request is sent."""

    def __init__(self, folder: Path) -> None:
        path = folder / FILE
        whole = path.read_bytes() if path.exists() else b""
        self._file = path.open("ab")
        self._file.truncate(whole.rfind(b"\n") + 1)

    def add(self, record: Record) -> None:
        """One finished request."""
        self._file.write(json.dumps(record, separators=(",", ":")).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """No more."""
        self._file.close()
