"""The closed-form teacher against quadrature, autograd, torch.distributions, exact transport and its own samples."""

import math

import pytest
import torch
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from diffusion_opt.flow import ClassCondition, GaussianMixtureVelocity, heun, interpolate, sampling_times

DOUBLE = {"dtype": torch.float64}


def mixture_of_five() -> GaussianMixtureVelocity:
    """Five components over (3, 7) points in three classes: every dimension different."""
    g = torch.Generator().manual_seed(1)
    weights = torch.rand(5, generator=g, **DOUBLE) + 0.2
    means = torch.randn(5, 3, 7, generator=g, **DOUBLE)
    stds = torch.rand(5, 3, 7, generator=g, **DOUBLE) + 0.3
    return GaussianMixtureVelocity(weights / weights.sum(), means, stds, torch.tensor([0, 1, 2, 1, 0]))


def line_mixture() -> GaussianMixtureVelocity:
    return GaussianMixtureVelocity(
        weights=torch.tensor([0.2, 0.5, 0.3]),
        means=torch.tensor([[-1.5], [0.2], [1.0]]),
        stds=torch.tensor([[0.3], [0.1], [0.5]]),
        classes=torch.tensor([0, 1, 0]),
    )


def points(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), **DOUBLE)


def labels(*values: int, num_classes: int = 3) -> ClassCondition:
    return ClassCondition(torch.tensor(values), num_classes)


def lone_gaussian() -> GaussianMixtureVelocity:
    return GaussianMixtureVelocity(torch.ones(1), points(1, 3, 7, seed=3), points(1, 3, 7, seed=4).abs() + 0.2)


# The velocity


@pytest.mark.parametrize("t", [0.02, 0.3, 0.7, 0.98])
def test_velocity_is_the_posterior_mean_by_quadrature(t):
    mixture = line_mixture()
    x = torch.linspace(-6, 6, 40001, **DOUBLE)
    prior = MixtureSameFamily(
        Categorical(mixture.weights), Normal(mixture.means.squeeze(1), mixture.stds.squeeze(1))
    ).log_prob(x)
    x_t = torch.linspace(-2, 2, 9, **DOUBLE)[:, None]
    noise = (x_t - (1 - t) * x) / t
    posterior = (prior - noise**2 / 2).softmax(1)
    expected = (posterior * (noise - x)).sum(1, keepdim=True)
    torch.testing.assert_close(mixture(x_t, torch.full((9,), t, **DOUBLE)), expected, rtol=1e-7, atol=1e-8)


def test_velocity_is_the_best_guess_of_noise_minus_data():
    """Over joint draws of (x, e) the residual e - x - v is uncorrelated with any function of x_t; here tanh."""
    mixture, num = mixture_of_five(), 40_000
    x = mixture.sample(num, torch.Generator().manual_seed(0)).double()
    noise, t = points(num, 3, 7), torch.full((num,), 0.4, **DOUBLE)
    x_t = interpolate(x, noise, t)
    residual = noise - x - mixture(x_t, t)
    for product in (residual, residual * x_t.tanh()):
        standard_error = product.std(0) / math.sqrt(num)
        assert (product.mean(0).abs() / standard_error).max() < 4.5
    shifted = (noise - x - mixture(x_t, t + 0.1)) * x_t.tanh()
    assert (shifted.mean(0).abs() / (shifted.std(0) / math.sqrt(num))).max() > 10


def test_velocity_at_the_ends():
    mixture, x_t = mixture_of_five(), points(2, 3, 7)
    mean = torch.einsum("k,k...->...", mixture.weights, mixture.means)
    torch.testing.assert_close(mixture(x_t, torch.zeros(2, **DOUBLE)), -x_t)
    torch.testing.assert_close(mixture(x_t, torch.ones(2, **DOUBLE)), x_t - mean)
    for end, inside in ((0.0, 1e-9), (1.0, 1 - 1e-9)):
        at_end, near = (mixture(x_t, torch.full((2,), t, **DOUBLE)) for t in (end, inside))
        torch.testing.assert_close(near, at_end, rtol=0, atol=1e-7)


