"""Talk, as opposed to data: to stderr, where a log in JSON gets an object of its own for it."""

from __future__ import annotations

import sys


def say(line: str, level: str = "INFO") -> None:
    """One line to whoever started this process."""
    from pilotfish.protocol.logs import recorded

    if not recorded(line, level):
        print(line, file=sys.stderr, flush=True)
