"""A few pictures side by side, large enough to look for a difference of one token."""

from collections.abc import Mapping

from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from diffusion_opt.lesson.plots.style import WIDTH, headline, new_figure, show

WIDEST = 1.75  # inches of a panel


def panels(pictures: Mapping[str, Float[Tensor, "1 c h w"]], title: str = "") -> Figure:
    """One row of named pictures in [-1, 1], which may differ in size. Raises ValueError for no pictures."""
    if not pictures:
        raise ValueError("nothing to draw: pass at least one picture")
    width = min(WIDEST, WIDTH / len(pictures))
    height = width * max(picture.shape[2] / picture.shape[3] for picture in pictures.values())
    size = (width * len(pictures), height + 0.3 + (0.3 if title else 0.0))
    with new_figure(1, len(pictures), size) as (figure, axes):
        for axis, (name, picture) in zip(axes[0], pictures.items(), strict=True):
            show(axis, picture[0])
            axis.axis("off")
            axis.set_title(name, fontsize=9, loc="center")
        headline(figure, title)
    return figure
