"""How long things take, in ms: what turns a record into a speed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Times:
    """`token`: t_d. `job`, `row`, `step`: of the engine, per job, per row of it, per token it continues by itself.

    `broker`: everything between edge and engine but the round trip `rtt`, which may be a function of the second.
    """

    token: float
    rtt: float | Callable[[float], float]
    job: float
    row: float
    step: float
    broker: float

    def rtt_at(self, second: float) -> float:
        """The round trip of a job that leaves then."""
        return self.rtt(second) if callable(self.rtt) else self.rtt

    def away(self, second: float = 0.0) -> float:
        """From a job to its verdict, its rows aside."""
        return self.rtt_at(second) + self.broker + self.job

    def predicted_ms(self, acceptance: float) -> float:
        """A token's time with pipelining, DESIGN section 8: T = t_d + (1 - a) (F + t_d), F = RTT + broker + verify."""
        return self.token + (1 - acceptance) * (self.away() + 2 * self.row + self.token)