def test_far_points_stay_finite_and_follow_the_nearest_component():
    """Every density underflows there; logsumexp does not."""
    mixture = GaussianMixtureVelocity.ring(num_modes=4, radius=1.0, std=1e-4)
    x_t = torch.tensor([[50.0, 1.0], [-1.0, -300.0]], **DOUBLE)
    t = torch.tensor([0.0, 1e-6], **DOUBLE)
    assert mixture(x_t, t).isfinite().all()
    assert mixture.log_density(x_t, t).isfinite().all()
    clean = x_t[1:] - 1e-6 * mixture(x_t, t)[1:]
    alone = GaussianMixtureVelocity(torch.ones(1), mixture.means[3:], mixture.stds[3:])
    torch.testing.assert_close(clean, x_t[1:] - 1e-6 * alone(x_t[1:], t[1:]))


def test_velocity_keeps_the_dtype_and_computes_in_float64():
    mixture, x_t, t = mixture_of_five(), points(2, 3, 7).float(), torch.tensor([0.25, 0.5])
    v = mixture(x_t, t)
    assert v.dtype == torch.float32
    assert torch.equal(v, mixture(x_t.double(), t.double()).float())


# A lone Gaussian: exact transport


def test_the_flow_carries_noise_to_mean_plus_std_times_noise():
    gaussian, noise = lone_gaussian(), points(2, 3, 7)
    exact = gaussian.means + gaussian.stds * noise
    error = (heun(gaussian, noise, sampling_times(400)) - exact).abs().max()
    assert error < 1e-3
    one, zero = torch.ones(2, **DOUBLE), torch.zeros(2, **DOUBLE)
    torch.testing.assert_close(noise - gaussian(noise, one, r=zero), exact)


def test_flow_map_is_the_velocity_at_r_equal_t_and_composes():
    gaussian, x_t = lone_gaussian(), points(2, 3, 7)
    t, s, r = (torch.tensor(v, **DOUBLE) for v in ([0.9, 0.7], [0.5, 0.4], [0.2, 0.0]))
    torch.testing.assert_close(gaussian(x_t, t, r=t), gaussian(x_t, t))

    def jump(x, start, end):
        return x - (start - end)[:, None, None] * gaussian(x, start, r=end)

    torch.testing.assert_close(jump(jump(x_t, t, s), s, r), jump(x_t, t, r))
    torch.testing.assert_close(jump(jump(x_t, t, r), r, t), x_t)


def test_flow_map_needs_a_lone_component():
    mixture, x_t, t = mixture_of_five(), points(2, 3, 7), torch.ones(2, **DOUBLE)
    with pytest.raises(ValueError, match="lone Gaussian only, but 5 components"):
        mixture(x_t, t, r=t)
    with pytest.raises(ValueError, match="but 2 components"):
        mixture(x_t, t, labels(2, 1), r=t)
    alone = GaussianMixtureVelocity(torch.ones(1), mixture.means[2:3], mixture.stds[2:3])
    assert torch.equal(mixture(x_t, t, labels(2, 2), r=t / 2), alone(x_t, t, r=t / 2))


# Density and score


def test_log_density_equals_torch_distributions_at_every_time():
    mixture, x_t = mixture_of_five(), points(2, 3, 7)
    for t in (0.0, 0.35, 1.0):
        std = ((1 - t) ** 2 * mixture.stds**2 + t**2).sqrt()
        reference = MixtureSameFamily(
            Categorical(mixture.weights), Independent(Normal((1 - t) * mixture.means, std), 2)
        ).log_prob(x_t)
        torch.testing.assert_close(mixture.log_density(x_t, t), reference)
        torch.testing.assert_close(mixture.log_density(x_t, torch.full((2,), t, **DOUBLE)), reference)


@pytest.mark.parametrize("t", [0.0, 0.1, 0.6, 1.0])
def test_density_integrates_to_one(t):
    x = torch.linspace(-9, 9, 20001, **DOUBLE)[:, None]
    for condition in (None, ClassCondition(torch.zeros(len(x), dtype=torch.long), 2)):
        density = line_mixture().log_density(x, t, condition).exp()
        assert torch.trapezoid(density, x[:, 0]).item() == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("condition", [None, labels(1, 3)])
