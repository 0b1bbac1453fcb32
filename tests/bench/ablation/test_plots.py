"""The plots: drawn from any run, axes with units, the baseline in each, nothing outside the picture."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import TYPE_CHECKING, Any

import pytest

from ablations import ROUND, manifest, record
from pilotfish.bench.ablation.canvas import COLOURS, FIXED, Look
from pilotfish.bench.ablation.data import Data
from pilotfish.bench.ablation.measures import Prices
from pilotfish.bench.ablation.plots import DRAWN, as_bytes, figures
from pilotfish.bench.ablation.presets import PRESETS
from pilotfish.bench.ablation.tables import all_tables

if TYPE_CHECKING:
    from matplotlib.figure import Figure

VARIANTS = (*PRESETS, "no_kv_cache+window=1", "baseline+draft_tokens=8")
RTTS = (0.0, 20.0, 50.0)


@pytest.fixture(scope="module")
def drawn() -> dict[str, Figure]:
    random, records = Random(1), list[dict[str, Any]]()
    for variant in VARIANTS:
        for rtt in RTTS:
            for prompt in range(6):
                ms = random.uniform(20, 60) + rtt * (1 if variant == "cloud_only" else 2)
                rounds = [] if variant in ("edge_only", "cloud_only") else [dict(ROUND)]
                records.append(
                    record(variant, prompt, rtt_ms=rtt, token_ms=[10.0 + rtt] * 3 + [ms + rtt], rounds=rounds)
                )
    made = Data(manifest(*VARIANTS, rtt_ms=RTTS, asked=6), records, Prices(1.0, 0.1, 0.1))
    return dict(figures(all_tables(made), made.variants))


def axes(drawn: dict[str, Figure]) -> Iterator[tuple[str, Any]]:
    for name, figure in drawn.items():
        for axis in figure.axes:
            yield name, axis


def test_every_plot_is_drawn(drawn: dict[str, Figure]) -> None:
    assert list(drawn) == list(DRAWN)


def test_axes_say_what_they_measure(drawn: dict[str, Figure]) -> None:
    lowest = [(name, axis) for name, axis in axes(drawn) if axis.get_subplotspec().is_last_row() or name != "latency"]
    assert all(axis.get_xlabel() for _, axis in lowest)
    words = ("[ms]", "token", "confidence", "share")
    assert all(any(word in axis.get_xlabel() for word in words) for _, axis in lowest)


def test_the_baseline_is_in_every_plot(drawn: dict[str, Figure]) -> None:
    for figure in drawn.values():
        texts = {text.get_text() for legend in figure.legends for text in legend.get_texts()}
        for axis in figure.axes:
            texts |= {*(label.get_text() for label in axis.get_yticklabels())}
        assert "baseline" in texts


def test_nothing_is_clipped(drawn: dict[str, Figure]) -> None:
    for name, figure in drawn.items():
        figure.draw_without_rendering()
        box = figure.bbox
        for axis in figure.axes:
            inside = axis.get_tightbbox()
            assert inside
            assert box.x0 - 1 <= inside.x0 <= inside.x1 <= box.x1 + 1, name
            assert box.y0 - 1 <= inside.y0 <= inside.y1 <= box.y1 + 1, name
        for legend in figure.legends:
            inside = legend.get_window_extent()
            assert box.x0 - 1 <= inside.x0 <= inside.x1 <= box.x1 + 1, name


def test_variants_look_different_and_presets_always_the_same() -> None:
    looks = [(look["color"], look["linestyle"]) for look in map(Look(VARIANTS).of, VARIANTS)]
    assert len(set(looks)) == len(VARIANTS)
    assert Look(["cloud_only"]).of("cloud_only") == Look(VARIANTS).of("cloud_only")
    assert len(set(COLOURS)) == 7 > len(FIXED)


def test_a_picture_is_the_same_bytes_each_time(drawn: dict[str, Figure]) -> None:
    assert as_bytes(drawn["positions"], "svg") == as_bytes(drawn["positions"], "svg")
    assert as_bytes(drawn["positions"], "png").startswith(b"\x89PNG")
