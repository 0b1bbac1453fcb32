"""What the demo pair does, written down once: enough to replay every way of drafting without a model.

In `exact` mode the text is the target's own, whatever is drafted. So a record holds, per prompt, that text, and at each
of its positions the id the draft proposes there, with its score. Behind a wrong one the draft goes on along its own
path: that is recorded too, as far as any draft will look ahead. Both models run in the product's engine and drafter.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import NamedTuple

from pilotfish.cloud_worker.engines.base import Verifier, VerifyRequest
from pilotfish.edge_agent.drafters.base import Drafter
from pilotfish.protocol.messages import Sampling

AHEAD = 64  # ids recorded behind a wrong one
CONTEXT = 512
TASK_TOKENS, CODE_TOKENS = 48, 96  # longest answers
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


class Question(NamedTuple):
    """A prompt's ids, and how long its answer may get."""

    prompt: tuple[int, ...]
    limit: int


def record_all(target: Path, draft: Path, questions_file: Path, stride: int) -> tuple[list[Record], frozenset[int]]:
    """Every `stride`-th evaluation prompt at T = 0, and the ids that end a text. Loads both models (llama.cpp).

    Shuffled, always alike: the file has family after family, and what changes with time shall not be the subject.
    """
    from pilotfish.cloud_worker.engines.llamacpp import LlamaCppVerifier
    from pilotfish.edge_agent.drafters.llamacpp import LlamaCppDrafter
    from pilotfish.edge_agent.tokenizer import LlamaTokenizer

    with LlamaCppDrafter(draft, context=CONTEXT, sessions=1, threads=1) as drafter:
        tokenizer, stop_ids = LlamaTokenizer(drafter.model), frozenset(drafter.model.eog_ids)
        asked = list[Question]()
        for line in questions_file.read_text(encoding="utf-8").splitlines()[::stride]:
            row = json.loads(line)
            chat = row["answer"] is not None
            ids = tuple(tokenizer.encode(row["prompt"], chat=chat))
            asked.append(Question(ids, TASK_TOKENS if chat else CODE_TOKENS))
        Random(SHUFFLE).shuffle(asked)
        engine = LlamaCppVerifier(target, context=CONTEXT, draft_max=1, max_sessions=8, threads=1)
        texts = target_texts(engine, asked, stop_ids)
        engine.close()
        return [record(drafter, one, text, stop_ids) for one, text in zip(asked, texts, strict=True)], stop_ids


def target_texts(engine: Verifier, asked: Sequence[Question], stop_ids: frozenset[int]) -> list[list[int]]:
    """What the target itself writes, a stop id included."""
    texts: dict[str, list[int]] = {}
    for number, (prompt, limit) in enumerate(asked):
        texts[name := str(number)] = []
        engine.submit(VerifyRequest(name, name, list(prompt), [], Sampling(), limit - 1, tuple(stop_ids)))
    while engine.busy:
        for event in engine.step():
            texts[event.request_id] += event.draws
            if event.done:
                engine.forget(event.request_id)
    return list(texts.values())


def record(drafter: Drafter, asked: Question, text: Sequence[int], stop_ids: frozenset[int]) -> Record:
    """Follow the text with the draft; at each wrong id, also the path the draft would have taken."""
    ids, drafts, scores, astray = list(asked.prompt), list[int](), list[float](), dict[int, Astray]()
    for at, drawn in enumerate(text):
        found = drafter.draft("record", ids, 1, Sampling(), stop_ids)
        drafts += found.ids
        scores += found.confidences
        if found.ids[0] != drawn and found.ids[0] not in stop_ids:
            path = drafter.draft("record", [*ids, *found.ids], AHEAD, Sampling(), stop_ids)
            astray[at] = Astray(tuple(path.ids), tuple(path.confidences))
        ids.append(drawn)
    return Record(asked.prompt, tuple(text), asked.limit, tuple(drafts), tuple(scores), astray)
