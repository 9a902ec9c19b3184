"""What a number format can hold: its numbers as marks on a line, and where given numbers go."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from diffusion_opt.lesson.plots.style import PALETTE, WIDTH, array, headline, new_figure

MOST_DOTS = 40  # numbers up to which each is drawn as a dot with a line to where it is rounded
NUM_BINS = 120


def number_lines(
    grids: Mapping[str, Float[Tensor, " k"]], numbers: Float[Tensor, " n"] | None = None, title: str = ""
) -> Figure:
    """One line for each format, with a mark at each number that it holds.

    A few `numbers` stand above every line, each tied to the mark that is nearest; many are shown once on top, as a
    histogram. Raises ValueError for no formats and for a format that holds nothing.
    """
    if not grids or not all(len(grid) for grid in grids.values()):
        raise ValueError("nothing to draw: pass at least one format with at least one number")
    few = numbers is not None and len(numbers) <= MOST_DOTS
    histogram = numbers is not None and not few
    heights = [1.6] * histogram + [0.85 if few else 0.55] * len(grids)
    options = {"sharex": True, "gridspec_kw": {"height_ratios": heights}}
    with new_figure(len(heights), 1, (WIDTH, 0.5 + sum(heights)), **options) as (figure, axes):
        if histogram:
            axes[0, 0].hist(array(numbers), bins=NUM_BINS, color=PALETTE[0])
            axes[0, 0].set(yticks=[], ylabel="how many")
        for axis, (name, grid) in zip(axes[histogram:, 0], grids.items(), strict=True):
            _line(axis, name, array(grid), array(numbers) if few else None)
        headline(figure, title)
    return figure


def _line(axis: Axes, name: str, grid: np.ndarray, numbers: np.ndarray | None) -> None:
    axis.axhline(0, color="#888888", linewidth=0.8)
    axis.vlines(grid, -0.5, 0.5, color="black", linewidth=0.8)
    top = 0.8
    if numbers is not None:
        top = 2.2
        nearest = grid[np.abs(numbers[:, None] - grid[None, :]).argmin(1)]
        axis.plot(np.stack([numbers, nearest]), [[1.6], [0.0]], color=PALETTE[1], linewidth=0.9)
        axis.plot(numbers, np.full(len(numbers), 1.6), "o", color=PALETTE[0], markersize=4)
    axis.set(ylim=(-0.8, top), yticks=[])
    axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=10)
    axis.spines[["left", "bottom"]].set_visible(False)
    axis.tick_params(bottom=False)
    axis.grid(False)
