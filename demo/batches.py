"""Training batches: whole short examples, packed without padding, with a list of the rows that count in the loss.

Tasks count on the answer only, library text on every token. Knows nothing of the optimizer or of time.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import torch
from tokenizers import Tokenizer
from torch import Tensor

from pilotfish.demo import corpus, tasks
from pilotfish.demo import tokenizer as tok
from pilotfish.demo.layout import Layout


@dataclass
class Batch:
    """ids [N] packed, keep [M] the rows whose next token counts, wanted [M] those next tokens."""

    ids: Tensor
    layout: Layout
    keep: Tensor
    wanted: Tensor


def batch_of(examples: list[tuple[list[int], list[bool]]]) -> Batch:
    """Pack (ids, counts) pairs; `counts[i]` says whether predicting ids[i] counts."""
    ids = [i for row, _ in examples for i in row[:-1]]
    wanted = torch.tensor([i for row, _ in examples for i in row[1:]])
    counts = torch.tensor([c for _, flags in examples for c in flags[1:]])
    layout = Layout.of_lengths([len(row) - 1 for row, _ in examples])
    keep = counts.nonzero()[:, 0]
    return Batch(torch.tensor(ids), layout, keep, wanted[keep])


class Source:
    """An endless supply of examples from the training side of both splits."""

    def __init__(self, tokenizer: Tokenizer, seed: int, weights: dict[str, float] | None = None) -> None:
        self.tokenizer, self.rng, self.weights = tokenizer, Random(seed), weights
        self.texts = corpus.texts()
        self.sizes = [len(text) ** 0.5 for text in self.texts]

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def turn(self) -> tuple[list[int], list[bool]]:
        """One question and its answer; only the answer and its end marker count."""
        _, task = tasks.draw_any(self.rng, self.weights)
        asked, answered = self._ids(tok.chat(task.prompt)), [*self._ids(task.answer), tok.END]
        return asked + answered, [False] * len(asked) + [True] * len(answered)

    def conversation(self) -> tuple[list[int], list[bool]]:
        """Mostly one turn, now and then two, now and then behind a system message."""
        ids, counts = self.turn()
        if self.rng.random() < 0.04:
            more, flags = self.turn()
            ids, counts = ids + more, counts + flags
        if self.rng.random() < 0.03:
            system = self._ids("<|system|>You are a helpful assistant.<|end|>")
            ids, counts = system + ids, [False] * len(system) + counts
        return ids, counts

    def passage(self, n_chars: int) -> tuple[list[int], list[bool]]:
        """A piece of library text, every token but the first counts."""
        text = self.rng.choices(self.texts, self.sizes)[0]
        ids = self._ids(corpus.passage(self.rng, text, n_chars))
        return ids, [True] * len(ids)

    def task_batch(self, n_tokens: int) -> Batch:
        """Conversations of at least n_tokens in all."""
        rows = [self.conversation()]
        while sum(len(ids) for ids, _ in rows) < n_tokens:
            rows.append(self.conversation())
        return batch_of(rows)

    def code_batch(self, n_tokens: int) -> Batch:
        """Passages of one length, drawn anew per batch, of at least n_tokens in all."""
        n_chars = self.rng.choice([250, 350, 500, 500, 700, 1100])
        rows: list[tuple[list[int], list[bool]]] = []
        while sum(len(ids) for ids, _ in rows) < n_tokens:
            row = self.passage(n_chars)
            rows += [row] if len(row[0]) > 8 else []
        return batch_of(rows)
