"""What `bench control` replays: a text, the draft's say at each of its positions, and where a wrong one leads.

Behind a wrong proposal the draft goes on along its own path: that is recorded too, as far as any draft will look ahead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import NamedTuple

from pilotfish.bench.questions import evaluation
from pilotfish.bench.recording import CONTEXT, SESSIONS, Asked, follow, target_texts
from pilotfish.edge_agent.confidence import DEFAULT, strategy
from pilotfish.edge_agent.drafters.base import Drafter

AHEAD = 64  # ids recorded behind a wrong one
SHUFFLE = 4


class Astray(NamedTuple):
    """Ids the draft writes by itself, and their scores."""

    ids: tuple[int, ...] = ()
    scores: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Record:
    """One prompt. Position i of `drafts` and `scores` is the draft's proposal for `text[i]`, given all before it.

    `astray[i]`: the draft's own path behind its wrong id at i, AHEAD ids long (shorter after a stop id). `limit`:
    tokens the answer might have had, so that nobody who drafts knows where it ends.
    """

    prompt: tuple[int, ...]
    text: tuple[int, ...]
    limit: int
    drafts: tuple[int, ...]
    scores: tuple[float, ...]
    astray: dict[int, Astray] = field(default_factory=dict)

    @property
    def agreed(self) -> int:
        """Positions where the draft proposes what the target draws."""
        return sum(drafted == drawn for drafted, drawn in zip(self.drafts, self.text, strict=True))

    def proposal(self, said: Sequence[int]) -> tuple[int, float]:
        """What the draft says after an answer that begins so: some of the text, then perhaps a path of its own."""
        wrong = next((i for i, (a, b) in enumerate(zip(said, self.text, strict=False)) if a != b), None)
        if wrong is None and len(said) < len(self.text):
            return self.drafts[len(said)], self.scores[len(said)]
        path = self.astray.get(len(self.text) if wrong is None else wrong, Astray())
        behind = len(said) - (wrong or 0) - 1
        return (path.ids[behind], path.scores[behind]) if behind < len(path.ids) else (self.text[-1], 0.0)


def acceptance(records: Sequence[Record]) -> float:
    """Share of all positions where the draft agrees with the target, on the target's text."""
    return sum(record.agreed for record in records) / sum(len(record.text) for record in records)


# --- recording -----------------------------------------------------------------------------------------------


def record_all(target: Path, draft: Path, questions_file: Path, stride: int) -> tuple[list[Record], frozenset[int]]:
    """Every `stride`-th evaluation prompt at T = 0, and the ids that end a text. Loads both models (llama.cpp).

    Shuffled, always alike: the file has family after family, and what changes with time shall not be the subject.
    """
    from pilotfish.cloud_worker.engines.llamacpp import LlamaCppVerifier
    from pilotfish.edge_agent.drafters.llamacpp import LlamaCppDrafter
    from pilotfish.edge_agent.tokenizer import LlamaTokenizer

    with LlamaCppDrafter(draft, context=CONTEXT, sessions=1, threads=1, confidence=strategy(DEFAULT).score) as drafter:
        tokenizer, stop_ids = LlamaTokenizer(drafter.model), frozenset(drafter.model.eog_ids)
        asked = [
            Asked(tuple(tokenizer.encode(question.prompt, chat=question.chat)), question.limit)
            for question in evaluation(questions_file)[::stride]
        ]
        Random(SHUFFLE).shuffle(asked)
        engine = LlamaCppVerifier(target, context=CONTEXT, draft_max=1, max_sessions=SESSIONS, threads=1)
        texts = target_texts(engine, asked, stop_ids)
        engine.close()
        return [record(drafter, one, text, stop_ids) for one, text in zip(asked, texts, strict=True)], stop_ids


def record(drafter: Drafter, asked: Asked, text: Sequence[int], stop_ids: frozenset[int]) -> Record:
    """Lead the draft along the text; at each wrong id, also the path it would have taken."""
    said, astray = follow(drafter, asked, text, stop_ids), dict[int, Astray]()
    for at, (drafted, drawn) in enumerate(zip(said.ids, text, strict=True)):
        if drafted != drawn and drafted not in stop_ids:
            path = drafter.draft("record", [*asked.prompt, *text[:at], drafted], AHEAD, asked.sampling, stop_ids)
            astray[at] = Astray(tuple(path.ids), tuple(path.confidences))
    return Record(asked.prompt, tuple(text), asked.limit, said.ids, said.scores, astray)
