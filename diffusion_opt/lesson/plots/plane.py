"""Trajectories in the plane."""

from collections.abc import Mapping

from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from diffusion_opt.lesson.plots.style import PALETTE, WIDTH, array, headline, new_figure


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
    with new_figure(1, len(panels), (WIDTH, WIDTH / max(2, len(panels)) + 0.6), sharex=True, sharey=True) as (
        figure,
        axes,
    ):
        for axis, (name, states) in zip(axes[0], panels.items(), strict=True):
            if exact is not None:
                axis.scatter(*array(exact.T), s=4, color="#BBBBBB", linewidths=0)
            for line in states.unbind(1):
                axis.plot(*array(line.T), color=PALETTE[5], linewidth=0.8)
            axis.scatter(*array(states[0].T), s=10, facecolors="none", edgecolors=PALETTE[5], label="noise")
            axis.scatter(*array(states[-1].T), s=12, color=PALETTE[1], label="end", zorder=3)
            axis.set(title=name, aspect="equal")
        axes[0, 0].legend(loc="upper left", fontsize=9)
        headline(figure, title)
    return figure
