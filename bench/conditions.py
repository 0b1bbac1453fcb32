"""Under which conditions a figure was measured: versions, processor, how busy the machine was. No path, no host."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pilotfish.protocol import cores

PACKAGES = ("pilotfish", "redis", "hiredis", "arq")


def conditions(packages: Iterable[str] = (), **more: Any) -> dict[str, Any]:
    """What every report states; `more` is what the benchmark itself adds."""
    return {
        "python": platform.python_version(),
        "packages": {name: found for name in (*PACKAGES, *packages) if (found := installed(name))},
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_model(),
        "cores": len(cores.available()),
        "load_average": load_average(),
        **more,
    }


def installed(package: str) -> str:
    """The installed version, "" if there is none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def load_average() -> float:
    """Of the last minute, all processes of the machine."""
    return round(os.getloadavg()[0], 2)


def cpu_model() -> str:
    """As the kernel names it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = next((line for line in lines if line.startswith("model name")), "")
    return named.partition(":")[2].strip() or platform.processor() or platform.machine()
