"""Points of many students in the plane, each before the true distribution."""

from collections.abc import Mapping

from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from diffusion_opt.lesson.plots.style import PALETTE, WIDTH, array, headline, new_figure


def clouds(
    rows: Mapping[str, Mapping[str, Float[Tensor, "n 2"]]], exact: Float[Tensor, "m 2"], title: str = ""
) -> Figure:
    """A row of panels for each name, and in it a panel of points for each name; `exact` in gray behind.

    The view is that of `exact`, with some room: points that fly off do not shrink the others. Raises ValueError if
    there are no rows or they differ in length.
    """
    lengths = {name: len(panels) for name, panels in rows.items()}
    if len(set(lengths.values())) != 1 or not next(iter(lengths.values())):
        raise ValueError(f"rows must be of one length, at least one panel long, got {lengths}")
    columns = next(iter(lengths.values()))
    half = 1.25 * float(exact.abs().max())
    side = min(2.0, WIDTH / columns)
    size = (side * columns + 0.3, (side + 0.25) * len(rows) + (0.3 if title else 0.0))
    with new_figure(len(rows), columns, size, sharex=True, sharey=True) as (figure, axes):
        for (row, panels), line in zip(rows.items(), axes, strict=True):
            for (name, points), axis in zip(panels.items(), line, strict=True):
                axis.scatter(*array(exact.T), s=3, color="#BBBBBB", linewidths=0)
                axis.scatter(*array(points.T), s=3, color=PALETTE[1], linewidths=0)
                axis.set(xlim=(-half, half), ylim=(-half, half), xticks=[], yticks=[], aspect="equal")
                axis.spines[:].set_visible(False)
                axis.set_title(name, fontsize=9, loc="center")
            line[0].set_ylabel(row)
        headline(figure, title)
    return figure
