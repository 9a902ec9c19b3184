"""The network for points: its two times, its classes, its start at zero, and that it can learn."""

import pytest
import torch

from diffusion_opt.flow import ClassCondition
from diffusion_opt.models import PointVelocity


def inputs(num: int = 16):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(num, 2, generator=generator), torch.rand(num, generator=generator)


def filled(**settings) -> PointVelocity:
    network = PointVelocity(**settings)
    torch.nn.init.normal_(network.layers[-1].weight, generator=torch.Generator().manual_seed(1))
    return network


def test_it_starts_as_the_zero_velocity_with_weights_of_the_seed_alone():
    x, t = inputs()
    torch.rand(3)  # the global state must not matter
    assert PointVelocity()(x, t).abs().max() == 0
    torch.testing.assert_close(PointVelocity(seed=3).layers[0].weight, PointVelocity(seed=3).layers[0].weight)
    assert not torch.equal(PointVelocity(seed=3).layers[0].weight, PointVelocity(seed=4).layers[0].weight)


def test_no_second_time_means_no_jump():
    x, t = inputs()
    network = filled(two_time=True)
    torch.testing.assert_close(network(x, t), network(x, t, r=t))
    assert not torch.allclose(network(x, t), network(x, t, r=0.5 * t))


def test_the_class_matters_and_the_null_label_is_one_of_them():
    x, t = inputs()
    network = filled(num_classes=3)
    condition = ClassCondition(torch.arange(16) % 3, 3)
    assert not torch.allclose(network(x, t, condition), network(x, t, condition.drop()))


def test_what_does_not_fit_is_refused():
    x, t = inputs()
    with pytest.raises(ValueError, match="two_time=True"):
        PointVelocity()(x, t, r=t)
    with pytest.raises(ValueError, match="3 classes, the condition 0"):
        PointVelocity(num_classes=3)(x, t)


def test_it_learns_a_velocity():
    x, t = inputs(256)
    network = PointVelocity(width=32)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    target = torch.stack([x[:, 1] * t, -x[:, 0]], dim=1)
    for _ in range(150):
        optimizer.zero_grad()
        loss = (network(x, t) - target).square().mean()
        loss.backward()
        optimizer.step()
    assert loss < 0.1 * target.square().mean()


def test_a_guided_network_takes_a_scale_and_only_that_one_does():
    x, t = inputs()
    network = filled(guided=True)
    assert not torch.allclose(network(x, t, guidance=t), network(x, t, guidance=2 * t))
    with pytest.raises(ValueError, match="guided=True: give"):
        network(x, t)
    with pytest.raises(ValueError, match="guided=False: drop"):
        filled()(x, t, guidance=t)


@pytest.mark.parametrize("slot", ["two_time", "guided"])
def test_a_network_with_a_slot_starts_as_the_one_without(slot):
    x, t = inputs()
    network = filled(num_classes=3, width=16, depth=2)
    condition = ClassCondition(torch.arange(16) % 3, 3)
    student = network.with_slot(**{slot: True})
    given = {"r": t / 2} if slot == "two_time" else {"guidance": 3 * t}
    torch.testing.assert_close(student(x, t, condition, **given), network(x, t, condition))
    torch.nn.init.normal_(student.layers[0].weight)
    more = {name: value / 2 for name, value in given.items()}
    assert not torch.allclose(student(x, t, condition, **given), student(x, t, condition, **more))
    with pytest.raises(ValueError, match="already"):
        student.with_slot(two_time=True)
