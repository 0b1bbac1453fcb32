"""The baseline in closed form: K tokens each round, one round at a time.

Which rounds there are does not depend on time. So a record is walked once for each K, and every cell of t_d and RTT is
a sum of four numbers.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from pilotfish.bench.control_record import Record
from pilotfish.bench.control_times import Times

K_MAX = 64


@dataclass(frozen=True, slots=True)
class Totals:
    """What drafting K tokens each round comes to, over all records."""

    k: int
    tokens: int
    rounds: int
    drafted: int
    rows: int

    def ms(self, times: Times) -> float:
        """How long it takes."""
        return self.drafted * times.token + self.rounds * times.away() + self.rows * times.row

    def rate(self, times: Times) -> float:
        """Tokens per ms."""
        return self.tokens / self.ms(times)


def totals(records: Sequence[Record], k: int, stop_ids: Collection[int]) -> Totals:
    """Walk every record with drafts of k tokens."""
    rounds = [one for record in records for one in rounds_of(record, k, stop_ids)]
    tokens = sum(len(record.text) for record in records)
    return Totals(k, tokens, len(rounds), sum(rounds), sum(max(2, drafted + 1) for drafted in rounds))


def rounds_of(record: Record, k: int, stop_ids: Collection[int]) -> list[int]:
    """Tokens drafted in each round of one answer; a draft ends early at a stop id, or where the answer must end."""
    said, rounds = 0, list[int]()
    while said < len(record.text):
        draft, accepted = list[int](), 0
        room = min(k, record.limit - said - 1)
        while len(draft) < room and not (draft and draft[-1] in stop_ids):
            token, _ = record.proposal([*record.text[:said], *draft])
            draft.append(token)
        for drafted, drawn in zip(draft, record.text[said:], strict=False):
            if drafted != drawn:
                break
            accepted += 1
        rounds.append(len(draft))
        said += accepted + 1
    return rounds


def all_totals(records: Sequence[Record], stop_ids: Collection[int]) -> list[Totals]:
    """For every K from 1 to K_MAX."""
    return [totals(records, k, stop_ids) for k in range(1, K_MAX + 1)]


def best(found: Sequence[Totals], times: Times) -> Totals:
    """The K that is fastest under these times."""
    return max(found, key=lambda one: one.rate(times))
