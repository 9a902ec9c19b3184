"""Arrows in the plane: scores, velocities, and what pushes points where."""

from collections.abc import Mapping

from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from diffusion_opt.lesson.plots.style import PALETTE, WIDTH, array, headline, new_figure


def fields(
    panels: Mapping[str, Float[Tensor, "n 2"]],
    at: Float[Tensor, "n 2"],
    clouds: Mapping[str, Float[Tensor, "_ 2"]] | None = None,
    title: str = "",
) -> Figure:
    """One panel of arrows for each name, drawn at the points `at` and all to one scale; `clouds` of points behind.

    The longest arrow of all panels is as long as the view is wide, over eight. Raises ValueError for no panels, and for
    arrows that are not one for each point.
    """
    if not panels:
        raise ValueError("nothing to draw: pass at least one panel of arrows")
    for name, arrows in panels.items():
        if arrows.shape != at.shape:
            raise ValueError(f"one arrow for each of the {len(at)} points, got {len(arrows)} in {name!r}")
    half = 1.1 * float(at.abs().max())
    longest = max(float(arrows.norm(dim=1).max()) for arrows in panels.values())
    scale = max(longest, 1e-9) / (half / 4)
    side = min(3.4, WIDTH / len(panels))
    size = (side * len(panels), side + 0.35 + 0.3 * bool(title) + 0.25 * bool(clouds))
    with new_figure(1, len(panels), size, sharex=True, sharey=True) as (figure, axes):
        for axis, (name, arrows) in zip(axes[0], panels.items(), strict=True):
            for color, (cloud, points) in zip(("#888888", PALETTE[5]), (clouds or {}).items(), strict=False):
                axis.scatter(*array(points.T), s=6, color=color, linewidths=0, label=cloud)
            axis.quiver(
                *array(at.T), *array(arrows.T), angles="xy", scale_units="xy", scale=scale, width=0.008, zorder=3
            )
            axis.set(xlim=(-half, half), ylim=(-half, half), xticks=[], yticks=[], aspect="equal")
            axis.set_title(name, fontsize=10)
        if clouds:
            named = axes[0, 0].get_legend_handles_labels()
            figure.legend(*named, loc="outside lower center", ncols=len(clouds), fontsize=9, markerscale=3)
        headline(figure, title)
    return figure
