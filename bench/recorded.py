"""What the demo draft really says about a text of the demo target: its own draw at each position, teacher-forced.

Since `exact` text is the target's own, this record decides every round that any K could have had. Runs llama.cpp in
this process: never where vLLM is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

from pilotfish.protocol.messages import Sampling

if TYPE_CHECKING:
    from pilotfish.edge_agent.drafters.llamacpp import LlamaCppDrafter

CONTEXT = 4096
_known: dict[tuple[int, ...], list[bool]] = {}


@cache
def _drafter() -> LlamaCppDrafter:
    from pilotfish.demo import pair
    from pilotfish.edge_agent.drafters.llamacpp import LlamaCppDrafter

    return LlamaCppDrafter(pair.draft_gguf(), context=CONTEXT, sessions=1, threads=1)


def answer(text: Sequence[int]) -> list[int]:
    """The text up to the target's own end, which is part of it; all of it if there is none."""
    stops = _drafter().model.eog_ids
    end = next((i for i, token in enumerate(text) if token in stops), len(text) - 1)
    return list(text[: end + 1])


def agreement(prompt: Sequence[int], text: Sequence[int]) -> list[bool]:
    """Whether the draft would have drawn each token of the text (T = 0)."""
    ids = (*prompt, *text)
    if ids not in _known:
        found = [_drafter().draft("recorded", ids[:at], 1, Sampling()) for at in range(len(prompt), len(ids))]
        _known[ids] = [one.ids[0] == token for one, token in zip(found, text, strict=True)]
    return _known[ids]


def acceptance() -> float:
    """Share of all tokens looked at so far."""
    marks = [mark for agreed in _known.values() for mark in agreed]
    return round(sum(marks) / len(marks), 3)


def draft_ms(tokens: int = 16) -> float:
    """t_d: median ms of a drafted token behind each known text, its prefill done before."""
    from statistics import median

    times = []
    for ids in list(_known)[:20]:
        _drafter().sync("t_d", ids)
        times.append(_drafter().draft("t_d", ids, tokens, Sampling()).ms / tokens)
    return round(median(times), 3)
