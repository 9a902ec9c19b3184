"""Flow matching: the loss is what it says, the class is dropped as often as asked, and training finds the optimum."""

import pytest
import torch
from torch import Tensor, nn

from diffusion_opt.datasets import FASHION_CLASSES, ImageData
from diffusion_opt.distillation.flow_matching import FlowMatching
from diffusion_opt.flow import ClassCondition, GaussianMixtureVelocity
from diffusion_opt.training import TrainConfig, step_generator, train

CLASSES = ("left", "right")


def pair_of_blobs() -> GaussianMixtureVelocity:
    """Two narrow Gaussians, one a class, over "images" of shape (1, 1, 2)."""
    means = torch.tensor([[-1.5, 0.0], [1.0, 1.0]])[:, None, None]
    return GaussianMixtureVelocity(torch.tensor([0.5, 0.5]), means, torch.full((2, 1, 1, 2), 0.3), torch.arange(2))


def blob_images(num: int) -> ImageData:
    labels = torch.arange(num) % 2
    images = pair_of_blobs().sample(num, torch.Generator().manual_seed(0), ClassCondition(labels, 2))
    return ImageData(images, labels, CLASSES)


class Recorder(nn.Module):
    """A velocity model that notes what it is asked and answers scale times x_t."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.calls = nn.Parameter(torch.tensor(0.5)), []

    def forward(self, x_t: Tensor, t: Tensor, condition: ClassCondition) -> Tensor:
        self.calls.append((x_t, t, condition))
        return self.scale * x_t


def test_loss_is_the_mean_squared_error_of_the_velocity():
    """Seven pictures of 3 channels, 4 x 5, batch 6, written out by hand in the order of the draws."""
    images = torch.randn(7, 3, 4, 5, generator=torch.Generator().manual_seed(1))
    data = ImageData(images, torch.arange(7), FASHION_CLASSES)
    model = Recorder()
    losses = FlowMatching(model, data).losses(step_generator(3, 4), 6)

    generator = step_generator(3, 4)
    index = torch.randint(7, (6,), generator=generator)
    dropped = torch.rand(6, generator=generator) < 0.1
    t = torch.randn(6, generator=generator).sigmoid()
    noise = torch.randn(6, 3, 4, 5, generator=generator)
    x_t = torch.stack([(1 - t[i]) * images[index[i]] + t[i] * noise[i] for i in range(6)])
    expected = sum(float((0.5 * x_t[i] - (noise[i] - images[index[i]])).square().sum()) for i in range(6)) / (6 * 60)

    assert losses.keys() == {"loss"} and losses["loss"].item() == pytest.approx(expected, rel=1e-5)
    ((seen_x, seen_t, condition),) = model.calls
    torch.testing.assert_close(seen_x, x_t)
    torch.testing.assert_close(seen_t, t)
    assert condition.labels.tolist() == torch.where(dropped, 10, index).tolist() and condition.num_classes == 10


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_share_of_samples_without_their_class(share):
    model = Recorder()
    FlowMatching(model, blob_images(10), drop_condition=share).losses(step_generator(0, 0), 20_000)
    condition = model.calls[0][2]
    null = (condition.labels == 2).float().mean().item()
    assert null == pytest.approx(share, abs=4 * (share * (1 - share) / 20_000) ** 0.5)
    if share < 1:
        assert condition.labels[condition.labels < 2].float().mean().item() == pytest.approx(0.5, abs=0.03)


def test_every_picture_is_drawn_with_its_own_label():
    data = blob_images(10)
    data = ImageData(data.labels.float().reshape(10, 1, 1, 1).expand(-1, 1, 1, 2), data.labels, CLASSES)
    model = Recorder()
    FlowMatching(model, data, drop_condition=0.0).losses(step_generator(0, 0), 64)
    x_t, t, condition = model.calls[0]
    noise = (x_t - (1 - t)[:, None, None, None] * condition.labels[:, None, None, None]) / t[:, None, None, None]
    assert noise.mean().abs() < 0.3 and noise.std().item() == pytest.approx(1.0, abs=0.2)


class Mlp(nn.Module):
    """A small network of (x_t, t, class) on points of the plane."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2 + 1 + 3, 48), nn.SiLU(), nn.Linear(48, 48), nn.SiLU(), nn.Linear(48, 2))

    def forward(self, x_t: Tensor, t: Tensor, condition: ClassCondition) -> Tensor:
        classes = nn.functional.one_hot(condition.labels, 3).float()
        return self.net(torch.cat([x_t.flatten(1), t[:, None], classes], dim=1)).reshape(x_t.shape)


class Exact(nn.Module):
    """The closed-form velocity: no model has a lower expected loss."""

    def forward(self, x_t: Tensor, t: Tensor, condition: ClassCondition) -> Tensor:
        return pair_of_blobs()(x_t, t, condition)


def test_training_falls_to_the_irreducible_loss_of_the_mixture_and_not_below(tmp_path):
    data = blob_images(20_000)
    distiller = FlowMatching(Mlp(), data)

    def expected_loss(model: nn.Module) -> float:
        with torch.no_grad():
            losses = [FlowMatching(model, data).losses(step_generator(99, step), 5000)["loss"] for step in range(10)]
        return torch.stack(losses).mean().item()

    floor, before = expected_loss(Exact()), expected_loss(distiller.model)
    config = TrainConfig(steps=2000, batch_size=256, learning_rate=5e-3, warmup_steps=20, ema_decay=0.98)
    result = train(distiller, config, tmp_path, progress=False)
    after = expected_loss(result.ema)
    assert before > 1.5 * floor
    assert floor < after < 1.05 * floor
