"""What `bench gate` replays: the target's own texts, and at each token what the draft would have drawn, and how sure.

The draft is led along the target's text, so every position has a label, and any threshold can be replayed on the same
tokens. Knows nothing of gates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pilotfish.bench.questions import Question
from pilotfish.bench.recording import CONTEXT, SESSIONS, Asked, EveryScore, follow, target_texts
from pilotfish.edge_agent.confidence import DEFAULT, strategies
from pilotfish.edge_agent.tokenizer import LlamaTokenizer
from pilotfish.protocol.messages import Sampling

SEED = 40_000


@dataclass(frozen=True, slots=True)
class Recorded:
    """One request: the target's text, and per token what each strategy scored and whether the draft drew the same."""

    question: Question
    prompt: tuple[int, ...]
    text: tuple[int, ...]
    scores: NDArray[np.float64]  # [tokens, strategies]
    agreed: NDArray[np.bool_]  # [tokens]


def record(target: Path, draft: Path, questions: Sequence[Question], temperature: float) -> list[Recorded]:
    """Each question; columns of the scores in the order of `strategies()`. Loads both models (llama.cpp)."""
    from pilotfish.cloud_worker.engines.llamacpp import LlamaCppVerifier
    from pilotfish.edge_agent.drafters.llamacpp import LlamaCppDrafter

    every = EveryScore(list(strategies().values()), DEFAULT)
    with LlamaCppDrafter(draft, context=CONTEXT, sessions=1, threads=1, confidence=every) as drafter:
        tokenizer, stop_ids = LlamaTokenizer(drafter.model), frozenset(drafter.model.eog_ids)
        asked = [
            Asked(tuple(tokenizer.encode(one.prompt, chat=one.chat)), one.limit, sampling(temperature, number))
            for number, one in enumerate(questions)
        ]
        engine = LlamaCppVerifier(target, context=CONTEXT, draft_max=1, max_sessions=SESSIONS, threads=1)
        texts = target_texts(engine, asked, stop_ids)
        engine.close()
        found = list[Recorded]()
        for question, one, text in zip(questions, asked, texts, strict=True):
            agreed = np.array(follow(drafter, one, text, stop_ids).ids) == np.array(text)
            found.append(Recorded(question, one.prompt, tuple(text), every.take(), agreed))
        return found


def sampling(temperature: float, number: int) -> Sampling:
    """The same draws for the same question, wherever it is asked."""
    return Sampling(temperature=temperature, seed=SEED + number)
