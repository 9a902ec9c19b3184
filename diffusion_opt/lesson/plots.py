"""Figures of the course, in one style.

Each function returns a closed matplotlib figure: a notebook cell that ends with the call shows it once, and nothing
keeps it alive in pyplot. Colors are those of Okabe and Ito, which remain apart for color-blind readers; lines differ
in marker as well, so they do in print. Values stand at the bars and names at the lines where there is room.

    image_grid, image_rows      pictures, alone or one row for each way of making them
    curves                      error or quality against cost, with reference slopes
    stacked_shares, bars        where the time goes
    roofline                    arithmetic per second against arithmetic per byte
    paths                       trajectories in the plane
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise

import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from torch import Tensor

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#666666")
LIGHT = ("#E69F00", "#56B4E9", "#CC79A7")  # black letters on these
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
WIDTH = 9.0  # inches; a notebook column
STYLE = {
    "figure.dpi": 80,
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "lines.linewidth": 2.0,
    "lines.markersize": 6,
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.h_pad": 0.02,
    "figure.constrained_layout.w_pad": 0.02,
}


@contextmanager
def _figure(rows: int, columns: int, size: tuple[float, float], **options) -> Iterator[tuple[Figure, np.ndarray]]:
    """A figure with a rows x columns array of axes in the course's style, closed at the end so that it shows once."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, **options)
        try:
            yield figure, axes
        finally:
            plt.close(figure)


def image_grid(
    images: Float[Tensor, "n c h w"], labels: Sequence[str] | None = None, columns: int = 10, title: str = ""
) -> Figure:
    """Pictures in [-1, 1], `columns` to a row, each with its label above. Raises ValueError for a wrong label count."""
    if labels is not None and len(labels) != len(images):
        raise ValueError(f"one label a picture: got {len(labels)} labels for {len(images)} pictures")
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    heading = 0.25 if labels is not None else 0.05
    size = _grid_size(images, columns, rows, row_extra=heading, side=0.0, top=0.3 if title else 0.0)
    with _figure(rows, columns, size) as (figure, axes):
        for axis in axes.flat:
            axis.axis("off")
        for i, (image, axis) in enumerate(zip(images, axes.flat, strict=False)):
            _show(axis, image)
            if labels is not None:
                axis.set_title(labels[i], fontsize=9, loc="center")
        _headline(figure, title)
    return figure


def image_rows(
    rows: Mapping[str, Float[Tensor, "n c h w"]], columns: Sequence[str] | None = None, title: str = ""
) -> Figure:
    """One named row of pictures in [-1, 1] for each way of making them; `columns` names them from left to right.

    Raises ValueError if there are no rows or the rows differ in length.
    """
    lengths = {name: len(images) for name, images in rows.items()}
    if len(set(lengths.values())) != 1:
        raise ValueError(f"rows must be of one length, at least one of them, got {lengths}")
    first = next(iter(rows.values()))
    side = 0.25 + 0.085 * max(len(line) for name in rows for line in name.split("\n"))
    top = (0.3 if title else 0.0) + (0.25 if columns else 0.0)
    size = _grid_size(first, len(first), len(rows), row_extra=0.05, side=side, top=top)
    with _figure(len(rows), len(first), size) as (figure, axes):
        for (name, images), line in zip(rows.items(), axes, strict=True):
            for image, axis in zip(images, line, strict=True):
                _show(axis, image)
                axis.set(xticks=[], yticks=[])
                axis.spines[:].set_visible(False)
            line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=10)
        for axis, name in zip(axes[0], columns or (), strict=bool(columns)):
            axis.set_title(name, fontsize=9, loc="center")
        _headline(figure, title)
    return figure


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
    with _figure(1, 1, (WIDTH * 0.75, 4.2)) as (figure, axes):
        axis = axes[0, 0]
        for i, (name, line) in enumerate(lines.items()):
            style = {"color": PALETTE[i % len(PALETTE)], "marker": MARKERS[i % len(MARKERS)]}
            axis.plot(list(line.keys()), list(line.values()), label=name, **style)
        if logarithmic:
            axis.set(xscale="log", yscale="log")
            ticks = sorted({x for line in lines.values() for x in line})
            if all(b >= 1.2 * a for a, b in pairwise(ticks)):  # labels would overlap
                axis.set_xticks(ticks, [f"{x:g}" for x in ticks])
                axis.set_xticks([], minor=True)
            _plain_ticks(axis.yaxis)
        _reference_slopes(axis, next(iter(lines.values())), slopes)
        axis.set(xlabel=x_label, ylabel=y_label, title=title)
        axis.legend()
    return figure


