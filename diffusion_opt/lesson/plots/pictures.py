"""Pictures, alone or one row for each way of making them."""

from collections.abc import Mapping, Sequence

from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from diffusion_opt.lesson.plots.style import WIDTH, headline, new_figure, show


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
    with new_figure(rows, columns, size) as (figure, axes):
        for axis in axes.flat:
            axis.axis("off")
        for i, (image, axis) in enumerate(zip(images, axes.flat, strict=False)):
            show(axis, image)
            if labels is not None:
                axis.set_title(labels[i], fontsize=9, loc="center")
        headline(figure, title)
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
    with new_figure(len(rows), len(first), size) as (figure, axes):
        for (name, images), line in zip(rows.items(), axes, strict=True):
            for image, axis in zip(images, line, strict=True):
                show(axis, image)
                axis.set(xticks=[], yticks=[])
                axis.spines[:].set_visible(False)
            line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=10)
        for axis, name in zip(axes[0], columns or (), strict=bool(columns)):
            axis.set_title(name, fontsize=9, loc="center")
        headline(figure, title)
    return figure


def _grid_size(
    images: Float[Tensor, "n c h w"], columns: int, rows: int, row_extra: float, side: float, top: float
) -> tuple[float, float]:
    """Width and height in inches of a grid whose cells fill the column's width, but are no wider than an inch."""
    cell = min(1.0, (WIDTH - side) / columns)
    height, width = images.shape[-2:]
    return side + cell * columns, top + rows * (cell * height / width + row_extra)
