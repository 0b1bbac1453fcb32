"""Tables about drafts: confidence, acceptance by place in the draft, corrections by place in the answer.

Only drafts the target judged count: verification ends at the first mismatch, so what lies behind one has no label.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Final

from pilotfish.bench.ablation import bootstrap
from pilotfish.bench.ablation.data import Data, Row
from pilotfish.bench.ablation.measures import Measure, Record, judged

BINS: Final = 10  # of confidence, equally wide
PLACES: Final = 16  # positions in a draft that are told apart
STRETCH: Final = 8  # tokens of an answer that are counted together


def confidence(data: Data) -> Iterator[Row]:
    """Judged drafts by what was thought of them: how many the target drew too.

    `raw` is the strategy's score, `calibrated` the acceptance that all verdicts so far had taught to expect of it. ECE:
    Guo et al. 2017, bins of equal width.
    """
    for variant in data.variants:
        drafts = [one for r in data.of(variant) for one in judged(r) if one.confidence is not None]
        yield from _bins(variant, "raw", [(one.confidence or 0.0, one.accepted) for one in drafts])
        yield from _bins(variant, "calibrated", [(one.estimate or 0.0, one.accepted) for one in drafts])


def _bins(variant: str, kind: str, drafts: list[tuple[float, bool]]) -> Iterator[Row]:
    bins: dict[int, list[tuple[float, bool]]] = defaultdict(list)
    for score, ok in drafts:
        bins[min(BINS - 1, int(score * BINS))].append((score, ok))
    off = sum(abs(sum(score - ok for score, ok in inside)) for inside in bins.values())
    for place, inside in sorted(bins.items()):
        accepted = sum(ok for _, ok in inside)
        yield {
            "variant": variant, "kind": kind, "from": place / BINS, "to": (place + 1) / BINS, "accepted": accepted,
            "rejected": len(inside) - accepted, "mean": sum(score for score, _ in inside) / len(inside),
            "accepted_share": accepted / len(inside), "ece": off / len(drafts),
        }  # fmt: skip


def positions(data: Data) -> Iterator[Row]:
    """Acceptance by place in the draft, of those the target judged: whatever precedes them was accepted."""
    for variant in data.variants:
        for place in range(PLACES):
            measure = _at_place(place)
            found = bootstrap.sums(data.of(variant), measure)
            if one := found.interval():
                yield {"variant": variant, "position": place + 1, "judged": int(found.under.sum()),
                       "acceptance": one.value, "low": one.low, "high": one.high}  # fmt: skip


def _at_place(place: int) -> Measure:
    def accepted(record: Record) -> float:
        return sum(one.accepted for one in judged(record) if one.place == place)

    def reached(record: Record) -> float:
        return sum(one.place == place for one in judged(record))

    return Measure("acceptance", "acceptance", "of drafts", "", accepted, reached, share=True)


def corrections(data: Data) -> Iterator[Row]:
    """Where in the answer the target overruled the draft, over the tokens that stand there."""
    for variant in data.variants:
        records = data.of(variant)
        if not any("corrected" in record["origins"] for record in records):
            continue
        for start in range(0, max(len(record["origins"]) for record in records), STRETCH):
            found = bootstrap.sums(records, _stretch(start))
            if one := found.interval():
                yield {"variant": variant, "from_token": start + 1, "to_token": start + STRETCH,
                       "tokens": int(found.under.sum()), "corrected": int(found.over.sum()), "share": one.value,
                       "low": one.low, "high": one.high}  # fmt: skip


def _stretch(start: int) -> Measure:
    def there(record: Record) -> list[str]:
        origins: list[str] = record["origins"][start : start + STRETCH]
        return origins

    return Measure("", "", "", "", lambda r: there(r).count("corrected"), lambda r: len(there(r)), share=True)
