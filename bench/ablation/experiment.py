"""What is asked for: which modes, at which distances, how often, over which prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pilotfish.bench.ablation import manifest as manifests
from pilotfish.bench.ablation.presets import PRESETS, Variant
from pilotfish.bench.ablation.prompts import Questions
from pilotfish.protocol.errors import UsageError

LESSONS = 40  # prompts a replicate's gate learns from before anything is measured
ANSWER_TOKENS = 72  # no answer of the evaluation set is longer


@dataclass(frozen=True)
class Experiment:
    """What is asked for. `settings` hold for every variant; `prompts` None is the demo pair's evaluation set."""

    out: Path
    modes: str = "all"
    seeds: int = 5
    rtt_ms: Sequence[float] = (0.0, 50.0)
    prompts: Path | None = None
    per_family: int | None = None
    lessons: int = LESSONS
    together: bool = True  # workers of different settings run at once; else one after the other
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "out", Path(self.out))
        if self.seeds < 1 or not self.rtt_ms or min(self.rtt_ms) < 0:
            raise UsageError("an experiment needs one seed at least, and RTTs of 0 ms or more")
        object.__setattr__(self, "rtt_ms", tuple(float(rtt) for rtt in self.rtt_ms))

    @property
    def common(self) -> dict[str, Any]:
        """Settings of every variant."""
        return {"max_tokens": ANSWER_TOKENS, **self.settings} if self.prompts is None else dict(self.settings)


def stated(experiment: Experiment, every: Sequence[Variant], questions: Questions) -> dict[str, Any]:
    """The manifest of a run that begins."""
    return {
        "schema": manifests.SCHEMA,
        "experiment": {
            "variants": {one.name: {**one.settings, "routed": one.routed} for one in every},
            "seeds": experiment.seeds,
            "rtt_ms": list(experiment.rtt_ms),
            "prompts": questions.source,
            "lessons": len(questions.lessons),
            "together": experiment.together,
            "settings": {name: str(value) for name, value in experiment.common.items()},
        },
        "about": {name: preset.about for name, preset in PRESETS.items()},
        "settings": {one.name: one.resolved(experiment.common).shown() for one in every},
        "models": {},
        "sittings": [],
        "finished": None,
    }
