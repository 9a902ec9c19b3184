"""Number lines and ranges: what is drawn is what was given, and what cannot be shown is refused."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from diffusion_opt.lesson import plots
from diffusion_opt.quantization import LayerRanges, RangeRecord

GRIDS = {"coarse": torch.tensor([-1.0, 0.0, 1.0]), "fine": torch.linspace(-1, 1, 9)}
LAYER = LayerRanges((1.0, 0.5, 0.1), (-3.0, -2.0, -1.0), (4.0, 5.0, 1.5), ((-2.0, -1.0, 0.0, 1.0, 2.0),) * 3)
RECORD = RangeRecord({"a": LAYER, "b": LAYER, "c": LAYER, "d": LAYER})


def test_a_few_numbers_are_tied_to_the_nearest_mark():
    numbers = torch.tensor([-0.9, 0.2, 0.6])
    figure = plots.number_lines(GRIDS, numbers, title="T")
    coarse, fine = figure.axes
    assert [axis.get_ylabel() for axis in figure.axes] == ["coarse", "fine"]
    ends = {axis: [line.get_xdata()[1] for line in axis.lines[1:4]] for axis in (coarse, fine)}
    assert ends[coarse] == [-1, 0, 1] and ends[fine] == [-1, 0.25, 0.5]
    assert np.allclose(coarse.lines[-1].get_xdata(), numbers) and not plt.get_fignums()


def test_many_numbers_are_one_histogram_above_the_lines():
    figure = plots.number_lines(GRIDS, torch.linspace(-1, 1, 500))
    assert len(figure.axes) == 3
    assert sum(patch.get_height() for patch in figure.axes[0].patches) == 500
    assert len(plots.number_lines(GRIDS).axes) == 2


def test_ranges_show_extremes_and_bands_from_noise_to_data():
    figure = plots.ranges(RECORD, ["a", "b", "c", "d"])
    assert [axis.get_title(loc="left") for axis in figure.axes[:4]] == ["a", "b", "c", "d"]
    first = figure.axes[0]
    assert [list(line.get_ydata()) for line in first.lines] == [[4.0, 5.0, 1.5], [-3.0, -2.0, -1.0]]
    assert len(first.collections) == 2 and first.get_xlim() == (1.0, 0.1)
    assert [text.get_text() for text in first.get_legend().get_texts()][:2] == ["0.1 to 99.9 %", "1 to 99 %"]


@pytest.mark.parametrize(
    ("draw", "words"),
    [
        (lambda: plots.number_lines({}), "nothing to draw"),
        (lambda: plots.number_lines({"empty": torch.empty(0)}), "nothing to draw"),
        (lambda: plots.ranges(RECORD, []), "names must be layers"),
        (lambda: plots.ranges(RECORD, ["e"]), r"such as 'a', got \['e'\]"),
    ],
)
def test_what_cannot_be_shown_is_refused(draw, words):
    with pytest.raises(ValueError, match=words):
        draw()
