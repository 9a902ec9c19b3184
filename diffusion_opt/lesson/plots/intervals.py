"""Estimates with their intervals: which ones can be told apart."""

from collections.abc import Mapping

from matplotlib.figure import Figure

from diffusion_opt.lesson.plots.style import PALETTE, WIDTH, new_figure


def intervals(rows: Mapping[str, tuple[float, float, float]], unit: str, title: str = "") -> Figure:
    """A dot with a bar from low to high for each named (estimate, low, high); the first row's interval as a band.

    Raises ValueError for no rows, and for an estimate outside its interval.
    """
    if not rows:
        raise ValueError("nothing to draw: pass at least one estimate with its interval")
    for name, (estimate, low, high) in rows.items():
        if not low <= estimate <= high:
            raise ValueError(f"{name!r}: the estimate {estimate} must lie in its interval, {low} to {high}")
    with new_figure(1, 1, (WIDTH * 0.75, 0.9 + 0.28 * len(rows))) as (figure, axes):
        axis, (_, low, high) = axes[0, 0], next(iter(rows.values()))
        axis.axvspan(low, high, color=PALETTE[5], alpha=0.2, linewidth=0)
        for place, (estimate, low, high) in enumerate(rows.values()):
            error = [[estimate - low], [high - estimate]]
            axis.errorbar(estimate, place, xerr=error, fmt="o", color=PALETTE[0], capsize=3, linewidth=1.5)
        axis.set_yticks(range(len(rows)), list(rows))
        axis.set(ylim=(len(rows) - 0.5, -0.5), xlabel=unit, title=title)
        axis.tick_params(axis="y", length=0)
    return figure
