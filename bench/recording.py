"""What a pair does, written down once: the target's own texts, and what the draft says at each of their positions.

In `exact` mode the text is the target's own, whatever is drafted. So these two decide every round that any way of
drafting could have had, and every token that any gate could have kept: benchmarks replay them as often as they like.
Both models run in the product's engine and drafter. Runs llama.cpp in this process: never where vLLM is loaded.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import cached_property
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pilotfish.cloud_worker.engines.base import Verifier, VerifyRequest
from pilotfish.edge_agent.drafters.base import Drafter
from pilotfish.protocol.messages import Sampling

if TYPE_CHECKING:
    from pilotfish.edge_agent.confidence import Strategy
    from pilotfish.edge_agent.drafters.llamacpp import LlamaCppDrafter

CONTEXT, SESSIONS = 512, 16


class Asked(NamedTuple):
    """A prompt's ids, how long its answer may get, and how it is drawn."""

    prompt: tuple[int, ...]
    limit: int
    sampling: Sampling = Sampling()


class Said(NamedTuple):
    """The draft's draw at each position of a text, given all before it, and its confidence."""

    ids: tuple[int, ...]
    scores: tuple[float, ...]


def target_texts(engine: Verifier, asked: Sequence[Asked], stop_ids: Collection[int]) -> list[list[int]]:
    """What the target itself writes, a stop id included; SESSIONS answers share its passes."""
    texts: dict[str, list[int]] = {}
    for start in range(0, len(asked), SESSIONS):
        for number, (prompt, limit, sampling) in enumerate(asked[start : start + SESSIONS], start):
            texts[name := str(number)] = []
            engine.submit(VerifyRequest(name, name, list(prompt), [], sampling, limit - 1, tuple(sorted(stop_ids))))
        while engine.busy:
            for event in engine.step():
                texts[event.request_id] += event.draws
                if event.done:
                    engine.forget(event.request_id)
    return list(texts.values())


def follow(drafter: Drafter, asked: Asked, text: Sequence[int], stop_ids: Collection[int] = ()) -> Said:
    """Lead the draft along a text, whatever it would have said itself."""
    ids, said = [*asked.prompt, *text], list[tuple[int, float]]()
    for at in range(len(asked.prompt), len(ids)):
        found = drafter.draft("record", ids[:at], 1, asked.sampling, stop_ids)
        said.append((found.ids[0], found.confidences[0]))
    return Said(*map(tuple, zip(*said, strict=True))) if said else Said((), ())


class EveryScore:
    """A drafter's confidence that is one strategy's, and notes what all the others say of the same row."""

    def __init__(self, strategies: Sequence[Strategy], of: str) -> None:
        self.strategies, self._own = list(strategies), [one.name for one in strategies].index(of)
        self._rows: list[list[float]] = []

    def __call__(self, logits: NDArray[np.float32], token: int, position: int, sampling: Sampling) -> float:
        """See `Strategy.score`."""
        self._rows.append([one.score(logits, token, position, sampling) for one in self.strategies])
        return self._rows[-1][self._own]

    def take(self) -> NDArray[np.float64]:
        """[tokens, strategies] since the last call."""
        rows, self._rows = self._rows, []
        return np.asarray(rows).reshape(-1, len(self.strategies))


class DemoDraft:
    """The demo draft beside texts that another engine wrote (T = 0); opened when it is first asked."""

    CONTEXT = 4096

    def __init__(self) -> None:
        self._known: dict[tuple[int, ...], list[bool]] = {}

    @cached_property
    def _drafter(self) -> LlamaCppDrafter:
        from pilotfish.demo import pair
        from pilotfish.edge_agent.drafters.llamacpp import LlamaCppDrafter

        return LlamaCppDrafter(pair.draft_gguf(), context=self.CONTEXT, sessions=1, threads=1)

    def answer(self, text: Sequence[int]) -> list[int]:
        """The text up to the target's own end, which is part of it; all of it if there is none."""
        stops = self._drafter.model.eog_ids
        end = next((i for i, token in enumerate(text) if token in stops), len(text) - 1)
        return list(text[: end + 1])

    def agreement(self, prompt: Sequence[int], text: Sequence[int]) -> list[bool]:
        """Whether the draft would have drawn each token of the text."""
        ids = (*prompt, *text)
        if ids not in self._known:
            said = follow(self._drafter, Asked(tuple(prompt), len(text)), text)
            self._known[ids] = [drafted == drawn for drafted, drawn in zip(said.ids, text, strict=True)]
        return self._known[ids]

    def acceptance(self) -> float:
        """Share of all tokens looked at so far."""
        marks = [mark for agreed in self._known.values() for mark in agreed]
        return round(sum(marks) / len(marks), 3)

    def draft_ms(self, tokens: int = 16) -> float:
        """t_d: median ms of a drafted token behind each known text, its prefill done before."""
        times = []
        for ids in list(self._known)[:20]:
            self._drafter.sync("t_d", ids)
            times.append(self._drafter.draft("t_d", ids, tokens, Sampling()).ms / tokens)
        return round(median(times), 3)
