"""Samplers: theoretical order on even, shifted and jagged grids, cost, hooks, and the distribution they reach."""

import pytest
import torch
from torch import Tensor

from diffusion_opt.flow import (
    SAMPLERS,
    ClassCondition,
    GaussianMixtureVelocity,
    adams_bashforth2,
    euler,
    heun,
    sampling_times,
    shift_times,
)

ORDERS = {"euler": 1, "heun": 2, "adams_bashforth2": 2}
EVALUATIONS = {"euler": 1, "heun": 2, "adams_bashforth2": 1}
RING = GaussianMixtureVelocity.ring(num_modes=5, radius=1.0, std=0.4, num_classes=2)


def jagged(num_steps: int) -> Tensor:
    """Steps that alternate in length 1 : 3, so that a two-step method must know the step before."""
    lengths = torch.tensor([1.0, 3.0], dtype=torch.float64).repeat(num_steps)[:num_steps]
    falling = 1 - torch.cat([torch.zeros(1, dtype=torch.float64), lengths.cumsum(0)]) / lengths.sum()
    return falling


GRIDS = {"even": sampling_times, "shifted": lambda n: sampling_times(n, shift=3.0), "jagged": jagged}


class Counter:
    def __init__(self, model) -> None:
        self.model, self.times = model, []

    def __call__(self, x_t, t, condition=None, r=None):
        self.times.append(t[0].item())
        return self.model(x_t, t, condition)


def start() -> Tensor:
    return torch.randn(24, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def labels() -> ClassCondition:
    return ClassCondition(torch.arange(24) % 3, 2)


def runge_kutta4(x: Tensor, num_steps: int) -> Tensor:
    def slope(x, t):
        return -RING(x, torch.full((24,), t, dtype=torch.float64), labels())

    h = 1 / num_steps
    for i in range(num_steps):
        t = 1 - i * h
        k1 = slope(x, t)
        k2 = slope(x + h / 2 * k1, t - h / 2)
        k3 = slope(x + h / 2 * k2, t - h / 2)
        k4 = slope(x + h * k3, max(t - h, 0.0))
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return x


@pytest.fixture(scope="module")
def exact() -> Tensor:
    """The flow's end by the classical Runge-Kutta method of order 4, fine enough that halving its step is no news."""
    coarse, fine = (runge_kutta4(start(), num_steps) for num_steps in (50, 100))
    torch.testing.assert_close(fine, coarse, rtol=0, atol=1e-6)
    return fine


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", SAMPLERS)
def test_order_of_convergence(name, grid, exact):
    steps = torch.tensor([24, 34, 48, 68, 96])
    errors = torch.stack(
        [(SAMPLERS[name](RING, start(), GRIDS[grid](int(n)), labels()) - exact).square().mean().sqrt() for n in steps]
    )
    log_n, log_error = steps.double().log(), errors.log()
    log_n, log_error = log_n - log_n.mean(), log_error - log_error.mean()
    order = -(log_n * log_error).sum() / log_n.square().sum()
    assert order.item() == pytest.approx(ORDERS[name], abs=0.15 * ORDERS[name])


@pytest.mark.parametrize("name", SAMPLERS)
def test_constant_velocity_is_solved_exactly_by_one_step(name):
    target = torch.tensor([[2.0, -1.0]], dtype=torch.float64)
    x = SAMPLERS[name](lambda x_t, t, condition: target.expand_as(x_t), start(), sampling_times(1))
    torch.testing.assert_close(x, start() - target)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("sampler", [heun, adams_bashforth2])
def test_velocity_linear_in_time_is_solved_by_second_order(sampler, grid):
    """dx/dt = t gives x_0 = x_1 - 1/2: exact for Heun; for Adams-Bashforth but for its first Euler step."""
    times = GRIDS[grid](7)
    x = sampler(lambda x_t, t, condition: t[:, None].expand_as(x_t), start(), times)
    first = times[0] - times[1]
    bias = 0 if sampler is heun else -(first**2) / 2
    torch.testing.assert_close(x, start() - 0.5 + bias)


@pytest.mark.parametrize("name", SAMPLERS)
def test_evaluations_and_times_visited(name):
    counter, times = Counter(RING), sampling_times(6, shift=2.0)
    SAMPLERS[name](counter, start(), times, labels())
    assert len(counter.times) == 6 * EVALUATIONS[name]
    assert counter.times[:: EVALUATIONS[name]] == times[:-1].tolist()
    assert counter.times[-1] == (0 if name == "heun" else times[-2])


@pytest.mark.parametrize("name", SAMPLERS)
def test_on_step_sees_each_state_and_progress_changes_nothing(name):
    seen = []
    times = sampling_times(4)
    x = SAMPLERS[name](RING, start(), times, labels(), on_step=lambda *step: seen.append(step))
    assert [i for i, _, _ in seen] == [0, 1, 2, 3]
    assert torch.equal(seen[0][1], start())
    torch.testing.assert_close(seen[2][2], RING(seen[2][1], torch.full((24,), times[2]), labels()))
    assert torch.equal(x, SAMPLERS[name](RING, start(), times, labels(), progress=True))


def test_first_adams_bashforth_step_is_euler():
    assert torch.equal(adams_bashforth2(RING, start(), sampling_times(1)), euler(RING, start(), sampling_times(1)))


@pytest.mark.parametrize("name", SAMPLERS)
def test_condition_and_dtype_are_kept(name):
    x = start().float()
    asked, dropped = (SAMPLERS[name](RING, x, sampling_times(5), c) for c in (labels(), labels().drop()))
    assert asked.dtype == torch.float32
    assert torch.equal(dropped, SAMPLERS[name](RING, x, sampling_times(5)))
    assert not torch.allclose(asked, dropped, atol=1e-2)


@pytest.mark.parametrize(
    "times", [[0.0, 1.0], [1.0], [1.0, 0.5, 0.5, 0.0], [1.0, float("nan"), 0.0], [1000.0, 500.0, 0.0], [1.0, -0.1]]
)
@pytest.mark.parametrize("name", SAMPLERS)
def test_times_must_fall(name, times):
    with pytest.raises(ValueError, match="times must fall"):
        SAMPLERS[name](RING, start(), torch.tensor(times))


def sliced_wasserstein(a: Tensor, b: Tensor) -> float:
    """Mean absolute difference of sorted projections on 32 directions of the plane."""
    angle = torch.arange(32) * torch.pi / 32
    directions = torch.stack([angle.cos(), angle.sin()]).to(a.dtype)
    return ((a @ directions).sort(0).values - (b @ directions).sort(0).values).abs().mean().item()


@pytest.mark.parametrize(("name", "num_steps"), [("euler", 100), ("heun", 30), ("adams_bashforth2", 40)])
def test_samplers_reach_the_distribution(name, num_steps):
    """As near to exact samples as exact samples are to each other; two steps are not."""
    ring, num = GaussianMixtureVelocity.ring(num_modes=5, radius=1.0, std=0.1), 3000
    draws = [ring.sample(num, torch.Generator().manual_seed(seed)) for seed in range(7)]
    floor = max(sliced_wasserstein(draws[0], other) for other in draws[1:])
    noise = torch.randn(num, 2, generator=torch.Generator().manual_seed(9))
    grid = shift_times(sampling_times(num_steps), 0.7)
    assert sliced_wasserstein(SAMPLERS[name](ring, noise, grid), draws[0]) < 1.5 * floor
    assert sliced_wasserstein(SAMPLERS[name](ring, noise, sampling_times(2)), draws[0]) > 2.5 * floor
