"""Figures of a request: what is summed, and by what it is divided.

Every figure is a ratio of sums over requests, so a long answer weighs more than a short one and no mean of ratios
hides a slow request. A request that failed has no times and no costs; it counts in `accuracy`, as wrong, and in the
list of failures.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

Record = dict[str, Any]
Part = Callable[[Record], float]


@dataclass(frozen=True, slots=True)
class Measure:
    """One figure. `better`: "higher", "lower", or "" where neither is. A `share` is compared by difference."""

    name: str
    title: str
    unit: str
    better: str
    over: Part
    under: Part
    share: bool = False
    of_failures: bool = False

    def applies(self, record: Record) -> bool:
        """Whether the request has this figure."""
        return (self.of_failures or not record["failure"]) and self.under(record) > 0


@dataclass(frozen=True, slots=True)
class Prices:
    """What a user pays, in any currency: an hour of the cloud's engine, an hour of drafting, a gigabyte on the wire."""

    cloud_hour: float = 0.0
    edge_hour: float = 0.0
    gigabyte: float = 0.0

    def __bool__(self) -> bool:
        return bool(self.cloud_hour or self.edge_hour or self.gigabyte)

    def parts(self, record: Record) -> dict[str, float]:
        """Of one request, by who is paid."""
        summary = record["summary"]
        return {
            "cloud": summary["cloud_ms"] / 3.6e6 * self.cloud_hour,
            "edge": summary["draft_ms"] / 3.6e6 * self.edge_hour,
            "wire": wire_bytes(record) / 1e9 * self.gigabyte,
        }


def tokens(record: Record) -> int:
    """Of the answer."""
    return len(record["ids"])


def wire_bytes(record: Record) -> int:
    """All that crossed between agent and Redis, both ways, Redis' protocol included."""
    return int(record["wire_up"] + record["wire_down"])


class Judged(NamedTuple):
    """A draft the target judged: its place in the draft from 0, what was thought of it, whether the target agreed."""

    place: int
    confidence: float | None
    estimate: float | None
    accepted: bool


def judged(record: Record) -> list[Judged]:
    """Of every round, up to the first mismatch."""
    found = []
    for one in record.get("rounds", ()):
        if one["accepted"] is not None:
            thought = zip(one["confidences"], one["estimates"], strict=True)
            for place, (confidence, estimate) in enumerate([*thought][: one["accepted"] + 1]):
                found.append(Judged(place, confidence, estimate, place < one["accepted"]))
    return found


def _seconds(record: Record) -> float:
    return float(record["token_ms"][-1]) / 1000 if record["token_ms"] else 0.0


def _summed(name: str) -> Part:
    return lambda record: float(record["summary"].get(name, 0))


MEASURES: Final[dict[str, Measure]] = {
    one.name: one
    for one in (
        Measure("first_token_ms", "time to first token", "ms", "lower",
                lambda r: r["token_ms"][0], lambda r: float(bool(r["token_ms"]))),
        Measure("ms_per_token", "time per further token", "ms", "lower",
                lambda r: r["token_ms"][-1] - r["token_ms"][0], lambda r: tokens(r) - 1),
        Measure("tokens_per_second", "throughput", "tokens/s", "higher", tokens, _seconds),
        Measure("accuracy", "accuracy", "of answers", "higher",
                lambda r: float(bool(r["right"])), lambda r: float(r["right"] is not None), share=True,
                of_failures=True),
        Measure("same_text", "same text as cloud_only", "of answers", "higher",
                lambda r: float(r["same_text"]), lambda r: float(r.get("same_text") is not None), share=True),
        Measure("cloud_rows_per_token", "cloud rows", "rows/token", "lower", _summed("cloud_rows"), tokens),
        Measure("cloud_steps_per_token", "cloud steps", "steps/token", "lower", _summed("cloud_steps"), tokens),
        Measure("cloud_ms_per_token", "cloud engine time", "ms/token", "lower", _summed("cloud_ms"), tokens),
        Measure("draft_ms_per_token", "draft time", "ms/token", "", _summed("draft_ms"), tokens),
        Measure("acceptance", "acceptance of judged drafts", "of drafts", "",
                lambda r: sum(one.accepted for one in judged(r)), lambda r: len(judged(r)), share=True),
        Measure("unverified", "tokens committed unverified", "of tokens", "",
                lambda r: r["origins"].count("local"), tokens, share=True),
        Measure("never_sent", "tokens never sent", "of tokens", "", _summed("never_sent"),
                lambda r: tokens(r) if "never_sent" in r["summary"] else 0, share=True),
        Measure("audit_disagreement", "disagreement found by audits", "of audited tokens", "lower",
                _summed("audit_disagreed"), _summed("audited"), share=True),
        Measure("wire_bytes_per_token", "bytes on the wire", "bytes/token", "lower", wire_bytes, tokens),
    )
}  # fmt: skip


def cost_measure(prices: Prices) -> Measure:
    """Cost per thousand tokens at these prices."""
    return Measure(
        "cost_per_1k_tokens", "cost", "per 1,000 tokens", "lower",
        lambda r: 1000 * sum(prices.parts(r).values()), tokens,
    )  # fmt: skip


def with_same_text(records: list[Record]) -> list[Record]:
    """Each record told whether its text is cloud_only's, where the same prompt and seed ran in cloud_only as well."""
    alone = {_place(r): r["ids"] for r in records if r["variant"] == "cloud_only" and not r["failure"]}
    return [{**r, "same_text": None if _place(r) not in alone else r.get("ids") == alone[_place(r)]} for r in records]


def _place(record: Record) -> tuple[int, int, float]:
    return record["prompt"], record["seed"], record["rtt_ms"]
