"""What every plot is drawn with: colours, markers, panels, whiskers, one legend below.

Colours are those of Okabe & Ito (2008), told apart by colour-blind people; markers differ too. A variant has one
colour and one marker in every plot, the baseline is black. A figure stands on a light card of its own, so it reads the
same on a dark page.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from pilotfish.bench.ablation.data import Row, Table
from pilotfish.bench.ablation.presets import BASELINE
from pilotfish.protocol.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

COLOURS: Final = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#0072B2", "#CC79A7")
MARKERS: Final = "osD^vPX"
FIXED: Final = (BASELINE, "no_confidence", "no_draft_verify", "no_kv_cache", "edge_only", "cloud_only")
SHADES: Final = ("#4d4d4d", "#a6a6a6", "#d9d9d9")  # parts of a stacked bar, dark to light
PANELS_MAX: Final = 4  # RTTs shown side by side; with more, the lowest, the highest and two between
WIDTH: Final = 9.5  # inches
STYLE: Final[dict[str, Any]] = {
    "figure.facecolor": "#ffffff", "axes.facecolor": "#ffffff", "font.size": 10, "axes.titlesize": 10,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#e5e5e5",
    "axes.axisbelow": True, "legend.frameon": False, "svg.hashsalt": "pilotfish", "lines.linewidth": 1.6,
    "lines.markersize": 6,
}  # fmt: skip


@contextmanager
def style() -> Iterator[None]:
    """Everything is drawn and saved inside it. Raises UsageError without matplotlib."""
    try:
        from matplotlib import rc_context
    except ImportError:
        raise UsageError("plots need matplotlib: pip install 'pilotfish[report]'") from None
    with rc_context(STYLE):  # type: ignore[arg-type]  # its keys are literals since 3.11
        yield


class Look:
    """Colour and marker of each variant: those of the presets are always the same."""

    def __init__(self, variants: Sequence[str]) -> None:
        others = [name for name in variants if name not in FIXED]
        self.order = [*variants]
        self._places = {name: place for place, name in enumerate((*FIXED, *others))}

    def of(self, variant: str) -> dict[str, Any]:
        """Arguments for a line; beyond seven variants, colours come again with another dash.

        The baseline is the widest line and lies below, so that one that equals it is seen on top.
        """
        place = self._places[variant]
        return {
            "color": COLOURS[place % len(COLOURS)], "marker": MARKERS[place % len(MARKERS)],
            "linestyle": ("-", "--", ":")[place // len(COLOURS) % 3], "label": variant,
            **({"zorder": 2, "linewidth": 3.5, "markersize": 9} if variant == BASELINE else {"zorder": 3}),
        }  # fmt: skip


def panels(rows: int, columns: int, height: float = 3.0, **more: Any) -> tuple[Figure, list[Axes]]:
    """A grid of axes, row by row; `height` of one in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height * rows), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False, **more).flat)


def rtts(rows: Sequence[Row]) -> list[float]:
    """RTTs that get a panel."""
    found = sorted({row["rtt_ms"] for row in rows})
    if len(found) <= PANELS_MAX:
        return found
    return [found[round(i * (len(found) - 1) / (PANELS_MAX - 1))] for i in range(PANELS_MAX)]


def by_rtt(table: Table, height: float, **more: Any) -> tuple[Figure, list[tuple[Axes, float, list[Row]]]]:
    """A panel for each RTT, with its rows."""
    shown_rtts = rtts(table.rows)
    figure, axes = panels(1, len(shown_rtts), height, sharey=True, **more)
    shown = []
    for axis, rtt in zip(axes, shown_rtts, strict=True):
        axis.set_title(f"RTT {rtt:g} ms")
        shown.append((axis, rtt, [row for row in table.rows if row["rtt_ms"] == rtt]))
    return figure, shown


def legend(figure: Figure, *axes: Axes) -> None:
    """One for all panels, below them."""
    found = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(list(found.values()), list(found), loc="outside lower center", ncols=min(4, len(found)))


def whiskers(row: Row, name: str) -> list[list[float]] | None:
    """Distances of an interval from its estimate; a percentile interval need not hold it."""
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return None if low is None else [[max(0.0, row[name] - low)], [max(0.0, high - row[name])]]


def log_limits(rows: Sequence[Row], name: str) -> tuple[float, float]:
    """Limits of a log scale that hold every interval, and are apart if there is one value only."""
    values = [row[f"{name}{part}"] for row in rows for part in ("", "_low", "_high")]
    known = [value for value in values if value]
    return min(known) / 1.2, max(known) * 1.2


def log_ticks(axis: Axis) -> None:
    """Plain numbers on a log scale, as many as there is room for."""
    from matplotlib.ticker import LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    subs = (1, 3) if high > 30 * low else (1, 2, 5) if high > 10 * low else (1, 1.5, 2, 3, 5, 7)
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def line_with_band(axis: Axes, line: dict[str, Any], x: Sequence[float], rows: Sequence[Row], *names: str) -> None:
    """A line and the band of its intervals; `names` are those of value, low and high."""
    name, low, high = names
    axis.plot(x, [row[name] for row in rows], **line)
    known = [(at, row[low], row[high]) for at, row in zip(x, rows, strict=True) if row[low] is not None]
    if known:
        places, lows, highs = zip(*known, strict=True)
        axis.fill_between(places, lows, highs, color=line["color"], alpha=0.12, linewidth=0)
