"""Made-up runs for the tests of ablations: records whose figures can be worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pilotfish.bench.ablation import manifest as manifests
from pilotfish.bench.ablation.presets import PRESETS

ROUND = {
    "epoch": 0, "round": 0, "base": 10, "drafted": 4, "continues": 0,
    "confidences": [0.95, 0.9, 0.4, 0.8], "estimates": [1.0, 1.0, 0.2, 0.9],
    "sent_ms": 1.0, "answered_ms": 9.0, "accepted": 2, "refused": None, "sends": 1, "rows": 5, "steps": 1,
    "cached": 10, "engine_ms": 3.0, "queue_ms": 0.1, "job_bytes": 100, "reply_bytes": 50,
}  # fmt: skip
SITTING = {"started": "2026-01-02T03:04:05Z", "code": {}, "packages": {"redis": "5"}, "cpu": "a CPU", "cores": 2,
           "python": "3.11", "load_average": 0.5}  # fmt: skip


def record(variant: str = "baseline", prompt: int = 1, **changes: Any) -> dict[str, Any]:
    """Four tokens in 40 ms, the first after 10; one round, two of three judged drafts accepted; the answer is right."""
    made = {
        "variant": variant, "rtt_ms": 0.0, "seed": 1, "prompt": prompt, "family": "add", "right": True, "failure": None,
        "route": "", "ids": [1, 2, 3, 4], "origins": ["accepted", "accepted", "corrected", "continued"],
        "token_ms": [10.0, 10.0, 10.0, 40.0], "text": "12", "rounds": [dict(ROUND)], "other_bytes": 20,
        "summary": {"cloud_rows": 8, "cloud_steps": 2, "cloud_ms": 6.0, "draft_ms": 2.0, "never_sent": 0},
        "wire_up": 300, "wire_down": 100,
    }  # fmt: skip
    return {**made, **changes}


def failed(variant: str = "baseline", prompt: int = 1, **changes: Any) -> dict[str, Any]:
    """One that ran out of time; all that is known of it is its place."""
    made = record(variant, prompt, right=False, failure={"code": "deadline", "sentence": "no verdict within 5 ms"})
    for name in ("ids", "origins", "token_ms", "text", "rounds", "summary", "wire_up", "wire_down"):
        del made[name]
    return {**made, **changes}


def manifest(*variants: str, rtt_ms: tuple[float, ...] = (0.0,), asked: int = 1, seeds: int = 1) -> dict[str, Any]:
    """Of a finished run."""
    settings = {"mode": "exact", "max_tokens": "72", "temperature": "0.0", "engine": "fake"}
    return {
        "schema": manifests.SCHEMA,
        "experiment": {
            "variants": {name: {"routed": False} for name in variants}, "seeds": seeds, "rtt_ms": list(rtt_ms),
            "lessons": 0, "together": True, "settings": {},
            "prompts": {"name": "some prompts", "sha256": "0" * 64, "asked": asked, "with_answer": asked,
                        "lessons_are_asked_too": False},
        },
        "about": {name: preset.about for name, preset in PRESETS.items()},
        "settings": dict.fromkeys(variants, settings),
        "models": {"baseline": {"target": {"id": "a"}}}, "sittings": [SITTING], "finished": "2026-01-02T03:14:05Z",
    }  # fmt: skip


def run_folder(folder: Path, told: dict[str, Any], records: list[dict[str, Any]]) -> Path:
    """A run on disk."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / manifests.FILE).write_text(json.dumps(told))
    (folder / "rounds.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    return folder
