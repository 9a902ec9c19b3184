"""Figures of decisions: the points and curves that were given, and a filled cell for each computed step."""

import matplotlib.pyplot as plt
import pytest
import torch
from matplotlib.figure import Figure

from diffusion_opt.lesson import plots
from diffusion_opt.lesson.plots.style import WIDTH

X, Y = torch.tensor([0.1, 0.3, 0.2]), torch.tensor([1.0, 3.0, 2.5])
FIGURES = {
    "fits": lambda: plots.fits(X, Y, {"ten": lambda x: 10 * x, "wild": lambda x: 1e6 * x}, x_label="x", y_label="y"),
    "masks": lambda: plots.masks({"one": (True, False, True), "all": [True] * 3}, title="T"),
}


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_is_returned_closed_and_is_the_same_each_time(name, tmp_path):
    before = plt.get_fignums()
    figure = FIGURES[name]()
    assert isinstance(figure, Figure) and plt.get_fignums() == before
    assert figure.get_size_inches()[0] <= WIDTH + 0.01
    figure.savefig(tmp_path / "a.png")
    FIGURES[name]().savefig(tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_curves_are_drawn_over_the_range_of_the_points_and_the_axis_shows_the_points():
    axis = FIGURES["fits"]().axes[0]
    line = axis.lines[0]
    assert line.get_xdata()[[0, -1]] == pytest.approx([0.1, 0.3]) and line.get_ydata()[-1] == pytest.approx(3.0)
    assert axis.collections[0].get_offsets().shape == (3, 2)
    assert axis.get_ylim()[1] == pytest.approx(3.1), "the wild curve does not stretch the axis"


def test_a_mask_shows_its_computed_steps_and_their_number():
    axis = FIGURES["masks"]().axes[0]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["one", "all"]
    assert [text.get_text() for text in axis.texts] == ["2", "3"]
    filled = [[round(bar.get_x() + bar.get_width() / 2) for bar in bars] for bars in axis.containers[1::2]]
    assert filled == [[0, 2], [0, 1, 2]]


def test_what_cannot_be_shown_is_refused():
    with pytest.raises(ValueError, match="nothing to draw"):
        plots.fits(X[:0], Y[:0], {}, x_label="x", y_label="y")
    with pytest.raises(ValueError, match="'b': 1"):
        plots.masks({"a": (True, False), "b": (True,)})
    with pytest.raises(ValueError, match="at least one"):
        plots.masks({})
