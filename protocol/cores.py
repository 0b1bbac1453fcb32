"""CPU cores: how many this process may use, and how to keep it on some of them.

Two engines that share a core slow each other down twentyfold (both wait busily), so each gets its own where there are
enough. Only Linux can bind a process; elsewhere binding does nothing and says so.
"""

from __future__ import annotations

import logging
import os

log = logging.getLogger("pilotfish.cores")


def available() -> list[int]:
    """Numbers of the cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def parse(cores: str | None) -> list[int]:
    """The numbers in a list such as "0,1"; [] for none."""
    return [int(core) for core in cores.split(",")] if cores else []


def bind(cores: str | None) -> None:
    """Keep this process, and what it starts from now on, on the given cores ("0,1"). None leaves it where it is."""
    wanted = set(parse(cores))
    usable = wanted.intersection(available())
    if wanted != usable:
        log.warning("this machine has no cores %s for this process: they are left out", sorted(wanted - usable))
    if usable and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, usable)
