"""Where the time goes: shares, bars and the roofline."""

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure

from diffusion_opt.lesson.plots.style import LIGHT, MARKERS, PALETTE, WIDTH, new_figure, plain_ticks


def stacked_shares(rows: Mapping[str, Mapping[str, float]], title: str = "") -> Figure:
    """One bar of 100 % for each row, split by the shares of its named parts (any unit; parts in the first row's order).

    Raises ValueError if the rows name different parts or a row adds up to nothing.
    """
    parts = list(next(iter(rows.values()), {}))
    for name, row in rows.items():
        if set(row) != set(parts) or sum(row.values()) <= 0:
            raise ValueError(f"each row needs the parts {parts} with a positive sum, got {name!r}: {dict(row)}")
    with new_figure(1, 1, (WIDTH, 1.1 + 0.55 * len(rows))) as (figure, axes):
        axis = axes[0, 0]
        left = np.zeros(len(rows))
        for i, part in enumerate(parts):
            share = np.array([100 * row[part] / sum(row.values()) for row in rows.values()])
            bar = axis.barh(list(rows), share, left=left, color=PALETTE[i % len(PALETTE)], label=part)
            ink = "black" if PALETTE[i % len(PALETTE)] in LIGHT else "white"
            axis.bar_label(bar, [f"{s:.0f}" if s >= 5 else "" for s in share], label_type="center", color=ink)
            left += share
        axis.set(xlim=(0, 100), xlabel="share in %", title=title)
        axis.grid(False)
        axis.invert_yaxis()
        axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def bars(values: Mapping[str, float], unit: str, title: str = "") -> Figure:
    """A horizontal bar for each named value, with the value at its end. Raises ValueError for no values."""
    if not values:
        raise ValueError("nothing to draw: pass at least one named value")
    with new_figure(1, 1, (WIDTH * 0.75, 0.9 + 0.4 * len(values))) as (figure, axes):
        axis = axes[0, 0]
        drawn = axis.barh(list(values), list(values.values()), color=PALETTE[0])
        axis.bar_label(drawn, fmt="%.3g", padding=4)
        axis.set(xlabel=unit, title=title)
        axis.margins(x=0.12)
        axis.invert_yaxis()
    return figure


def roofline(
    points: Mapping[str, tuple[float, float]], peak: float, bandwidth: float, title: str = "", unit: str = "MAC"
) -> Figure:
    """Measured points (work per byte, work per second) under the roof min(peak, bandwidth x work per byte).

    `peak` is in work per second, `bandwidth` in bytes per second. Raises ValueError for no points.
    """
    if not points:
        raise ValueError("nothing to draw: pass at least one point")
    intensity = [x for x, _ in points.values()]
    edge = peak / bandwidth
    span = np.geomspace(min(*intensity, edge) / 2, max(*intensity, edge) * 2, 200)
    with new_figure(1, 1, (WIDTH * 0.75, 4.2)) as (figure, axes):
        axis = axes[0, 0]
        axis.plot(span, np.minimum(peak, bandwidth * span) / 1e9, color="black", label="roof: min(arithmetic, memory)")
        for i, (name, (x, y)) in enumerate(points.items()):
            axis.plot(x, y / 1e9, MARKERS[i % len(MARKERS)], color=PALETTE[i % len(PALETTE)], markersize=8)
            axis.annotate(name, (x, y / 1e9), xytext=(6, -12), textcoords="offset points", fontsize=9)
        axis.set(xscale="log", yscale="log", xlabel=f"{unit}s per byte moved", ylabel=f"billion {unit}s per second")
        axis.set_title(title)
        plain_ticks(axis.xaxis)
        plain_ticks(axis.yaxis)
        axis.legend()
    return figure
