"""Matrices as pictures: scores, masks, errors, and which program works on which element."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Num
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from torch import Tensor

from diffusion_opt.lesson.plots.style import WIDTH, array, headline, new_figure

MOST_NUMBERS = 16  # rows and columns up to which each element shows its number; twice as many in all panels together


def matrices(
    panels: Mapping[str, Num[Tensor, "rows columns"]],
    *,
    x_label: str = "",
    y_label: str = "",
    title: str = "",
    logarithmic: bool = False,
) -> Figure:
    """One panel for each matrix, all on one color scale; small ones show their numbers.

    Raises ValueError for no panels, and on a logarithmic scale if nothing is positive.
    """
    values = {name: array(matrix.double()) for name, matrix in panels.items()}
    if not values:
        raise ValueError("nothing to draw: pass at least one matrix")
    low, high = min(v.min() for v in values.values()), max(v.max() for v in values.values())
    norm = None
    if logarithmic:
        if high <= 0:
            raise ValueError("a logarithmic color scale needs positive values; pass logarithmic=False")
        positive = min(v[v > 0].min() for v in values.values() if (v > 0).any())
        norm = LogNorm(positive if positive < high else high / 10, high)
    shape = next(iter(values.values())).shape
    numbered = max(max(v.shape) for v in values.values()) <= MOST_NUMBERS
    numbered &= sum(v.shape[1] for v in values.values()) <= 2 * MOST_NUMBERS
    width = WIDTH / max(2, len(values))
    height = max(1.2, min(0.8 * width, width * shape[0] / shape[1])) + 0.8
    with new_figure(1, len(values), (WIDTH, height), sharey=True) as (figure, axes):
        for axis, (name, matrix) in zip(axes[0], values.items(), strict=True):
            scale = {"norm": norm} if norm else {"vmin": low, "vmax": max(high, low + 1e-9)}
            drawn = axis.imshow(matrix, cmap="cividis", interpolation="nearest", aspect="auto", **scale)
            axis.set(title=name, xlabel=x_label)
            axis.grid(False)
            if numbered:
                for (row, column), value in np.ndenumerate(matrix):
                    ink = "black" if drawn.norm(value) > 0.6 else "white"
                    axis.text(column, row, f"{value:.3g}", ha="center", va="center", color=ink, fontsize=8)
        axes[0, 0].set_ylabel(y_label)
        if not numbered:
            figure.colorbar(drawn, ax=axes[0].tolist(), fraction=0.04)
        headline(figure, title)
    return figure
