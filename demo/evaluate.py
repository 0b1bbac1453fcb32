"""How good the pair is: exact match per family of both models, and how often the draft names the target's next token.

Reads the fixed questions of eval.jsonl; trains nothing. Agreement is teacher-forced on the target's own greedy text.

    python -m pilotfish.demo.evaluate [--json]
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from pilotfish.demo import corpus, generate, store, tasks
from pilotfish.demo import tokenizer as tok
from pilotfish.demo.batches import batch_of
from pilotfish.demo.model import LanguageModel
from pilotfish.demo.pair import DRAFT_DIR, EVAL_FILE, TARGET_DIR

TASK_NEW, CODE_NEW = 72, 64
CODE = "code"


@dataclass
class Report:
    """Shares between 0 and 1; accuracy by family, agreement by kind of text."""

    target_accuracy: dict[str, float]
    draft_accuracy: dict[str, float]
    target_overall: float
    draft_overall: float
    agreement: dict[str, float]
    agreement_by_family: dict[str, float]
    answer_tokens: float


def write_questions(path: Path, per_family: int = 20, n_code: int = 40) -> None:
    """Write the fixed evaluation file: questions of every family, then code to continue (answer null)."""
    code = [{"family": CODE, "prompt": text, "answer": None} for text in corpus.evaluation_prefixes(n_code)]
    rows = [*tasks.evaluation_set(per_family), *code]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def questions(path: Path = EVAL_FILE) -> list[dict[str, str | None]]:
    """The rows of the evaluation file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def prompt_ids(tokenizer: Tokenizer, row: dict[str, str | None]) -> list[int]:
    """A question behind the chat template, code as it is."""
    text = row["prompt"] or ""
    return list(tokenizer.encode(text if row["family"] == CODE else tok.chat(text), add_special_tokens=False).ids)


def accuracy(model: LanguageModel, tokenizer: Tokenizer, rows: list[dict[str, str | None]]) -> dict[str, float]:
    """Share of exactly right answers, per family."""
    made = generate.in_chunks(model, [prompt_ids(tokenizer, row) for row in rows], TASK_NEW)
    right: defaultdict[str, list[bool]] = defaultdict(list)
    for row, ids in zip(rows, made, strict=True):
        said = tokenizer.decode(ids[:-1], skip_special_tokens=False) if ids[-1] == tok.END else None
        right[str(row["family"])].append(said == row["answer"])
    return {family: sum(marks) / len(marks) for family, marks in right.items()}


@torch.inference_mode()
def agreement(draft: LanguageModel, prompt: list[int], said: list[int]) -> list[bool]:
    """Whether the draft would have named each of the target's tokens."""
    batch = batch_of([(prompt + said, [False] * len(prompt) + [True] * len(said))])
    named: Tensor = draft(batch.ids, batch.layout, batch.keep).argmax(-1)
    return [bool(mark) for mark in named == batch.wanted]


def agreement_by_family(
    target: LanguageModel, draft: LanguageModel, tokenizer: Tokenizer, rows: list[dict[str, str | None]], n_new: int
) -> dict[str, list[bool]]:
    """Each family's marks, over the target's greedy text after each prompt."""
    prompts = [prompt_ids(tokenizer, row) for row in rows]
    marks: defaultdict[str, list[bool]] = defaultdict(list)
    for row, prompt, said in zip(rows, prompts, generate.in_chunks(target, prompts, n_new), strict=True):
        marks[str(row["family"])] += agreement(draft, prompt, said)
    return marks


def mean(marks: list[bool]) -> float:
    """Share of true marks."""
    return sum(marks) / len(marks)


def report(target: LanguageModel, draft: LanguageModel, tokenizer: Tokenizer) -> Report:
    """Everything over the fixed questions (about a minute on one core)."""
    rows = questions()
    asked, code = [r for r in rows if r["answer"] is not None], [r for r in rows if r["answer"] is None]
    good, fair = accuracy(target, tokenizer, asked), accuracy(draft, tokenizer, asked)
    by_family = agreement_by_family(target, draft, tokenizer, asked, TASK_NEW)
    on_code = agreement_by_family(target, draft, tokenizer, code, CODE_NEW)[CODE]
    on_tasks = [mark for marks in by_family.values() for mark in marks]
    return Report(
        target_accuracy=good,
        draft_accuracy=fair,
        target_overall=sum(good.values()) / len(good),
        draft_overall=sum(fair.values()) / len(fair),
        agreement={"tasks": mean(on_tasks), "code": mean(on_code)},
        agreement_by_family={family: mean(marks) for family, marks in by_family.items()},
        answer_tokens=len(on_tasks) / len(asked),
    )


def table(r: Report) -> str:
    """The report for people."""
    lines = [f"{'family':16}{'target':>8}{'draft':>8}{'agree':>8}"]
    for family, share in r.target_accuracy.items():
        lines.append(f"{family:16}{share:8.2f}{r.draft_accuracy[family]:8.2f}{r.agreement_by_family[family]:8.2f}")
    lines.append(f"{'all':16}{r.target_overall:8.3f}{r.draft_overall:8.3f}{r.agreement['tasks']:8.3f}")
    lines.append(f"{'code':32}{r.agreement['code']:8.3f}")
    return "\n".join([*lines, f"mean answer {r.answer_tokens:.1f} tokens"])


def main(argv: list[str] | None = None) -> None:
    """Print the report."""
    p = argparse.ArgumentParser(prog="python -m pilotfish.demo.evaluate", description=(__doc__ or "").split("\n")[0])
    p.add_argument("--target", type=Path, default=TARGET_DIR)
    p.add_argument("--draft", type=Path, default=DRAFT_DIR)
    p.add_argument("--json", action="store_true")
    p.add_argument("--threads", type=int, default=1)
    args = p.parse_args(argv)
    torch.set_num_threads(args.threads)
    found = report(store.load(args.target), store.load(args.draft), tok.load(args.target))
    print(json.dumps(asdict(found), indent=2) if args.json else table(found))


if __name__ == "__main__":
    main()