def stacked_shares(rows: Mapping[str, Mapping[str, float]], title: str = "") -> Figure:
    """One bar of 100 % for each row, split by the shares of its named parts (any unit; parts in the first row's order).

    Raises ValueError if the rows name different parts or a row adds up to nothing.
    """
    parts = list(next(iter(rows.values()), {}))
    for name, row in rows.items():
        if set(row) != set(parts) or sum(row.values()) <= 0:
            raise ValueError(f"each row needs the parts {parts} with a positive sum, got {name!r}: {dict(row)}")
    with _figure(1, 1, (WIDTH, 1.1 + 0.55 * len(rows))) as (figure, axes):
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
    with _figure(1, 1, (WIDTH * 0.75, 0.9 + 0.4 * len(values))) as (figure, axes):
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
    with _figure(1, 1, (WIDTH * 0.75, 4.2)) as (figure, axes):
        axis = axes[0, 0]
        axis.plot(span, np.minimum(peak, bandwidth * span) / 1e9, color="black", label="roof: min(arithmetic, memory)")
        for i, (name, (x, y)) in enumerate(points.items()):
            axis.plot(x, y / 1e9, MARKERS[i % len(MARKERS)], color=PALETTE[i % len(PALETTE)], markersize=8)
            axis.annotate(name, (x, y / 1e9), xytext=(6, -12), textcoords="offset points", fontsize=9)
        axis.set(xscale="log", yscale="log", xlabel=f"{unit}s per byte moved", ylabel=f"billion {unit}s per second")
        axis.set_title(title)
        _plain_ticks(axis.xaxis)
        _plain_ticks(axis.yaxis)
        axis.legend()
    return figure


def paths(
    panels: Mapping[str, Float[Tensor, "steps n 2"]],
    exact: Float[Tensor, "m 2"] | None = None,
    title: str = "",
) -> Figure:
    """Trajectories in the plane, a panel for each name: from the start (light) to the end (dark).

    `exact` are points of the true distribution, drawn in gray behind. Raises ValueError for no panels.
    """
    if not panels:
        raise ValueError("nothing to draw: pass at least one panel of trajectories")
    with _figure(1, len(panels), (WIDTH, WIDTH / max(2, len(panels)) + 0.6), sharex=True, sharey=True) as (
        figure,
        axes,
    ):
        for axis, (name, states) in zip(axes[0], panels.items(), strict=True):
            if exact is not None:
                axis.scatter(*_array(exact.T), s=4, color="#BBBBBB", linewidths=0)
            for line in states.unbind(1):
                axis.plot(*_array(line.T), color=PALETTE[5], linewidth=0.8)
            axis.scatter(*_array(states[0].T), s=10, facecolors="none", edgecolors=PALETTE[5], label="noise")
            axis.scatter(*_array(states[-1].T), s=12, color=PALETTE[1], label="end", zorder=3)
            axis.set(title=name, aspect="equal")
        axes[0, 0].legend(loc="upper left", fontsize=9)
        _headline(figure, title)
    return figure


def _array(values: Tensor) -> np.ndarray:
    return values.detach().cpu().numpy()


def _show(axis: Axes, image: Float[Tensor, "c h w"]) -> None:
    pixels = _array((image.float() + 1) / 2).clip(0, 1)
    shown = pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)
    axis.imshow(shown, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axis.grid(False)


def _grid_size(
    images: Float[Tensor, "n c h w"], columns: int, rows: int, row_extra: float, side: float, top: float
) -> tuple[float, float]:
    """Width and height in inches of a grid whose cells fill the column's width, but are no wider than an inch."""
    cell = min(1.0, (WIDTH - side) / columns)
    height, width = images.shape[-2:]
    return side + cell * columns, top + rows * (cell * height / width + row_extra)


def _plain_ticks(axis: Axis) -> None:
    """1, 2, 5, 10 instead of powers of ten, where the logarithmic axis spans few enough decades to hold them."""
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 200 else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _headline(figure: Figure, title: str) -> None:
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=STYLE["axes.titlesize"])


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
