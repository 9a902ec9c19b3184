"""Figures: each shows what it was given, is closed, and refuses what it cannot show."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from diffusion_opt.lesson import plots
from diffusion_opt.lesson.plots.style import WIDTH

IMAGES = torch.linspace(-1, 1, 3 * 5 * 7).reshape(3, 1, 5, 7)
FIGURES = {
    "image_grid": lambda: plots.image_grid(IMAGES, ["a", "b", "c"], columns=2, title="T"),
    "image_rows": lambda: plots.image_rows({"one": IMAGES, "two": -IMAGES}, ["a", "b", "c"], title="T"),
    "curves": lambda: plots.curves({"a": {1: 0.5, 2: 0.2}, "b": {1: 1.0}}, x_label="x", y_label="y", slopes=[1, 2]),
    "stacked_shares": lambda: plots.stacked_shares({"r": {"a": 1.0, "b": 3.0}, "s": {"a": 2.0, "b": 2.0}}),
    "bars": lambda: plots.bars({"a": 1.5, "b": 3.0}, "ms"),
    "roofline": lambda: plots.roofline({"a": (0.2, 1e9), "b": (40.0, 5e10)}, peak=6e10, bandwidth=2e10),
    "matrices": lambda: plots.matrices({"a": torch.rand(4, 6), "b": torch.rand(4, 30)}, x_label="x", title="T"),
    "paths": lambda: plots.paths({"a": torch.randn(4, 6, 2), "b": torch.randn(2, 6, 2)}, torch.randn(9, 2)),
}


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_is_returned_closed_and_can_be_drawn(name, tmp_path):
    before, style = plt.get_fignums(), plt.rcParams["font.size"]
    figure = FIGURES[name]()
    assert isinstance(figure, Figure)
    assert plt.get_fignums() == before, "an open figure would be shown twice by Jupyter"
    assert plt.rcParams["font.size"] == style
    figure.savefig(tmp_path / "figure.png")
    width, height = figure.get_size_inches()
    assert width <= WIDTH + 0.01 and height <= 12


@pytest.mark.parametrize("name", FIGURES)
def test_the_same_figure_gives_the_same_bytes(name, tmp_path):
    torch.manual_seed(1)
    FIGURES[name]().savefig(tmp_path / "a.png")
    torch.manual_seed(1)
    FIGURES[name]().savefig(tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_pictures_are_mapped_from_minus_one_to_one_and_clipped():
    figure = plots.image_grid(torch.tensor([-3.0, -1.0, 0.0, 1.0]).reshape(1, 1, 2, 2))
    np.testing.assert_allclose(figure.axes[0].images[0].get_array(), [[0, 0], [0.5, 1]])


def test_color_pictures_keep_their_channels_last():
    figure = plots.image_grid(torch.zeros(1, 3, 4, 5))
    assert figure.axes[0].images[0].get_array().shape == (4, 5, 3)


def test_rows_are_named_and_columns_labeled():
    figure = FIGURES["image_rows"]()
    assert [axis.get_ylabel() for axis in figure.axes[::3]] == ["one", "two"]
    assert [axis.get_title() for axis in figure.axes[:3]] == ["a", "b", "c"]


def test_shares_add_up_to_one_hundred():
    axis = FIGURES["stacked_shares"]().axes[0]
    widths = [[bar.get_width() for bar in container] for container in axis.containers]
    assert widths == [[25.0, 50.0], [75.0, 50.0]]


def test_curves_draw_each_line_in_its_own_color_and_marker_and_the_slopes():
    lines = FIGURES["curves"]().axes[0].lines
    assert [list(line.get_ydata()) for line in lines[:2]] == [[0.5, 0.2], [1.0]]
    assert len({line.get_color() for line in lines[:2]}) == len({line.get_marker() for line in lines[:2]}) == 2
    assert [line.get_ydata()[-1] for line in lines[2:]] == [0.25, 0.125]


def test_the_roof_is_the_lower_of_arithmetic_and_memory():
    x, y = FIGURES["roofline"]().axes[0].lines[0].get_data()
    np.testing.assert_allclose(y, np.minimum(60, 20 * x))


@pytest.mark.parametrize(
    ("draw", "words"),
    [
        (lambda: plots.image_grid(IMAGES, ["a"]), "1 labels for 3 pictures"),
        (lambda: plots.image_rows({"a": IMAGES, "b": IMAGES[:2]}), "'b': 2"),
        (lambda: plots.image_rows({}), "at least one"),
        (lambda: plots.curves({}, x_label="x", y_label="y"), "nothing to draw"),
        (lambda: plots.curves({"a": {1: 0.0}}, x_label="x", y_label="y"), "positive values"),
        (lambda: plots.stacked_shares({"r": {"a": 1.0}, "s": {"b": 1.0}}), "'s'"),
        (lambda: plots.stacked_shares({"r": {"a": 0.0}}), "positive sum"),
        (lambda: plots.bars({}, "ms"), "nothing to draw"),
        (lambda: plots.roofline({}, 1.0, 1.0), "nothing to draw"),
        (lambda: plots.paths({}), "nothing to draw"),
    ],
)
def test_what_cannot_be_shown_is_refused(draw, words):
    with pytest.raises(ValueError, match=words):
        draw()


def test_intervals_have_a_dot_and_a_bar_for_each_row():
    axis = plots.intervals({"a": (1.0, 0.5, 2.0), "b": (3.0, 2.5, 3.2)}, "FD").axes[0]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["a", "b"]
    assert len(axis.containers) == 2 and axis.get_xlabel() == "FD"


@pytest.mark.parametrize("rows", [{}, {"a": (3.0, 0.5, 2.0)}])
def test_intervals_refuse_nothing_and_an_estimate_outside(rows):
    with pytest.raises(ValueError, match=r"at least one estimate|must lie in its interval"):
        plots.intervals(rows, "FD")


def test_whole_numbers_have_whole_ticks():
    axis = plots.curves({"a": {1: 2.0, 2: 1.0, 3: 0.5}}, x_label="frame", y_label="error", logarithmic=False).axes[0]
    assert all(tick == int(tick) for tick in axis.get_xticks())
