"""The straight path between data and noise, and the conversions along it.

Flow matching (Lipman et al. 2023, arXiv 2210.02747; Liu et al. 2023, arXiv 2209.03003) joins a data point x
and a noise point e by a straight line and learns its velocity:

    x_t = (1 - t) x + t e,      v = d x_t / d t = e - x,      t = 0 is data, t = 1 is noise.

This is the convention of FLUX, LTX and Wan, and of every file of this package. A network that predicts x or e
instead is converted here, at the border, and nowhere else:

    x = x_t - t v,      e = x_t + (1 - t) v.
"""

import torch
from jaxtyping import Float
from torch import Tensor


def expand_time(t: Float[Tensor, " b"], like: Float[Tensor, "b *s"]) -> Float[Tensor, "b *ones"]:
    """Reshape times (B,) to (B, 1, …, 1) so that they broadcast against `like` (B, …).

    Raises ValueError if `t` does not hold one time for each item of the batch.
    """
    if t.ndim != 1 or t.shape[0] != like.shape[0]:
        raise ValueError(f"t must have one time per item, shape ({like.shape[0]},), got shape {tuple(t.shape)}")
    return t.reshape(-1, *[1] * (like.ndim - 1))


def interpolate(
    x: Float[Tensor, "b *s"], noise: Float[Tensor, "b *s"], t: Float[Tensor, " b"]
) -> Float[Tensor, "b *s"]:
    """The point x_t = (1 - t) x + t e of the path, for times t (B,) in [0, 1]."""
    t = expand_time(t, x)
    return (1 - t) * x + t * noise


def velocity_target(x: Float[Tensor, "b *s"], noise: Float[Tensor, "b *s"]) -> Float[Tensor, "b *s"]:
    """The velocity e - x of the path: what a flow-matching network is trained to predict."""
    return noise - x


def clean_from_velocity(
    x_t: Float[Tensor, "b *s"], v: Float[Tensor, "b *s"], t: Float[Tensor, " b"]
) -> Float[Tensor, "b *s"]:
    """The clean prediction x = x_t - t v."""
    return x_t - expand_time(t, x_t) * v


def noise_from_velocity(
    x_t: Float[Tensor, "b *s"], v: Float[Tensor, "b *s"], t: Float[Tensor, " b"]
) -> Float[Tensor, "b *s"]:
    """The noise prediction e = x_t + (1 - t) v."""
    return x_t + (1 - expand_time(t, x_t)) * v


def velocity_from_clean(
    x_t: Float[Tensor, "b *s"], x: Float[Tensor, "b *s"], t: Float[Tensor, " b"]
) -> Float[Tensor, "b *s"]:
    """The velocity v = (x_t - x) / t of a clean prediction x.

    Raises ValueError if a time is 0: there x_t is x itself and says nothing about v.
    """
    if (t <= 0).any():
        raise ValueError(f"velocity from a clean prediction needs t > 0, got a smallest t of {t.min().item():g}")
    return (x_t - x) / expand_time(t, x_t)


def velocity_from_noise(
    x_t: Float[Tensor, "b *s"], noise: Float[Tensor, "b *s"], t: Float[Tensor, " b"]
) -> Float[Tensor, "b *s"]:
    """The velocity v = (e - x_t) / (1 - t) of a noise prediction e.

    Raises ValueError if a time is 1: there x_t is the noise itself and says nothing about v.
    """
    if (t >= 1).any():
        raise ValueError(f"velocity from a noise prediction needs t < 1, got a largest t of {t.max().item():g}")
    return (noise - x_t) / (1 - expand_time(t, x_t))


def randn(shape: tuple[int, ...], generator: torch.Generator) -> Float[Tensor, "..."]:
    """Standard normal noise from an explicit generator, on the generator's device (float32)."""
    return torch.randn(shape, generator=generator, device=generator.device)
