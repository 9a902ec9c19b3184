"""Points in the plane."""

import matplotlib.pyplot as plt
import pytest
import torch

from diffusion_opt.lesson import plots

EXACT = torch.tensor([[1.0, 0.0], [0.0, -2.0]])


def test_each_panel_shows_its_points_before_the_exact_ones():
    rows = {"broken": {"a": torch.full((3, 2), 40.0), "b": torch.zeros(5, 2)}, "cured": {"c": EXACT, "d": EXACT}}
    figure = plots.clouds(rows, EXACT, title="two rows")
    assert [axis.get_title() for axis in figure.axes] == ["a", "b", "c", "d"]
    assert [len(axis.collections[1].get_offsets()) for axis in figure.axes] == [3, 5, 2, 2]
    assert all(len(axis.collections[0].get_offsets()) == 2 for axis in figure.axes)
    assert [axis.get_ylabel() for axis in figure.axes] == ["broken", "", "cured", ""]
    assert not plt.get_fignums()


def test_the_view_is_that_of_the_exact_points():
    figure = plots.clouds({"": {"far": torch.full((3, 2), 40.0)}}, EXACT)
    assert figure.axes[0].get_xlim() == (-2.5, 2.5)


def test_rows_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match="of one length"):
        plots.clouds({"one": {"a": EXACT}, "two": {}}, EXACT)
