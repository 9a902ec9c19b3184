"""The look of the course's figures, and what drawing functions share."""

from collections.abc import Iterator
from contextlib import contextmanager

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
def new_figure(rows: int, columns: int, size: tuple[float, float], **options) -> Iterator[tuple[Figure, np.ndarray]]:
    """A figure with a rows x columns array of axes in the course's style, closed at the end so that it shows once."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, **options)
        try:
            yield figure, axes
        finally:
            plt.close(figure)


def array(values: Tensor) -> np.ndarray:
    return values.detach().cpu().numpy()


def show(axis: Axes, image: Float[Tensor, "c h w"]) -> None:
    pixels = array((image.float() + 1) / 2).clip(0, 1)
    shown = pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)
    axis.imshow(shown, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axis.grid(False)


def plain_ticks(axis: Axis) -> None:
    """1, 2, 5, 10 instead of powers of ten, where the logarithmic axis spans few enough decades to hold them."""
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 200 else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def headline(figure: Figure, title: str) -> None:
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=STYLE["axes.titlesize"])
