"""Pictures side by side."""

import matplotlib.pyplot as plt
import pytest
import torch

from diffusion_opt.lesson import plots


def test_each_picture_has_a_panel_with_its_name_and_its_pixels():
    figure = plots.panels({"dark": -torch.ones(1, 1, 8, 8), "light": torch.ones(1, 1, 4, 6)}, title="two")
    assert [axis.get_title() for axis in figure.axes] == ["dark", "light"]
    assert [axis.images[0].get_array().mean() for axis in figure.axes] == [0, 1]
    assert figure.get_suptitle() == "two" and not plt.get_fignums()


def test_many_panels_share_the_width_of_a_notebook():
    few, many = (plots.panels({str(i): torch.zeros(1, 1, 8, 8) for i in range(num)}) for num in (2, 9))
    assert few.get_figwidth() < many.get_figwidth() <= 9
    with pytest.raises(ValueError, match="at least one picture"):
        plots.panels({})
