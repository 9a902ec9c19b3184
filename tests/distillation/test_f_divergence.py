"""The weights h(r) against f''(r) r^2, and against the gradient of the divergence itself."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from diffusion_opt.distillation.distribution import DIVERGENCES, RatioBins, divergence_weight

F: dict[str, Callable[[Tensor], Tensor]] = {
    "reverse_kl": lambda r: -r.log(),
    "kl": lambda r: r * r.log(),
    "jeffreys": lambda r: (r - 1) * r.log(),
    "js": lambda r: r * r.log() - (r + 1) * ((r + 1) / 2).log(),
    "squared_hellinger": lambda r: (1 - r.sqrt()).square(),
    "pearson": lambda r: (r - 1).square(),
    "neyman": lambda r: (r - 1).square() / r,
    "softened_reverse_kl": lambda r: (r + 1) * ((r + 1) / (2 * r)).log(),
}


def test_every_divergence_is_tested() -> None:
    assert F.keys() == DIVERGENCES.keys()


@pytest.mark.parametrize("name", sorted(F))
def test_the_weight_is_the_second_derivative_times_the_square(name: str) -> None:
    r = torch.logspace(-1, 1, 9, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(F[name](r).sum(), r, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), r)
    torch.testing.assert_close(DIVERGENCES[name](r.detach()), second * r.detach().square())


@pytest.mark.parametrize("name", sorted(F))
def test_the_weighted_gradient_is_that_of_the_divergence(name: str) -> None:
    """Two Gaussians at t = 0.5 on a fine grid: d/dm of the integral of p_S f(p_T / p_S), where dx_t/dm = 1 - t."""
    grid = torch.linspace(-9, 9, 6001, dtype=torch.float64)
    spacing, shrink = grid[1] - grid[0], 0.5
    mean = torch.tensor(0.0, dtype=torch.float64, requires_grad=True)

    def density(mean: Tensor | float, variance: float) -> Tensor:
        return torch.exp(-((grid - mean) ** 2) / (2 * variance)) / (2 * torch.pi * variance) ** 0.5

    teacher, variance = density(shrink * 0.5, 0.41), 0.5
    student = density(shrink * mean, variance)
    (exact,) = torch.autograd.grad((student * F[name](teacher / student)).sum() * spacing, mean)
    scores = -grid / variance + (grid - shrink * 0.5) / 0.41
    ratio = (teacher / student).detach()
    ours = (student.detach() * DIVERGENCES[name](ratio) * scores * shrink).sum() * spacing
    torch.testing.assert_close(ours, exact, rtol=1e-6, atol=1e-9)


def test_weights_have_mean_one_and_their_ratio_is_limited() -> None:
    logits = torch.tensor([[0.0, 0.0], [1.0, 3.0], [-9.0, -9.0], [9.0, 9.0]], requires_grad=True)
    weight = divergence_weight("kl", logits)
    ratio = torch.tensor([1.0, torch.e**2, 0.1, 20.0])
    torch.testing.assert_close(weight, ratio / ratio.mean())
    assert not weight.requires_grad
    assert torch.equal(divergence_weight("reverse_kl", logits), torch.ones(4))
    assert divergence_weight("neyman", logits).argmax() == 2


def test_weights_by_hand() -> None:
    """r = 1 and 3: js gives 1/2 and 3/4, squared Hellinger 1/2 and sqrt(3)/2, Jeffreys 2 and 4; scaled to mean 1."""
    logits = torch.tensor([[1.0], [3.0]]).log()
    expected = {"js": (0.8, 1.2), "squared_hellinger": (0.7320508, 1.2679492), "jeffreys": (2 / 3, 4 / 3)}
    for name, pair in expected.items():
        torch.testing.assert_close(divergence_weight(name, logits), torch.tensor(pair))


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match=r"divergence must be one of .*, got 'chi'"):
        divergence_weight("chi", torch.zeros(2, 1))
    with pytest.raises(ValueError, match="0 < low < high"):
        divergence_weight("kl", torch.zeros(2, 1), (2.0, 1.0))


def test_bins_by_hand_and_in_the_limit_of_one_ratio() -> None:
    """Four samples in two parts of time: means 0.9 * 1 + 0.1 * (mean of the part); a part without samples stays."""
    bins = RatioBins(num=3, low=0.0, high=0.9, rate=0.9)
    ratio, t = torch.tensor([2.0, 4.0, 1.0, 3.0]), torch.tensor([0.1, 0.29, 0.31, 0.59])
    means = torch.tensor([0.9 + 0.3, 0.9 + 0.2, 1.0])
    torch.testing.assert_close(bins(ratio, t), ratio / means[[0, 0, 1, 1]])
    torch.testing.assert_close(bins.means, means)
    for _ in range(200):  # where all samples of a part have one ratio, they come to have the ratio 1
        constant = bins(torch.tensor([5.0, 0.2]), torch.tensor([0.95, 0.0]))
    torch.testing.assert_close(constant, torch.ones(2), rtol=1e-5, atol=1e-5)


def test_bins_are_saved_and_weigh_samples_against_others_at_their_noise() -> None:
    bins = RatioBins(num=2, rate=0.0)
    logits, t = torch.tensor([[0.0], [1.0], [1.5], [2.5]]), torch.tensor([0.2, 0.2, 0.8, 0.8])
    weight = divergence_weight("kl", logits, bins=bins, t=t)
    torch.testing.assert_close(weight[:2], weight[2:])  # the same pair, e times apart, at both noises
    torch.testing.assert_close(weight.mean(), torch.tensor(1.0))
    other = RatioBins(num=2)
    other.load_state_dict(bins.state_dict())
    assert torch.equal(other.means, bins.means) and not torch.equal(bins.means, torch.ones(2))
    with pytest.raises(ValueError, match="bins of time need the times"):
        divergence_weight("kl", logits, bins=bins)
    with pytest.raises(ValueError, match="num must be at least 1"):
        RatioBins(num=0)
