"""Error or quality against cost, with reference slopes."""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from diffusion_opt.lesson.plots.style import MARKERS, PALETTE, WIDTH, new_figure, plain_ticks


def curves(
    lines: Mapping[str, Mapping[float, float]],
    *,
    x_label: str,
    y_label: str,
    title: str = "",
    slopes: Sequence[int] = (),
    logarithmic: bool = True,
) -> Figure:
    """Named lines of x -> y. `slopes` draws the decay x^-p of each order p as a thin reference through the first line.

    Raises ValueError for no lines, and for values that are not positive on logarithmic axes.
    """
    if not lines or not all(lines.values()):
        raise ValueError("nothing to draw: pass at least one line with at least one point")
    if logarithmic and min(min(*line.keys(), *line.values()) for line in lines.values()) <= 0:
        raise ValueError("logarithmic axes need positive values; pass logarithmic=False")
    with new_figure(1, 1, (WIDTH * 0.75, 4.2)) as (figure, axes):
        axis = axes[0, 0]
        for i, (name, line) in enumerate(lines.items()):
            style = {"color": PALETTE[i % len(PALETTE)], "marker": MARKERS[i % len(MARKERS)]}
            axis.plot(list(line.keys()), list(line.values()), label=name, **style)
        if logarithmic:
            axis.set(xscale="log", yscale="log")
            ticks = sorted({x for line in lines.values() for x in line})
            if all(b >= 1.2 * a for a, b in pairwise(ticks)):  # labels would overlap
                axis.set_xticks(ticks, [f"{x:g}" if x >= 1 else f"{x:.2g}" for x in ticks])
                axis.set_xticks([], minor=True)
            else:
                plain_ticks(axis.xaxis)
            plain_ticks(axis.yaxis)
        elif all(x == int(x) for line in lines.values() for x in line):
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))  # no frame 2.5
        _reference_slopes(axis, next(iter(lines.values())), slopes)
        axis.set(xlabel=x_label, ylabel=y_label, title=title)
        axis.legend()
    return figure


def _reference_slopes(axis: Axes, line: Mapping[float, float], slopes: Sequence[int]) -> None:
    """Thin lines y = y_0 (x / x_0)^-p from the first point of `line`, named at their end."""
    x = np.array(sorted(line))
    start = line[x[0]]
    for order in slopes:
        y = start * (x / x[0]) ** -float(order)
        axis.plot(x, y, color="#888888", linewidth=0.9, linestyle=":")
        axis.annotate(
            f"order {order}", (x[-1], y[-1]), xytext=(-4, 6), textcoords="offset points", fontsize=9, ha="right"
        )
