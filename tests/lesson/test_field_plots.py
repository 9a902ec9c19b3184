"""Arrows in the plane."""

import matplotlib.pyplot as plt
import pytest
import torch

from diffusion_opt.lesson import plots

AT = torch.tensor([[1.0, 0.0], [0.0, -2.0], [0.0, 0.0]])


def test_all_panels_have_one_scale_and_their_arrows_at_the_points():
    figure = plots.fields({"long": 3 * AT, "short": 0.1 * AT}, AT, {"points": AT}, title="two fields")
    long, short = (axis.collections[-1] for axis in figure.axes)
    assert [axis.get_title(loc="left") for axis in figure.axes] == ["long", "short"]
    assert long.scale == short.scale == pytest.approx(6 / (2.2 / 4)), "the longest arrow is an eighth of the view"
    assert long.get_offsets().tolist() == AT.tolist()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["points"]
    assert not plt.get_fignums()


def test_no_panels_are_refused():
    with pytest.raises(ValueError, match="at least one panel"):
        plots.fields({}, AT)


@pytest.mark.wrong_shapes
def test_every_point_has_its_arrow():
    with pytest.raises(ValueError, match="one arrow for each of the 3 points, got 2 in 'few'"):
        plots.fields({"few": AT[:2]}, AT)
