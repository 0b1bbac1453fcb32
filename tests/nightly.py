"""How long the state machines play: a little in the suite, much in `make chaos` (CHAOS=nightly)."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, Phase, settings

NIGHTLY = os.environ.get("CHAOS") == "nightly"
STEPS_AT_LEAST = 10_000


def played(*, suite: int, nightly: int, steps: int = 40) -> settings:
    """Settings of a machine: how many games, and how long each may be."""
    return settings(
        max_examples=nightly if NIGHTLY else suite,
        stateful_step_count=steps,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
    )


def control() -> settings:
    """Settings of a negative control: games until it notices, and no time spent on making the failure small."""
    return settings(
        played(suite=2_000, nightly=2_000),
        phases=[Phase.generate],
        database=None,
        print_blob=False,
        report_multiple_bugs=False,
    )