@pytest.mark.parametrize("times", [(0.0, 0.05), (0.3, 0.8), (0.999, 1.0)])
def test_score_is_the_gradient_of_log_density(times, condition):
    mixture, t = mixture_of_five(), torch.tensor(times, **DOUBLE)
    x_t = points(2, 3, 7).requires_grad_()
    (gradient,) = torch.autograd.grad(mixture.log_density(x_t, t, condition).sum(), x_t)
    torch.testing.assert_close(mixture.score(x_t, t, condition).detach(), gradient)


def test_velocity_from_score():
    mixture, x_t, t = mixture_of_five(), points(2, 3, 7), torch.tensor([0.2, 0.85], **DOUBLE)
    time = t[:, None, None]
    torch.testing.assert_close(mixture(x_t, t), -(x_t + time * mixture.score(x_t, t)) / (1 - time))


def test_gradients_flow_through_the_velocity():
    x_t = points(2, 3, 7).requires_grad_()
    t = torch.tensor([0.2, 0.85], **DOUBLE)
    assert torch.autograd.gradcheck(lambda x: mixture_of_five()(x, t, labels(1, 3)), x_t)


# Samples


def test_sample_moments_match():
    mixture, num = mixture_of_five(), 50_000
    x = mixture.sample(num, torch.Generator().manual_seed(0))
    assert x.shape == (num, 3, 7) and x.dtype == torch.float32
    mean = torch.einsum("k,k...->...", mixture.weights, mixture.means)
    second = torch.einsum("k,k...->...", mixture.weights, mixture.means**2 + mixture.stds**2)
    variance = second - mean**2
    assert ((x.double().mean(0) - mean).abs() / (variance / num).sqrt()).max() < 4.5
    torch.testing.assert_close(x.double().var(0), variance, rtol=0.04, atol=0)


def test_mean_log_density_of_samples_is_minus_the_entropy():
    mixture = line_mixture()
    grid = torch.linspace(-6, 6, 20001, **DOUBLE)[:, None]
    log_p = mixture.log_density(grid)
    negative_entropy = torch.trapezoid(log_p.exp() * log_p, grid[:, 0])
    log_p_samples = mixture.log_density(mixture.sample(50_000, torch.Generator().manual_seed(0)))
    assert log_p_samples.mean().item() == pytest.approx(negative_entropy.item(), abs=0.02)


