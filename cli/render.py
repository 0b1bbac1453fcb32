"""How an answer looks: its tokens coloured by origin, and the one line that says what it cost.

    accepted    drafted here, and the target's own draw too     blue
    corrected   drafted here, the target drew another           orange, underlined
    continued   the target's own, nothing was drafted for it    italic
    local       committed here without the target               purple, reversed

The colours are told apart by colour-blind people too, and each has an attribute of its own. Knows rich; no Redis.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from pilotfish.protocol.messages import Origin, Summary

if TYPE_CHECKING:
    from rich.text import Text

STYLES: dict[Origin, str] = {
    "accepted": "#56b4e9",
    "corrected": "underline #e69f00",
    "continued": "italic",
    "local": "reverse #cc79a7",
}


def visible(text: str) -> str:
    """Text that cannot steer a terminal: a control character becomes its picture."""
    return "".join(chr(0x2400 + ord(c)) if c < " " and c not in "\n\t" else "␡" if c == "\x7f" else c for c in text)


def traced(pieces: Iterable[tuple[str, Origin]]) -> Text:
    """Pieces of text, each in the style of its origin."""
    from rich.text import Text

    return Text.assemble(*((visible(piece), STYLES[origin]) for piece, origin in pieces))


def legend() -> Text:
    """What the styles mean."""
    from rich.text import Text

    return Text("trace: ").append_text(Text("  ").join(Text(name, STYLES[name]) for name in STYLES))


# --- the summary ---------------------------------------------------------------------------------------------


def acceptance(summary: Summary) -> float | None:
    """The share of drafts that the target drew too, among those it judged; None when it judged none."""
    judged = summary.accepted + summary.corrected
    return summary.accepted / judged if judged else None


def summary_line(summary: Summary) -> str:
    """One line: tokens by origin, acceptance, rounds, what the cloud computed, milliseconds, seed."""
    origins = [f"{count} {name}" for name in STYLES if (count := getattr(summary, name))]
    parts = [counted(summary.tokens, "token") + (f": {', '.join(origins)}" if origins else "")]
    if (rate := acceptance(summary)) is not None:
        parts.append(f"acceptance {rate:.2f}")
    if summary.rounds:
        parts += [counted(summary.rounds, "round"), _cloud(summary)]
    if summary.unverified:
        parts.append(f"{summary.unverified} unverified, {summary.never_sent} never sent")
    if summary.audited:
        parts.append(f"audited {summary.audited}, {summary.audit_disagreed} differ")
    if summary.resends:
        parts.append(counted(summary.resends, "resend"))
    if summary.ceded:
        parts.append(f"{summary.ceded} left to the cloud, drafting was slower")
    if summary.degraded:
        parts.append("the cloud was lost for a while")
    parts += [f"{summary.total_ms:.0f} ms (first {summary.first_token_ms:.0f} ms)", f"seed {summary.seed}"]
    return " · ".join(parts)


def _cloud(summary: Summary) -> str:
    tokens = max(1, summary.tokens)
    return f"{summary.cloud_rows / tokens:.1f} rows and {summary.cloud_steps / tokens:.2f} steps per token"


def counted(count: int, noun: str) -> str:
    """Such as 1 round, 2 rounds."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def as_json(summary: Summary) -> dict[str, object]:
    """The summary with the acceptance."""
    return {**summary.model_dump(), "acceptance": acceptance(summary)}
