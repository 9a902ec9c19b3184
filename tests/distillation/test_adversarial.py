"""Adversarial terms by hand, features through hooks, and a student that finds its way by them."""

import math
from pathlib import Path

import pytest
import torch
from distillation.planes import fresh_head, points_of
from small_pipelines import small_pipeline
from torch import nn

from diffusion_opt.distillation.distribution import (
    AdversarialDistillation,
    FeatureHeads,
    GanSettings,
    approximate_r1,
    captured,
    discriminator_loss,
    feature_layers,
    generator_loss,
)
from diffusion_opt.distillation.distribution.adversarial import critic_terms, frozen
from diffusion_opt.flow import ClassCondition, GaussianMixtureVelocity, interpolate
from diffusion_opt.models import PointVelocity, velocity_model
from diffusion_opt.subjects import Classes
from diffusion_opt.training import TrainConfig, train

RING = GaussianMixtureVelocity.ring(num_modes=4, radius=2.0, std=0.3)


def test_losses_by_hand() -> None:
    real, fake = torch.tensor([[0.0], [math.log(3)]]), torch.tensor([[0.0], [-math.log(3)]])
    assert generator_loss(fake).item() == pytest.approx((math.log(2) + math.log(4)) / 2)
    assert discriminator_loss(real, fake).item() == pytest.approx(math.log(2) + math.log(4 / 3))
    assert approximate_r1(real, fake).item() == pytest.approx((2 * math.log(3)) ** 2 / 2)


def test_the_best_logit_is_the_log_ratio_of_densities() -> None:
    """Over three outcomes with known probabilities the loss is stationary there."""
    p, q = torch.tensor([0.2, 0.5, 0.3]), torch.tensor([0.6, 0.1, 0.3])
    logit = (p / q).log().requires_grad_()
    loss = (q * nn.functional.softplus(logit)).sum() + (p * nn.functional.softplus(-logit)).sum()
    assert torch.autograd.grad(loss, logit)[0].abs().max() < 1e-7
    index = torch.tensor([0, 0, 1, 1, 1, 1, 1, 2, 2, 2]), torch.tensor([0, 0, 0, 0, 0, 0, 1, 2, 2, 2])  # exact shares
    assert discriminator_loss(logit[index[0]][:, None], logit[index[1]][:, None]).item() == pytest.approx(loss.item())


def test_r1_compares_the_noisy_real_picture_with_one_a_little_noisier_at_the_same_time() -> None:
    """For a linear logit a . x it is s^2 |a|^2; both calls see the same t, and points s n apart."""
    slope, calls = torch.tensor([0.5, -2.0]), []

    def logits(x_t, t, condition):
        calls.append((x_t, t))
        return (x_t @ slope)[:, None]

    real, t, num = torch.randn(20_000, 2), torch.rand(20_000), 20_000
    settings = GanSettings(critic_weight=0.5, r1_weight=3.0, r1_noise=0.2)
    terms = critic_terms(logits, real, None, torch.zeros(num, 1), t, settings, torch.Generator().manual_seed(1))
    (real_t, first), (nearby, second) = calls
    assert first is t and second is t
    generator = torch.Generator().manual_seed(1)
    torch.testing.assert_close(real_t, interpolate(real, torch.randn(num, 2, generator=generator), t))
    torch.testing.assert_close(nearby - real_t, 0.2 * torch.randn(num, 2, generator=generator), rtol=0, atol=1e-6)
    assert terms["r1"].item() == pytest.approx(0.04 * 4.25, rel=0.05)
    torch.testing.assert_close(terms["loss"], 0.5 * (terms["gan"] + 3 * terms["r1"]))


def test_features_come_from_one_pass_and_the_hooks_go() -> None:
    network = PointVelocity(width=16)
    with torch.no_grad():
        network.layers[-1].weight.normal_()
    layers = feature_layers(network)
    assert layers == ("layers.3", "layers.5")
    x_t, t = torch.randn(5, 2), torch.rand(5)
    with captured(network, layers) as features:
        velocity = network(x_t, t)
    assert [feature.shape for feature in features] == [(5, 16), (5, 16)]
    assert torch.equal(network.layers[-1](features[1]), velocity)
    network(x_t, t)
    assert len(features) == 2
    assert not any(module._forward_hooks for module in network.modules())


