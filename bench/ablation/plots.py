"""The plots: one figure per table.

With `canvas.py` the only module that loads matplotlib (`pip install 'pilotfish[report]'`), and only when it draws.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Final

from pilotfish.bench.ablation.canvas import (
    PANELS_MAX,
    SHADES,
    Look,
    by_rtt,
    legend,
    line_with_band,
    log_limits,
    log_ticks,
    panels,
    rtts,
    style,
    whiskers,
)
from pilotfish.bench.ablation.data import Row, Table
from pilotfish.bench.ablation.presets import BASELINE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Tables = dict[str, Table]


def figures(tables: Tables, variants: Sequence[str]) -> Iterator[tuple[str, Figure]]:
    """(name, figure) of every table that has a plot. Raises UsageError without matplotlib."""
    with style():
        for name, draw in DRAWN.items():
            if name in tables:
                yield name, draw(tables, Look(variants))


def as_bytes(figure: Figure, kind: str, dpi: int = 110) -> bytes:
    """The figure as "svg" or "png"; the same figure always gives the same bytes."""
    out = io.BytesIO()
    with style():
        metadata = {"Date": None} if kind == "svg" else {"Software": None}
        figure.savefig(out, format=kind, dpi=dpi, metadata=metadata, bbox_inches="tight", pad_inches=0.12)
    return out.getvalue()


# --- figures -------------------------------------------------------------------------------------------------


def latency(tables: Tables, look: Look) -> Figure:
    """Distributions of the time to the first token and per further token."""
    rows = tables["latency"].rows
    shown = rtts(rows)
    figure, axes = panels(len(shown), 2, 2.6, sharey=True, sharex="col")
    words = {"first_token_ms": "time to first token [ms]", "ms_per_token": "time per further token [ms]"}
    for line, rtt in enumerate(shown):
        for axis, (name, title) in zip(axes[2 * line : 2 * line + 2], words.items(), strict=True):
            for variant in look.order:
                values = [r[name] for r in rows if (r["variant"], r["rtt_ms"]) == (variant, rtt) and r[name]]
                if values:
                    axis.ecdf(values, **{k: v for k, v in look.of(variant).items() if k != "marker"})
            axis.set(xscale="log", title=f"RTT {rtt:g} ms", ylim=(0, 1.02))
            log_ticks(axis.xaxis)
            if line == len(shown) - 1:
                axis.set_xlabel(title)
        axes[2 * line].set_ylabel("share of requests")
    legend(figure, *axes)
    return figure


def throughput(tables: Tables, look: Look) -> Figure:
    """Tokens per second of each variant."""
    figure, parted = by_rtt(tables["throughput"], 0.5 + 0.4 * len(look.order))
    places = {variant: -place for place, variant in enumerate(look.order)}
    for axis, _, rows in parted:
        for row in rows:
            line = look.of(row["variant"]) | {"linestyle": "none"}
            axis.errorbar(row["tokens_per_second"], places[row["variant"]], capsize=3,
                          xerr=whiskers(row, "tokens_per_second"), **line)  # fmt: skip
            if row["variant"] == BASELINE:
                axis.axvline(row["tokens_per_second"], color="#000000", linewidth=0.8, linestyle=":", zorder=1)
        axis.set(xlabel="tokens per second", xscale="log", yticks=list(places.values()), yticklabels=list(places))
        axis.set_xlim(log_limits(tables["throughput"].rows, "tokens_per_second"))
        log_ticks(axis.xaxis)
        axis.margins(y=0.12)
    return figure


def pareto(tables: Tables, look: Look) -> Figure:
    """Accuracy against what it costs the cloud; the frontier is joined."""
    figure, parted = by_rtt(tables["pareto"], 3.4, sharex=True)
    for axis, _, rows in parted:
        edge = sorted((row for row in rows if row["on_frontier"]), key=lambda row: row["cloud_rows_per_token"])
        axis.plot(
            [row["cloud_rows_per_token"] for row in edge], [100 * row["accuracy"] for row in edge], color="#b0b0b0",
            linewidth=5, alpha=0.5, solid_capstyle="round", label="frontier", zorder=1,
        )  # fmt: skip
        for row in rows:
            sides = whiskers(row, "accuracy")
            axis.errorbar(
                row["cloud_rows_per_token"], 100 * row["accuracy"], xerr=whiskers(row, "cloud_rows_per_token"),
                yerr=sides and [[100 * side[0]] for side in sides], capsize=2, elinewidth=0.9,
                **look.of(row["variant"]) | {"linestyle": "none"},
            )  # fmt: skip
        axis.set(xlabel="cloud rows per token")
    parted[0][0].set_ylabel("accuracy [% of answers]")
    legend(figure, *(axis for axis, *_ in parted))
    return figure


def confidence(tables: Tables, look: Look) -> Figure:
    """How sure the draft was, and how often it was right when it was that sure, before and after calibration."""
    rows = tables["confidence"].rows
    variants = [variant for variant in look.order if any(row["variant"] == variant for row in rows)][:PANELS_MAX]
    figure, axes = panels((len(variants) + 3) // 2, 2, 2.9)
    for axis, kind in zip(axes, ("raw", "calibrated"), strict=False):
        _reliability(axis, kind, [row for row in rows if row["kind"] == kind], look, variants)
    for axis, variant in zip(axes[2:], variants, strict=False):
        _histogram(axis, variant, [row for row in rows if row["variant"] == variant])
    for unused in axes[2 + len(variants) :]:
        unused.remove()
    legend(figure, *axes[: 2 + len(variants)])
    return figure


def _reliability(axis: Axes, kind: str, rows: Sequence[Row], look: Look, variants: Sequence[str]) -> None:
    axis.plot([0, 1], [0, 1], color="#808080", linestyle=":", linewidth=1.2, label="perfect")
    for variant in variants:
        own = [row for row in rows if row["variant"] == variant]
        axis.plot([row["mean"] for row in own], [row["accepted_share"] for row in own], **look.of(variant))
    words = {"raw": "mean confidence of the bin", "calibrated": "mean calibrated confidence of the bin"}
    axis.set(xlabel=words[kind], ylabel="share accepted", title=f"reliability, {kind}", xlim=(-0.05, 1.05),
             ylim=(-0.05, 1.05))  # fmt: skip


def _histogram(axis: Axes, variant: str, rows: Sequence[Row]) -> None:
    """Raw confidence, side by side and on a log scale: rejections are few, and they are what matters."""
    raw, errors = [row for row in rows if row["kind"] == "raw"], {row["kind"]: row["ece"] for row in rows}
    width = (raw[0]["to"] - raw[0]["from"]) / 2
    bars = {"accepted": ("#0072B2", 0.0, ""), "rejected": ("#E69F00", width, "////")}
    for name, (colour, shift, hatch) in bars.items():
        axis.bar([row["from"] + shift for row in raw], [row[name] for row in raw], width, align="edge", color=colour,
                 edgecolor="white", hatch=hatch, label=name)  # fmt: skip
    told = ", ".join(f"{kind} {error:.3f}" for kind, error in errors.items())
    axis.set(xlabel="confidence", ylabel="judged drafts", title=f"{variant} (ECE: {told})", xlim=(0, 1), yscale="log")
    axis.set_ylim(bottom=0.7)


def positions(tables: Tables, look: Look) -> Figure:
    """Acceptance by place in the draft."""
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    figure, (axis,) = panels(1, 1, 3.4)
    for variant in look.order:
        if rows := [row for row in tables["positions"].rows if row["variant"] == variant]:
            line_with_band(axis, look.of(variant), [row["position"] for row in rows], rows, "acceptance", "low", "high")
    axis.set(xlabel="position in the draft [token]", ylabel="accepted [% of judged drafts]")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=""))
    legend(figure, axis)
    return figure


def corrections(tables: Tables, look: Look) -> Figure:
    """Where in the answer the target overrules the draft."""
    from matplotlib.ticker import PercentFormatter

    figure, (axis,) = panels(1, 1, 3.4)
    for variant in look.order:
        if rows := [row for row in tables["corrections"].rows if row["variant"] == variant]:
            middle = [(row["from_token"] + row["to_token"]) / 2 for row in rows]
            line_with_band(axis, look.of(variant), middle, rows, "share", "low", "high")
    axis.set(xlabel="position in the answer [token]", ylabel="corrected [% of tokens there]")
    axis.set_ylim(bottom=0)
    axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=""))
    legend(figure, axis)
    return figure


def rtt(tables: Tables, look: Look) -> Figure:
    """Speed against RTT, and where the baseline stops being faster."""
    figure, (axis,) = panels(1, 1, 3.6)
    speed = ("tokens_per_second", "tokens_per_second_low", "tokens_per_second_high")
    for variant in look.order:
        rows = [row for row in tables["rtt"].rows if row["variant"] == variant]
        if rows:
            line_with_band(axis, look.of(variant), [r["rtt_ms"] for r in rows], rows, *speed)
    crossings = tables["break_even"].rows if "break_even" in tables else []
    for row in (row for row in crossings if row["rtt_ms"] is not None):
        colour = look.of(row["reference"])["color"]
        axis.axvline(row["rtt_ms"], color=colour, linestyle=":", linewidth=1.4,
                     label=f"as fast as {row['reference']}: {row['rtt_ms']:.1f} ms")  # fmt: skip
    axis.set(xlabel="round-trip time edge to Redis [ms]", ylabel="tokens per second", yscale="log",
             ylim=log_limits(tables["rtt"].rows, speed[0]))  # fmt: skip
    log_ticks(axis.yaxis)
    legend(figure, axis)
    return figure


def _stacked(table: Table, look: Look, parts: dict[str, str], title: str) -> Figure:
    """Horizontal bars of parts, a panel per RTT."""
    from matplotlib.ticker import MaxNLocator

    figure, parted = by_rtt(table, 0.8 + 0.4 * len(look.order), sharex=True)
    places = {variant: -place for place, variant in enumerate(look.order)}
    for axis, _, rows in parted:
        left = [0.0] * len(rows)
        for (name, words), shade in zip(parts.items(), SHADES, strict=False):
            widths = [row[name] for row in rows]
            axis.barh([places[row["variant"]] for row in rows], widths, 0.6, left, color=shade, edgecolor="white",
                      label=words)  # fmt: skip
            left = [a + b for a, b in zip(left, widths, strict=True)]
        axis.set(xlabel=title, yticks=list(places.values()), yticklabels=list(places))
        axis.grid(visible=False, axis="y")
        axis.xaxis.set_major_locator(MaxNLocator(4))
        axis.xaxis.set_major_formatter("{x:g}")
    legend(figure, *(axis for axis, *_ in parted))
    return figure


def wire(tables: Tables, look: Look) -> Figure:
    """Bytes on the wire, by direction."""
    parts = {"up_bytes_per_token": "from the edge", "down_bytes_per_token": "to the edge"}
    return _stacked(tables["wire"], look, parts, "bytes per token")


def cost(tables: Tables, look: Look) -> Figure:
    """Cost of a thousand tokens, by who is paid."""
    parts = {"cloud_per_1k_tokens": "cloud engine", "edge_per_1k_tokens": "drafting", "wire_per_1k_tokens": "wire"}
    return _stacked(tables["cost"], look, parts, "cost per 1,000 tokens")


DRAWN: Final[dict[str, Callable[[Tables, Look], Figure]]] = {
    "latency": latency,
    "throughput": throughput,
    "rtt": rtt,
    "pareto": pareto,
    "confidence": confidence,
    "positions": positions,
    "corrections": corrections,
    "wire": wire,
    "cost": cost,
}
