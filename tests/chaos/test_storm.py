"""Everything breaks for a while, by a plan that replays; texts stay right, nothing is lost, nothing hangs.

The seed is new in each run, and printed when it breaks something; `CHAOS_SEED=N` repeats it. `make chaos` runs 20,000
rounds of the same (`pilotfish bench chaos`).
"""

from __future__ import annotations

import json
import os
import time

import pytest

from pilotfish.bench.chaos import Outcome, report, storm, told
from pilotfish.bench.chaos_fleet import MEDDLED
from pilotfish.bench.chaos_plan import FAULTS

pytestmark = pytest.mark.slow

SECONDS = {False: 110.0, True: 70.0}
ROUNDS_AT_LEAST = 400


@pytest.fixture
def seed() -> int:
    return int(os.environ.get("CHAOS_SEED") or time.time_ns() % 1_000_000)


@pytest.mark.timeout(400)
@pytest.mark.parametrize("flips", [False, True], ids=["agreeing", "near_ties"])
async def test_texts_survive_a_storm(seed: int, flips: bool) -> None:
    outcome = await storm(seed, 1_000_000, flips=flips, seconds=SECONDS[flips])
    assert not outcome.broken, f"CHAOS_SEED={seed}: {json.dumps(told(outcome), indent=1)}"
    assert outcome.rounds > ROUNDS_AT_LEAST
    assert outcome.faults.keys() >= MEDDLED, "the proxies meddle all the time"
    assert len(outcome.faults.keys() & FAULTS.keys()) >= len(FAULTS) / 2


def test_a_broken_run_says_how_to_repeat_it() -> None:
    good, bad = Outcome(7, flips=False, rounds=40), Outcome(7, flips=True, rounds=60, different=["generation 3: x"])
    found = report([good, bad])
    assert {one.name: (one.value, one.met) for one in found.targets} == {
        "rounds": (100, None), "different": (1, False), "lost": (0, None), "hung": (0, None),
    }  # fmt: skip
    assert found.figures["near_ties"]["replay"] == "python -m pilotfish.bench.chaos --seed 7 --rounds 60 --flips"
    assert "replay" not in found.figures["agreeing"]
