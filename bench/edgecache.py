"""`bench edgecache`: conversations kept by our edge cache and by llama-cpp-python's RAM cache, on the demo draft.

Each subject has a process of its own (`edgecache_side.py`); one without a cache shows what prefilling costs. Memory is
the growth of the process, not what a cache believes of itself.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pilotfish.bench.children import child
from pilotfish.bench.conditions import conditions, load_average
from pilotfish.bench.report import Report, Target, target

SUBJECTS = {"edge cache": "ours", "LlamaRAMCache": "rival", "no cache": "none"}
ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE"}  # alike for all; ours would set it by itself
ENOUGH = 16  # conversations of each length


def run(*, quick: bool = False, model: Path | None = None) -> Report:
    """The whole benchmark, on the demo's draft unless another model is given."""
    from pilotfish.demo.pair import draft_gguf

    count, model = 4 if quick else 16, model or draft_gguf()
    stated = conditions(
        ("llama-cpp-python",), models={"draft": model.stem}, conversations_of_each_length=count, kv="f16", threads=1
    )
    figures = {name: measured(which, model, count) for name, which in SUBJECTS.items()}
    stated["load_average_after"] = load_average()
    return Report("edgecache", stated, figures, targets(figures, enough=count >= ENOUGH))


def measured(which: str, model: Path, count: int) -> dict[str, Any]:
    """One subject's figures, and what it takes for a token over all first turns."""
    with child("edgecache_side", which, str(model), str(count), environment=ENVIRONMENT) as side:
        found: dict[str, Any] = json.loads(side.said)
    first = found["first_turns"].values()
    tokens, grown, counted = (sum(one[what] for one in first) for what in ("tokens", "grown_bytes", "counted_bytes"))
    return {"bytes_per_token": grown / tokens, "counted_per_token": counted / tokens, **found}


def targets(figures: dict[str, dict[str, Any]], *, enough: bool) -> list[Target]:
    """How much larger the rival's entries are, and how fast ours are back."""
    ours, rival = figures["edge cache"], figures["LlamaRAMCache"]
    ratio = rival["bytes_per_token"] / ours["bytes_per_token"]
    return [
        target("bytes_ratio", ratio, "x", ">= 8", enough=enough),
        target("restore_ms_per_1k", ours["restore_ms_per_1k"], "ms", "<= 2", enough=enough),
    ]
