"""Whether a text survived: each token the target's own draw, or flagged as written without it. Pure.

The judge recomputes every draw on the prefix that was really written, so it needs neither log nor luck. It shares the
fake target's hash with the engine, and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pilotfish.bench.chaos_plan import Wish
from pilotfish.cloud_worker.engines.fake import VOCAB, FakeTarget, flipped_draw

Switches = tuple[float, int]  # a worker's (flip_rate, flip_seed)
HONEST: Switches = (0.0, 0)


@dataclass(frozen=True, slots=True)
class Fate:
    """How one generation ended: its ids and who wrote each, and its finish reason, or the code it failed with."""

    wish: Wish
    ids: tuple[int, ...]
    origins: tuple[str, ...]
    end: str
    rounds: int = 0
    degraded: bool = False
    local: int | None = 0  # tokens its summary counts as written alone; None if two agents wrote the text


def complaint(fate: Fate, fleet: Sequence[Switches] = (HONEST,)) -> str:
    """What is wrong with it, "" if nothing is. `fleet` are the switches of every worker that may have answered."""
    if (at := first_unexplained(fate, fleet)) is not None:
        return f"nobody drew token {at}, which is flagged {fate.origins[at]}"
    alone = fate.origins.count("local")
    if alone and fate.wish.on_cloud_loss == "wait":
        return f"{alone} tokens written alone, which the request forbids"
    if fate.end != "length":
        return ""
    if len(fate.ids) != fate.wish.max_tokens:
        return f"{len(fate.ids)} tokens instead of {fate.wish.max_tokens}"
    if fate.local is not None and (alone != fate.local or (alone and not fate.degraded)):
        return f"{alone} tokens written alone, the summary owns up to {fate.local} (degraded: {fate.degraded})"
    return ""


def first_unexplained(fate: Fate, fleet: Sequence[Switches]) -> int | None:
    """Index of the first id that is neither flagged `local` nor some worker's draw on the prefix as it is."""
    wish = fate.wish
    target, base = FakeTarget(wish.prompt, wish.sampling, VOCAB), len(wish.prompt)
    for at, (token, origin) in enumerate(zip(fate.ids, fate.origins, strict=True)):
        if origin != "local" and all(flipped_draw(target, base + at, VOCAB, *one) != token for one in fleet):
            return at
        target.extend([token])
    return None