def test_samples_follow_the_generator_and_the_class():
    ring = GaussianMixtureVelocity.ring(num_modes=8, radius=2.0, std=0.05, num_classes=4)
    asked = torch.arange(400) % 4
    first, again, other = (
        ring.sample(400, torch.Generator().manual_seed(seed), ClassCondition(asked, 4)) for seed in (0, 0, 1)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    nearest = torch.cdist(first.double(), ring.means).argmin(1)
    assert torch.equal(ring.classes[nearest], asked)
    assert len(nearest.unique()) == 8


# Classes


def test_dropped_class_is_the_full_mixture():
    mixture, x_t, t = mixture_of_five(), points(2, 3, 7), torch.tensor([0.2, 0.85], **DOUBLE)
    dropped = labels(0, 2).drop()
    assert torch.equal(mixture(x_t, t, dropped), mixture(x_t, t))
    assert torch.equal(mixture.score(x_t, t, dropped), mixture.score(x_t, t))
    assert torch.equal(mixture.log_density(x_t, t, dropped), mixture.log_density(x_t, t))
    draws = [mixture.sample(2, torch.Generator().manual_seed(0), c) for c in (None, dropped)]
    assert torch.equal(*draws)


def test_each_item_sees_only_its_own_class():
    mixture, x_t, t = mixture_of_five(), points(2, 3, 7), torch.tensor([0.2, 0.85], **DOUBLE)
    for row, (label, members) in enumerate(((0, [0, 4]), (1, [1, 3]))):
        weights = mixture.weights[members]
        alone = GaussianMixtureVelocity(weights / weights.sum(), mixture.means[members], mixture.stds[members])
        batch = labels(0, 1)
        assert batch.labels[row] == label
        torch.testing.assert_close(mixture(x_t, t, batch)[row], alone(x_t, t)[row])
        torch.testing.assert_close(mixture.log_density(x_t, t, batch)[row], alone.log_density(x_t, t)[row])


def test_class_densities_add_up_to_the_mixture():
    mixture, x_t = mixture_of_five(), points(2, 3, 7)
    shares = torch.stack([mixture.weights[mixture.classes == c].sum() for c in range(3)])
    by_class = torch.stack([mixture.log_density(x_t, 0.3, labels(c, c)) for c in range(3)])
    torch.testing.assert_close((shares.log()[:, None] + by_class).logsumexp(0), mixture.log_density(x_t, 0.3))


def test_a_mixture_without_classes_takes_only_the_null_label():
    ring, x_t, t = GaussianMixtureVelocity.ring(), points(2, 2), torch.full((2,), 0.5, **DOUBLE)
    assert ring.num_classes == 0
    assert torch.equal(ring(x_t, t, labels(0, 0, num_classes=0)), ring(x_t, t))
    with pytest.raises(ValueError, match="has 0 classes"):
        ring(x_t, t, labels(0, 1))


def test_ring_lies_on_its_circle():
    ring = GaussianMixtureVelocity.ring(num_modes=6, radius=1.5, std=0.2, num_classes=4)
    torch.testing.assert_close(ring.means.norm(dim=1), torch.full((6,), 1.5, **DOUBLE))
    torch.testing.assert_close(ring.means.sum(0), torch.zeros(2, **DOUBLE))
    assert ring.classes.tolist() == [0, 1, 2, 3, 0, 1]
    assert ring.num_classes == 4 and (ring.stds == 0.2).all()


# Errors


@pytest.mark.wrong_shapes
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": torch.tensor([0.5, 0.6])}, "sum of 1.1"),
        ({"weights": torch.tensor([1.5, -0.5])}, "smallest of -0.5"),
        ({"weights": torch.ones(2, 1) / 2}, r"weights must have shape \(k,\)"),
        ({"means": torch.zeros(3, 7)}, r"means must have shape \(2, …\)"),
        ({"means": torch.tensor([[0.0], [math.nan]]), "stds": torch.ones(2, 1)}, "means must be finite"),
        ({"stds": torch.ones(2)}, r"stds must have the shape of means, \(2, 7\)"),
        ({"stds": torch.zeros(2, 7)}, "stds must be positive and finite, got 0"),
        ({"classes": torch.tensor([0])}, r"one label per component, shape \(2,\)"),
        ({"classes": torch.tensor([0, 2])}, r"got the labels \[0, 2\]"),
    ],
)
def test_bad_parameters(change, message):
    good = {"weights": torch.ones(2) / 2, "means": torch.zeros(2, 7), "stds": torch.ones(2, 7)}
    assert GaussianMixtureVelocity(**good).num_classes == 0
    with pytest.raises(ValueError, match=message):
        GaussianMixtureVelocity(**good | change)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_modes": 0}, "num_modes must be at least 1, got 0"),
        ({"num_modes": 3, "num_classes": 4}, "num_classes must lie in 1 … 3"),
        ({"std": -1.0}, "stds must be positive"),
    ],
)
def test_bad_ring(arguments, message):
    with pytest.raises(ValueError, match=message):
        GaussianMixtureVelocity.ring(**arguments)


@pytest.mark.wrong_shapes
def test_bad_calls():
    mixture, x_t, t = mixture_of_five(), points(2, 3, 7), torch.full((2,), 0.5, **DOUBLE)
    with pytest.raises(ValueError, match=r"shape \(batch, 3, 7\), got shape \(2, 7, 3\)"):
        mixture(x_t.transpose(1, 2), t)
    with pytest.raises(ValueError, match=r"\[0, 1\], got 0.5 … 1.5"):
        mixture(x_t, torch.tensor([0.5, 1.5], **DOUBLE))
    with pytest.raises(ValueError, match=r"\[0, 1\], got nan"):
        mixture.log_density(x_t, math.nan)
    with pytest.raises(ValueError, match=r"one time per item"):
        mixture.score(x_t, t[:1])
    with pytest.raises(ValueError, match="has 3 classes, the condition was made for 4"):
        mixture(x_t, t, labels(0, 1, num_classes=4))
    with pytest.raises(ValueError, match="one label per sample, 2, got 1"):
        mixture(x_t, t, labels(0))
