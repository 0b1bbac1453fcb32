"""What an operator grants a tenant: a rate, tokens in flight, a weight against others; and what a job counts for.

A row is a position the engine is asked to compute: the ids a job carries, its draft, what it is to continue, and one
more. Tokens in flight are the contexts of the jobs under way: what they hold of the engine's cache. Both are known from
a job alone, so a tenant can count them as we do. Knows the text in which Redis keeps a quota; not Redis.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Final

from pilotfish.protocol.messages import ScoreJob, VerifyJob

BURST_SECONDS: Final = 1.0  # of its rate, which a tenant that was silent may have at once
WEIGHT_MAX: Final = 1_000.0


@dataclass(frozen=True, slots=True)
class Quota:
    """0 is no limit. `weight` shares what is scarce: a tenant of weight 2 gets twice what one of weight 1 does."""

    weight: float = 1.0
    rows_per_second: float = 0.0
    tokens_in_flight: int = 0
    since_ms: int = 0  # when the tenant was added, on Redis' clock

    @property
    def limited(self) -> bool:
        """Whether its use has to be counted across workers."""
        return bool(self.rows_per_second or self.tokens_in_flight)

    @property
    def burst_rows(self) -> float:
        """Most rows a tenant may have saved up."""
        return self.rows_per_second * BURST_SECONDS

    def text(self) -> str:
        """As Redis keeps it and a person reads it: "weight=1 rows_per_second=500 ..."."""
        return " ".join(f"{field.name}={getattr(self, field.name):.15g}" for field in fields(self))


UNLIMITED: Final = Quota()


def parse(text: str) -> Quota:
    """The reverse of `text`. What cannot be read, or is out of bounds, counts as not said: a worker must go on."""
    said = dict(word.partition("=")[::2] for word in text.split())
    quota = Quota(
        _number(said, "weight", 1.0), _number(said, "rows_per_second"), int(_number(said, "tokens_in_flight")),
        int(_number(said, "since_ms")),
    )  # fmt: skip
    return quota if 0 < quota.weight <= WEIGHT_MAX else replace(quota, weight=1.0)


def _number(said: dict[str, str], name: str, default: float = 0.0) -> float:
    try:
        number = float(said[name])
    except (KeyError, ValueError):
        return default
    return number if 0 <= number < 1e15 else default


def rows(job: VerifyJob | ScoreJob) -> int:
    """What a job asks the engine to compute, at most."""
    return len(job.ids) + len(job.draft) + _continues(job) + 1


def tokens(job: VerifyJob | ScoreJob) -> int:
    """The context it needs while it is under way."""
    return job.base + len(job.draft) + _continues(job) + 1


def _continues(job: VerifyJob | ScoreJob) -> int:
    return job.continue_tokens if isinstance(job, VerifyJob) else 0
