"""Benchmarks and ablations: every figure we state is printed by one of these.

    from pilotfish.bench import Experiment, run, write_report

    folder = run(Experiment("out", modes="baseline,cloud_only", seeds=1, rtt_ms=(0, 50)))
    write_report(folder)

`docs/examples/` has a whole experiment. Nothing is loaded before it is used: the command line imports this package.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pilotfish.bench.ablation.experiment import Experiment as Experiment
    from pilotfish.bench.ablation.measures import Prices as Prices
    from pilotfish.bench.ablation.report import load as load
    from pilotfish.bench.ablation.report import write as write_report
    from pilotfish.bench.ablation.run import run as run

_PLACES = {
    "Experiment": ("experiment", "Experiment"),
    "Prices": ("measures", "Prices"),
    "load": ("report", "load"),
    "run": ("run", "run"),
    "write_report": ("report", "write"),
}

__all__ = ["Experiment", "Prices", "load", "run", "write_report"]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _PLACES[name]
    return getattr(import_module(f"{__name__}.ablation.{module}"), attribute)
