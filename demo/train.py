"""Trains the target on tasks and library text, or the draft on the target's own text, for a given time.

    python -m pilotfish.demo.train target --minutes 55
    python -m pilotfish.demo.train draft --minutes 18

Both restart from their last checkpoint with --resume: the schedule counts minutes trained, not the clock.
Knows nothing of GGUF or of engines. The recipe (Muon for matrices, AdamW for the rest, rate held until half time,
then falling to 0) follows what worked in a first try on two cores.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from pilotfish.demo import distill, store
from pilotfish.demo import tokenizer as tok
from pilotfish.demo.batches import Batch, Source
from pilotfish.demo.model import Block, LanguageModel
from pilotfish.demo.pair import MODELS_DIR, TARGET_DIR, cache_dir
from pilotfish.demo.shape import DRAFT, TARGET

SHAPES = {"target": TARGET, "draft": DRAFT}
TASK_TOKENS, CODE_TOKENS, CODE_SHARE = 2200, 600, 0.25
WARM_UP_STEPS = 30

Loss = Callable[[LanguageModel], Tensor]


def rate(elapsed: float, step: int) -> float:
    """Factor of the learning rate after this fraction of the time."""
    return min(1.0, (step + 1) / WARM_UP_STEPS) * min(1.0, max(0.0, 2 * (1 - elapsed)))


def cross_entropy(model: LanguageModel, batch: Batch) -> Tensor:
    """Mean nats per counted token."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(batch.ids, batch.layout, batch.keep)
    return F.cross_entropy(logits.float(), batch.wanted)


def target_losses(source: Source, task_tokens: int, code_tokens: int) -> list[tuple[str, float, Loss]]:
    """(name, weight, loss) of one step's two batches."""
    task, code = source.task_batch(task_tokens), source.code_batch(code_tokens)
    return [
        ("tasks", 1 - CODE_SHARE, lambda model: cross_entropy(model, task)),
        ("code", CODE_SHARE, lambda model: cross_entropy(model, code)),
    ]


@dataclass
class Trainer:
    """A model, its optimizers and how long it has been trained, in seconds and steps."""

    model: LanguageModel
    seconds_in_all: float
    seconds: float = 0.0
    step: int = 0
    means: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        named = list(self.model.named_parameters())
        matrices = [p for name, p in named if p.ndim == 2 and "embed" not in name]
        rest = [p for name, p in named if p.ndim != 2 or "embed" in name]
        self.optimizers = [
            torch.optim.Muon(matrices, lr=0.01, momentum=0.95, adjust_lr_fn="original"),
            torch.optim.AdamW(rest, lr=2e-3, betas=(0.9, 0.95), weight_decay=0.0),
        ]
        self.base_rates = (0.01, 2e-3)

    def take_step(self, losses: list[tuple[str, float, Loss]]) -> None:
        """One update from the weighted sum of the losses."""
        factor = rate(self.seconds / self.seconds_in_all, self.step)
        for name, weight, loss in losses:
            value = loss(self.model)
            torch.autograd.backward(weight * value)
            self.means[name] = 0.98 * self.means.get(name, value.item()) + 0.02 * value.item()
        for optimizer, base in zip(self.optimizers, self.base_rates, strict=True):
            optimizer.param_groups[0]["lr"] = base * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1

    def save(self, path: Path) -> None:
        """Write a checkpoint, whole or not at all."""
        state = {"model": self.model.state_dict(), "optimizers": [o.state_dict() for o in self.optimizers]}
        part = path.with_suffix(".part")
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state | {"seconds": self.seconds, "step": self.step, "means": self.means}, part)
        part.replace(path)

    def restore(self, path: Path) -> None:
        """Go on from a checkpoint."""
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.seconds, self.step, self.means = state["seconds"], state["step"], state["means"]

    def run(self, next_losses: Callable[[], list[tuple[str, float, Loss]]], checkpoint: Path, every: float) -> None:
        """Train until the time is used up, with a line and a checkpoint every so many seconds."""
        saved = self.seconds
        while self.seconds < self.seconds_in_all:
            started = time.monotonic()
            self.take_step(next_losses())
            self.seconds += time.monotonic() - started
            if self.seconds - saved > every or self.seconds >= self.seconds_in_all:
                saved = self.seconds
                self.save(checkpoint)
                print(json.dumps({"minutes": self.seconds / 60, "step": self.step} | self.means), flush=True)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m pilotfish.demo.train", description="Train one of the demo pair.")
    p.add_argument("model", choices=["target", "draft"])
    p.add_argument("--minutes", type=float, required=True, help="training time in all, earlier runs included")
    p.add_argument("--resume", action="store_true", help="go on from the checkpoint")
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--compile", action="store_true", help="compile the layers: a minute's wait, then 1.4 x as fast")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--work", type=Path, default=cache_dir() / "train", help="folder for checkpoints")
    p.add_argument("--out", type=Path, default=MODELS_DIR, help="folder that receives MODEL/model.safetensors")
    p.add_argument("--teacher", type=Path, default=TARGET_DIR, help="target folder, for the draft")
    p.add_argument("--tokenizer", type=Path, default=TARGET_DIR, help="folder of the shared tokenizer")
    p.add_argument("--own-tasks", type=int, default=8000, help="answers of the target that the draft learns from")
    p.add_argument("--own-code", type=int, default=1200, help="pieces of code of the target that it learns from")
    p.add_argument("--every", type=float, default=60, help="seconds between checkpoints")
    p.add_argument("--weights", type=Path, help="JSON of family weights instead of those in tasks.py")
    return p


def next_losses(args: argparse.Namespace, seed: int) -> Callable[[], list[tuple[str, float, Loss]]]:
    """What supplies the losses of each step of this model."""
    weights = json.loads(args.weights.read_text()) if args.weights else None
    source = Source(tok.load(args.tokenizer), seed, weights)
    if args.model == "target":
        return lambda: target_losses(source, TASK_TOKENS, CODE_TOKENS)
    teacher = store.load(args.teacher)
    make = lambda: distill.own_text(teacher, source, args.own_tasks, args.own_code)  # noqa: E731
    lessons = distill.cached_own_text(args.work / "own_text.json", make)
    return lambda: distill.losses(teacher, lessons, source, 1400, 1900)


def main(argv: list[str] | None = None) -> None:
    """Train, then write the model folder."""
    args = parser().parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    trainer = Trainer(LanguageModel(SHAPES[args.model]), args.minutes * 60)
    checkpoint = args.work / f"{args.model}.pt"
    if args.resume:
        trainer.restore(checkpoint)
    supply = next_losses(args, args.seed + trainer.step)
    if args.compile:  # only now: writing the draft's lessons is no work for the compiler
        Block.forward = torch.compile(Block.forward, dynamic=True)  # type: ignore[method-assign]
    trainer.run(supply, checkpoint, args.every)
    store.save(trainer.model, args.out / args.model)
    store.copy_tokenizer(args.tokenizer, args.out / args.model)


if __name__ == "__main__":
    main()