def test_heads_fit_a_transformer_and_see_every_stream_of_its_blocks() -> None:
    network = velocity_model(small_pipeline())
    layers = feature_layers(network)
    assert all(name.startswith("transformer.") and "blocks" in name for name in layers)
    head = FeatureHeads.of(network, (1, 16, 16), Classes(10), ("transformer.transformer_blocks.0", *layers))
    assert len(head.heads) > len(layers) + 1  # the first block returns text and image
    x_t = torch.randn(3, 1, 16, 16, requires_grad=True)
    with frozen(network, head), captured(network, head.layers) as features:
        network(x_t, torch.rand(3), ClassCondition(torch.arange(3), 10))
        logits = head(features)
    assert logits.shape == (3, len(head.heads))
    logits.sum().backward()
    assert x_t.grad.abs().max() > 0
    assert all(weight.grad is None and weight.requires_grad for weight in (*network.parameters(), *head.parameters()))


def test_heads_depend_on_their_seed_alone() -> None:
    one, two = fresh_head(), fresh_head()
    torch.randn(3)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_layers_that_do_not_exist_are_named() -> None:
    with (
        pytest.raises(ValueError, match=r"PointVelocity has no layers \['layers.99'\]"),
        captured(PointVelocity(), ("layers.99",)),
    ):
        pass
    with pytest.raises(ValueError, match="Linear has no list of blocks"):
        feature_layers(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="2 heads need as many features, got 1"):
        fresh_head()([torch.zeros(3, 32)])


def method(**options: object) -> AdversarialDistillation:
    """Against features of an untrained network: random features tell points apart well enough."""
    network = PointVelocity(width=64, seed=7)
    head = FeatureHeads.of(network, (2,))
    student = PointVelocity(width=64)
    given = {"network": network, "head": head, "data": points_of(RING, 2000), "fake_updates": 1} | options
    return AdversarialDistillation(student=student, sample_shape=(2,), **given)


def test_each_turn_moves_its_own_weights() -> None:
    made = method()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        made.student.layers[-1].bias.fill_(0.1)
    made.losses(generator, 16, "discriminator")["loss"].backward()
    assert all(weight.grad is None for weight in (*made.network.parameters(), *made.student.parameters()))
    assert made.head.heads[0][1].weight.grad.abs().max() > 0
    made.head.zero_grad()
    made.losses(generator, 16, "student")["loss"].backward()
    assert all(weight.grad is None for weight in (*made.network.parameters(), *made.head.parameters()))
    assert made.student.layers[-1].bias.grad.abs().max() > 0


def test_the_teacher_s_pull_is_that_of_the_distance() -> None:
    made = method(teacher=RING, teacher_weight=2.0)
    losses = made.losses(torch.Generator().manual_seed(0), 16, "student")
    torch.testing.assert_close(losses["loss"], losses["gan"] + 2 * losses["teacher_distance"])
    assert losses["teacher_distance"].item() > 0


@pytest.mark.slow
def test_a_student_comes_to_the_data_by_the_discriminator_alone(tmp_path: Path) -> None:
    """The student starts as standard noise; the modes lie on a circle of radius 2."""
    config = TrainConfig(steps=800, batch_size=128, learning_rate=2e-3, ema_decay=0.98, betas=(0.0, 0.99))
    student = train(method(), config, tmp_path, progress=False).ema
    noise = torch.randn(2000, 2, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        radius = (noise - student(noise, torch.ones(2000))).norm(dim=1)
    assert (noise.norm(dim=1) - 2).abs().mean() > 0.8
    assert (radius - 2).abs().mean() < 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": None}, "a discriminator needs real pictures"),
        ({"teacher": RING}, "go together, got a weight of 0"),
        ({"teacher_weight": 1.0}, "go together, got a weight of 1"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        method(**options)


def test_bad_weights_are_refused() -> None:
    with pytest.raises(ValueError, match="weights must not be negative"):
        GanSettings(student_weight=-1.0)
    with pytest.raises(ValueError, match="r1_noise must be positive"):
        GanSettings(r1_noise=0.0)
