"""What a cache decides by, and what it decided: fitted curves over measured pairs, and masks of computed steps."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from diffusion_opt.lesson.plots.style import PALETTE, WIDTH, array, new_figure


def fits(
    x: Float[Tensor, " n"],
    y: Float[Tensor, " n"],
    curves: Mapping[str, Callable[[float], float]],
    *,
    x_label: str,
    y_label: str,
    title: str = "",
) -> Figure:
    """Measured pairs as gray points, and named curves through them over the range of x.

    The vertical axis shows the points, so a curve may leave it. Raises ValueError for no points.
    """
    if not len(x):
        raise ValueError("nothing to draw: pass at least one pair of numbers")
    x, y = array(x), array(y)
    at = np.linspace(x.min(), x.max(), 300)
    with new_figure(1, 1, (WIDTH * 0.75, 4.2)) as (figure, axes):
        axis = axes[0, 0]
        axis.scatter(x, y, s=8, color="#AAAAAA", linewidths=0, label="measured")
        for i, (name, curve) in enumerate(curves.items()):
            style = {"color": PALETTE[i % len(PALETTE)], "linestyle": ("-", "--", "-.", ":")[i % 4]}
            axis.plot(at, [curve(float(value)) for value in at], label=name, **style)
        room = 0.05 * (y.max() - y.min() or 1.0)
        axis.set(xlabel=x_label, ylabel=y_label, title=title, ylim=(min(0.0, y.min()) - room, y.max() + room))
        axis.legend()
    return figure


def masks(rows: Mapping[str, Sequence[bool]], title: str = "") -> Figure:
    """One named row of steps for each mask: filled where the step is computed, the number of these at the end.

    Raises ValueError if there are no rows or the rows differ in length.
    """
    lengths = {name: len(mask) for name, mask in rows.items()}
    if len(set(lengths.values())) != 1:
        raise ValueError(f"masks must be of one length, at least one of them, got {lengths}")
    steps = next(iter(lengths.values()))
    with new_figure(1, 1, (WIDTH, 0.8 + 0.36 * len(rows))) as (figure, axes):
        axis = axes[0, 0]
        for place, mask in enumerate(rows.values()):
            axis.bar(range(steps), 0.7, bottom=place - 0.35, width=0.8, color="#E4E4E4")
            computed = [step for step, ran in enumerate(mask) if ran]
            axis.bar(computed, 0.7, bottom=place - 0.35, width=0.8, color=PALETTE[0])
            axis.text(steps, place, f"{len(computed)}", va="center")
        axis.set_yticks(range(len(rows)), list(rows))
        axis.set(xlim=(-0.6, steps + 1.5), ylim=(len(rows) - 0.5, -0.5), xlabel="step", title=title)
        axis.tick_params(axis="y", length=0)
        axis.spines["left"].set_visible(False)
        axis.grid(False)
    return figure
