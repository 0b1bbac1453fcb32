"""Which benchmarks there are. Nothing of a benchmark is imported before it runs."""

from __future__ import annotations

from importlib import import_module
from typing import Any, Final

from pilotfish.protocol.errors import UsageError

#: name -> "module:function"; the function takes `quick` and returns a Report
NAMES: Final[dict[str, str]] = {
    "exact": "pilotfish.bench.exact:run",
    "broker": "pilotfish.bench.broker:run",
    "gate": "pilotfish.bench.gate:run",
}
SUMMARIES: Final[dict[str, str]] = {
    "exact": "exact mode against cloud_only, token by token, on every engine installed",
    "gate": "what the gate keeps on the device, at what loss, and whether its budget holds",
    "broker": "the queue's round trip against a bare stream echo and stock arq",
}


def run(name: str, quick: bool = False) -> dict[str, Any]:
    """One benchmark's report. Raises UsageError for a name that is none."""
    if name not in NAMES:
        raise UsageError(f"there is no benchmark {name!r}: choose {', '.join(NAMES)}")
    module, _, function = NAMES[name].partition(":")
    report: dict[str, Any] = getattr(import_module(module), function)(quick=quick).as_dict()
    return report
