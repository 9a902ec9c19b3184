"""The pairs that a lesson shows are those that the calibration fits to."""

import pytest
import torch

from diffusion_opt.caching import calibrate_runs
from diffusion_opt.caching.step.stack import attached_cut
from diffusion_opt.lesson.watching import change_map, change_pairs
from diffusion_opt.models import load


@torch.no_grad()
def test_pairs_are_those_of_the_calibration():
    pipe = load("fashion-micro")
    pipe.set_progress_bar_config(disable=True)

    def generate():
        pipe(["bag", "coat"], 6, generator=torch.Generator().manual_seed(3), output_type="latent")

    x, y = change_pairs(pipe, generate)
    found = calibrate_runs(pipe, [generate])
    assert x.shape == y.shape == (found.num_pairs,) == (2 * 2 * 5,)
    assert float(x.max()) == pytest.approx(found.curve.changes[-1], rel=0.3)
    by_step = y.reshape(2, 5, 2).mean(dim=(0, 2))
    torch.testing.assert_close(by_step, torch.tensor(found.step_table), rtol=1e-4, atol=1e-6)
    assert attached_cut(pipe.transformer) is None


def test_a_map_of_changes_is_relative_to_the_step_in_the_column():
    found = change_map([torch.tensor([[3.0], [4.0]]), torch.tensor([[6.0], [8.0]])])
    torch.testing.assert_close(found, torch.tensor([[0.0, 0.5], [1.0, 0.0]]))
