"""What `bench gate` replays: the target's own texts, and at each token what the draft would have drawn, and how sure.

Teacher-forced: the draft reads the target's text, so every position has a label, and any threshold can be replayed
on the same tokens. Both engines are llama.cpp, each model in its own context. Knows nothing of gates.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
from numpy.typing import NDArray

from pilotfish.cache.llama_context import LlamaContext, LlamaModel
from pilotfish.cache.llama_sequences import Part, Sequences
from pilotfish.cloud_worker.engines.base import Verifier, VerifyRequest
from pilotfish.edge_agent.confidence import Strategy
from pilotfish.edge_agent.tokenizer import LlamaTokenizer
from pilotfish.protocol.messages import Sampling
from pilotfish.protocol.sampling import draw

CONTEXT, SESSIONS = 512, 16
TASK_TOKENS, CODE_TOKENS = 72, 64
CODE = "code"
SEED = 40_000


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt; code to continue has no answer."""

    family: str
    prompt: str
    answer: str | None


@dataclass(frozen=True, slots=True)
class Recorded:
    """One request: the target's text, and per token what each strategy scored and whether the draft drew the same."""

    question: Question
    prompt: tuple[int, ...]
    text: tuple[int, ...]
    scores: NDArray[np.float64]  # [tokens, strategies]
    agreed: NDArray[np.bool_]  # [tokens]
    right: bool | None  # the answer is the expected one; None without one


def evaluation(path: Path, limit: int | None = None) -> list[Question]:
    """The fixed evaluation file, or `limit` of its rows, families in turn."""
    rows = [Question(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    return rows if limit is None else spread(rows, limit)


def calibration(count: int, but: Sequence[Question]) -> list[Question]:
    """Questions of the same families and code of the same kind, none of them in `but`; none was trained on either."""
    from pilotfish.demo import corpus, tasks

    taken = {question.prompt for question in but}
    per_family = count // 20 + 40
    asked = [Question(**row) for row in tasks.evaluation_set(per_family, seed=20260202)]
    code = [Question(CODE, text, None) for text in corpus.evaluation_prefixes(2 * count // 10 + 40, seed=20260202)]
    fresh = [question for question in asked + code if question.prompt not in taken]
    n_code = count // 10
    return spread([q for q in fresh if q.family != CODE], count - n_code) + spread(
        [q for q in fresh if q.family == CODE], n_code
    )


def spread(rows: Sequence[Question], limit: int) -> list[Question]:
    """`limit` questions, as many of each family as can be, in an order that mixes them; always the same."""
    families: dict[str, list[Question]] = {}
    for row in rows:
        families.setdefault(row.family, []).append(row)
    turns = max(map(len, families.values()), default=0)
    mixed = [family[i] for i in range(turns) for family in families.values() if i < len(family)][:limit]
    Random(7).shuffle(mixed)
    return mixed


class Recorder:
    """Both models, opened once. A context manager."""

    def __init__(self, target: Verifier, draft: LlamaModel, strategies: Sequence[Strategy]) -> None:
        self.target, self.draft, self.strategies = target, draft, list(strategies)
        self.tokenizer = LlamaTokenizer(draft)
        context = LlamaContext(draft, n_ctx=CONTEXT, sequences=1, threads=1, kv="f16", outputs=128)
        self._context, self._sequences = context, Sequences(context, exact=False)

    def close(self) -> None:
        """Free the draft's memory; the models are the caller's."""
        self._context.close()

    def record(self, questions: Sequence[Question], temperature: float = 0.0) -> Iterator[Recorded]:
        """Each question, SESSIONS of them in the target's passes at a time."""
        for start in range(0, len(questions), SESSIONS):
            chunk = questions[start : start + SESSIONS]
            prompts = [self.encode(question) for question in chunk]
            samplings = [Sampling(temperature=temperature, seed=SEED + start + i) for i in range(len(chunk))]
            texts = self._texts(chunk, prompts, samplings)
            for question, prompt, text, sampling in zip(chunk, prompts, texts, samplings, strict=True):
                yield self._forced(question, prompt, text, sampling)

    def encode(self, question: Question) -> list[int]:
        """The ids of a prompt: behind the chat template, code as it is."""
        return self.tokenizer.encode(question.prompt, chat=question.answer is not None)

    def _texts(
        self, questions: Sequence[Question], prompts: Sequence[list[int]], samplings: Sequence[Sampling]
    ) -> list[list[int]]:
        stops = tuple(sorted(self.draft.eog_ids))
        texts: dict[str, list[int]] = {}
        for i, (question, prompt, sampling) in enumerate(zip(questions, prompts, samplings, strict=True)):
            most = CODE_TOKENS if question.answer is None else TASK_TOKENS
            texts[f"r{i}"] = []
            self.target.submit(VerifyRequest(f"r{i}", f"s{i}", prompt, [], sampling, most - 1, stops))
        while self.target.busy:
            for event in self.target.step():
                texts[event.request_id] += event.draws
        return list(texts.values())

    def _forced(self, question: Question, prompt: list[int], text: list[int], sampling: Sampling) -> Recorded:
        """One pass of the draft over prompt and text: the row before each token is the one it is drawn from."""
        slot = self._sequences.hold("forced")
        assert slot is not None
        ids = prompt + text[:-1]
        kept = self._sequences.fit(slot, ids[: len(prompt)])
        part = Part(slot, ids[kept:], len(text))
        ((_, logits),) = self._sequences.evaluate([part])
        positions = np.arange(len(prompt), len(prompt) + len(text))
        drawn = draw(logits, positions, sampling)
        scores = [
            [one.score(row, int(token), int(position), sampling) for one in self.strategies]
            for row, token, position in zip(logits, drawn, positions, strict=True)
        ]
        return Recorded(
            question,
            tuple(prompt),
            tuple(text),
            np.asarray(scores),
            drawn == np.asarray(text),
            self._right(question, text),
        )

    def _right(self, question: Question, text: Sequence[int]) -> bool | None:
        if question.answer is None:
            return None
        said = b"".join(self.tokenizer.piece(token) for token in text if token not in self.draft.eog_ids)
        return said.decode("utf-8", "replace").strip() == question.answer
