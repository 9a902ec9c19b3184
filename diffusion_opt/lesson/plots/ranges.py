"""How the inputs of layers spread at each time."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from diffusion_opt.lesson.plots.style import PALETTE, WIDTH, headline, new_figure
from diffusion_opt.quantization import RangeRecord

MOST_COLUMNS = 3


def ranges(record: RangeRecord, names: Sequence[str], title: str = "") -> Figure:
    """One panel for each named layer of a record: smallest and largest input by time, and bands of its percentiles.

    Time runs from noise (left) to data. Raises ValueError for no names and for a layer that is not in the record.
    """
    unknown = [name for name in names if name not in record.layers]
    if unknown or not names:
        raise ValueError(f"names must be layers of the record, such as {next(iter(record.layers))!r}, got {unknown}")
    columns = min(MOST_COLUMNS, len(names))
    rows = -(-len(names) // columns)
    with new_figure(rows, columns, (WIDTH, 0.6 + 2.6 * rows), sharex=True) as (figure, axes):
        for axis in axes.flat[len(names) :]:
            axis.axis("off")
        for axis, name in zip(axes.flat, names, strict=False):
            layer = record.layers[name]
            for ends, shade in zip(_pairs(record.levels), (0.25, 0.5), strict=False):
                low, high = ([row[end] for row in layer.percentiles] for end in ends)
                label = f"{record.levels[ends[0]]:g} to {record.levels[ends[1]]:g} %"
                axis.fill_between(layer.times, low, high, color=PALETTE[0], alpha=shade, linewidth=0, label=label)
            axis.plot(layer.times, layer.largest, color=PALETTE[1], label="smallest, largest")
            axis.plot(layer.times, layer.smallest, color=PALETTE[1])
            axis.set_title(name.replace("transformer_blocks", "blocks"), fontsize=9)
            axis.set_xlim(max(layer.times), min(layer.times))
        for axis in axes[-1]:
            axis.set_xlabel("time t")
        axes[0, 0].legend(fontsize=8)
        headline(figure, title)
    return figure


def _pairs(levels: Sequence[float]) -> list[tuple[int, int]]:
    """Indices of levels that enclose the middle: the outermost two, then the next two."""
    return [(i, len(levels) - 1 - i) for i in range(len(levels) // 2)]
