"""What every benchmark returns: one object of a fixed shape, so that figures can be followed over time.

    {schema, name, conditions, figures, targets: [{name, value, unit, goal, met}]}

`goal` is text a person reads and a program parses ("<= 1.4", ">= 20000", "== 0"); `met` is null when the sample was too
small to say. Knows nothing of what is measured.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Final

SCHEMA: Final = "pilotfish.bench/1"
COMPARISONS: Final[dict[str, Callable[[float, float], bool]]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
    "==": operator.eq,
}


@dataclass(frozen=True, slots=True)
class Target:
    """One aim: what was measured, in which unit, against which goal."""

    name: str
    value: float | None
    unit: str
    goal: str
    met: bool | None


@dataclass(slots=True)
class Report:
    """One run of one benchmark. `figures` is free in shape, `targets` are the names of DESIGN §11."""

    name: str
    conditions: dict[str, Any] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)
    targets: list[Target] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """As it is printed: plain values only."""
        return {"schema": SCHEMA, **asdict(self)}


def target(name: str, value: float | None, unit: str, goal: str, *, enough: bool = True) -> Target:
    """An aim and whether it is met; undecided without a value, or when the sample was not `enough`."""
    met = reaches(value, goal) if enough and value is not None else None
    return Target(name, None if value is None else round(value, 4), unit, goal, met)


def reaches(value: float, goal: str) -> bool:
    """Whether a value fulfils a goal such as "<= 1.4". Raises ValueError for a goal of another form."""
    sign, _, bound = goal.partition(" ")
    if sign not in COMPARISONS:
        raise ValueError(f"a goal is a comparison and a number, not {goal!r}: one of {', '.join(COMPARISONS)}")
    return COMPARISONS[sign](value, float(bound))
