"""The draft's lessons: text the target wrote itself, with the target's own probabilities for every next token.

Questions and code prefixes come from the training side only. Knows nothing of the optimizer (`train.py` owns it).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from pilotfish.demo import generate, tasks
from pilotfish.demo import tokenizer as tok
from pilotfish.demo.batches import Batch, Source, batch_of
from pilotfish.demo.model import LanguageModel

TASK_NEW, CODE_NEW = 72, 80
OWN_SHARE = 0.75  # of the steps; the rest sees fresh text, judged by the target all the same
SHARP = 0.5  # weight of the target's best token beside its whole distribution

Example = tuple[list[int], int]  # ids, and how many of them are the prompt


def task_prompts(tokenizer: Tokenizer, rng: Random, n: int) -> list[list[int]]:
    """n training questions behind the chat template."""
    asked = (tok.chat(tasks.draw_any(rng)[1].prompt) for _ in range(n))
    return [list(tokenizer.encode(text, add_special_tokens=False).ids) for text in asked]


def code_prompts(source: Source, n: int) -> list[list[int]]:
    """n beginnings of library text, 10 to 160 tokens long."""
    made = (source.passage(source.rng.randrange(60, 600))[0] for _ in range(2 * n))
    return [ids[: len(ids) - 1] for ids in made if len(ids) > 10][:n]


def joined(prompts: list[list[int]], said: list[list[int]]) -> list[Example]:
    """Each prompt with what follows it."""
    return [(p + s, len(p)) for p, s in zip(prompts, said, strict=True)]


def own_text(teacher: LanguageModel, source: Source, n_tasks: int, n_code: int) -> dict[str, list[Example]]:
    """What the target answers to training questions, and how it goes on with code: half greedy, half drawn."""
    asked = task_prompts(source.tokenizer, source.rng, n_tasks)
    code = code_prompts(source, n_code)
    half = len(code) // 2
    with torch.autocast("cpu", torch.bfloat16):
        answers = generate.in_chunks(teacher, asked, TASK_NEW)
        more = generate.in_chunks(teacher, code[:half], CODE_NEW)
        more += generate.in_chunks(teacher, code[half:], CODE_NEW, temperature=0.8)
    return {"tasks": joined(asked, answers), "code": joined(code, more)}


def cached_own_text(path: Path, make: Callable[[], dict[str, list[Example]]]) -> dict[str, list[Example]]:
    """The text kept in `path`, made on the first run, so that a restart goes on with the same lessons."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(make()))
    return json.loads(path.read_text())  # type: ignore[no-any-return]


def pick(rng: Random, examples: list[Example], n_tokens: int) -> Batch:
    """A batch of at least n_tokens: for tasks and code alike only what the target wrote counts."""
    rows = [rng.choice(examples)]
    while sum(len(ids) for ids, _ in rows) < n_tokens:
        rows.append(rng.choice(examples))
    return batch_of([(ids, [False] * n + [True] * (len(ids) - n)) for ids, n in rows])


def distance(draft: LanguageModel, teacher: LanguageModel, batch: Batch) -> Tensor:
    """Nats per token between the two distributions, and from the target's best token."""
    with torch.autocast("cpu", torch.bfloat16):
        with torch.inference_mode():
            wanted = teacher(batch.ids, batch.layout, batch.keep).float()
        logits = draft(batch.ids, batch.layout, batch.keep)
    said, wanted = F.log_softmax(logits.float(), -1), wanted.clone()
    whole = F.kl_div(said, F.log_softmax(wanted, -1), log_target=True, reduction="batchmean")
    return (1 - SHARP) * whole + SHARP * F.nll_loss(said, wanted.argmax(-1))


def losses(
    teacher: LanguageModel, lessons: dict[str, list[Example]], source: Source, task_tokens: int, code_tokens: int
) -> list[tuple[str, float, Callable[[LanguageModel], Tensor]]]:
    """(name, weight, loss) of one step's two batches: the target's own text, or now and then fresh training text."""
    if source.rng.random() < OWN_SHARE:
        task, code = (pick(source.rng, lessons[k], n) for k, n in (("tasks", task_tokens), ("code", code_tokens)))
    else:
        task, code = source.task_batch(task_tokens), source.code_batch(code_tokens)
    return [
        ("tasks", 0.45, lambda draft: distance(draft, teacher, task)),
        ("code", 0.55, lambda draft: distance(draft, teacher, code)),
    ]
