"""Continuation of many prompts at once, with a cache of keys and values.

For evaluation and for the target's own text; the product's engines have their own generation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pilotfish.demo import tokenizer as tok
from pilotfish.demo.layout import Cache, Layout
from pilotfish.demo.model import LanguageModel

STOP = (tok.END_OF_TEXT, tok.END)


def pick(logits: Tensor, temperature: float) -> Tensor:
    """One id per row of logits [B, vocabulary]: the best, or a draw."""
    if temperature == 0:
        return logits.argmax(-1)
    return (logits / temperature - torch.empty_like(logits).exponential_().log()).argmax(-1)


@torch.inference_mode()
def extend(
    model: LanguageModel, prompts: list[list[int]], n_new: int, temperature: float = 0, stop: tuple[int, ...] = STOP
) -> list[list[int]]:
    """Up to n_new new ids after each prompt, the stop token included."""
    lengths = [len(p) for p in prompts]
    cache = Cache(model.shape, len(prompts), max(lengths) + n_new)
    last = torch.tensor(lengths).cumsum(0) - 1
    packed = torch.tensor([i for p in prompts for i in p])
    ids = pick(model(packed, Layout.of_lengths(lengths), last, cache).float(), temperature)
    out, alive = [[i] for i in ids.tolist()], list(range(len(prompts)))
    for step in range(n_new - 1):
        going = [at for at, row in enumerate(alive) if out[row][-1] not in stop]
        if not going:
            break
        if len(going) < 0.75 * len(alive):  # ended rows are dropped now and then: each time copies the cache
            cache.select(going)
            alive, ids = [alive[at] for at in going], ids[going]
        layout = Layout.of_lengths([1] * len(alive), [lengths[row] + step for row in alive])
        ids = pick(model(ids, layout, None, cache).float(), temperature)
        for row, i in zip(alive, ids.tolist(), strict=True):
            out[row].append(i)
    return [until_stop(row, stop) for row in out]


def until_stop(ids: list[int], stop: tuple[int, ...]) -> list[int]:
    """The ids up to the first stop token, with it."""
    end = next((at for at, i in enumerate(ids) if i in stop), len(ids))
    return ids[: end + 1]


def in_chunks(
    model: LanguageModel, prompts: list[list[int]], n_new: int, temperature: float = 0, size: int = 96
) -> list[list[int]]:
    """`extend` over any number of prompts, in chunks of similar length, results in the order of the prompts."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    done: dict[int, list[int]] = {}
    for start in range(0, len(order), size):
        chunk = order[start : start + size]
        done |= dict(zip(chunk, extend(model, [prompts[i] for i in chunk], n_new, temperature), strict=True))
    return [done[i] for i in range(len(prompts))]
