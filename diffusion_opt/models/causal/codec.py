"""An autoencoder without training: principal components of tubes of 2 frames x 8 x 8 pixels.

A tube is 2 x 3 x 8 x 8 = 384 numbers. The eigenvectors u_i of their covariance with the largest eigenvalues s_i^2 give
latents that lose least (Pearson 1901), in closed form:

    z_i = u_i . (x - mean) / sqrt(s_i c),      c such that the mean variance of z is 1

The square root of s_i instead of s_i itself flattens the variances half: full whitening would ask a model to spend as
much on what hardly shows. One latent is a token, so a chunk of two frames of 64x64 pixels is 64 tokens.
"""

from collections.abc import Sequence

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from jaxtyping import Float
from torch import Tensor


class TubeAutoencoder(ModelMixin, ConfigMixin):
    """Clips (b, f, 3, h, w) <-> latents (b, k, channels, 1, h / 8, w / 8) of k = f / 2 chunks."""

    @register_to_config
    def __init__(self, latent_channels: int = 96, tube: Sequence[int] = (2, 8, 8)) -> None:
        super().__init__()
        numbers = 3 * tube[0] * tube[1] * tube[2]
        if not 0 < latent_channels <= numbers:
            raise ValueError(f"a tube of {numbers} numbers has 1 … {numbers} components, got {latent_channels}")
        self.register_buffer("mean", torch.zeros(numbers))
        self.register_buffer("basis", torch.eye(numbers)[:, :latent_channels].clone())
        self.register_buffer("scale", torch.ones(latent_channels))
        self.register_buffer("kept", torch.ones(()))  # share of the variance

    def tubes(self, frames: Float[Tensor, "b f 3 h w"]) -> Float[Tensor, "b k y x n"]:
        """Cut a clip into tubes. Raises ValueError for sizes that are no multiple of one."""
        depth, height, width = self.config.tube
        if any(size % part for size, part in zip(frames.shape[1::2], (depth, height), strict=False)) or (
            frames.shape[-1] % width or frames.shape[-2] % height
        ):
            raise ValueError(
                f"clips are (b, frames, 3, height, width) in multiples of {depth} frames and {height}x{width} pixels, "
                f"got {tuple(frames.shape)}"
            )
        cut = frames.unflatten(1, (-1, depth)).unflatten(-2, (-1, height)).unflatten(-1, (-1, width))
        return cut.permute(0, 1, 4, 6, 2, 3, 5, 7).flatten(4)

    def fit(self, frames: Float[Tensor, "b f 3 h w"]) -> "TubeAutoencoder":
        """Take mean and components from clips."""
        tubes = self.tubes(frames).flatten(0, 3).double()
        mean = tubes.mean(0)
        values, vectors = torch.linalg.eigh((tubes - mean).T.cov())
        values, vectors = values.flip(0).clamp(min=1e-10), vectors.flip(1)
        top = values[: self.config.latent_channels]
        scale = top.sqrt().sqrt()
        self.mean.copy_(mean)
        self.basis.copy_(vectors[:, : self.config.latent_channels])
        self.scale.copy_(scale * (top / scale.square()).mean().sqrt())
        self.kept.copy_(top.sum() / values.sum())
        return self

    def encode(self, frames: Float[Tensor, "b f 3 h w"]) -> Float[Tensor, "b k c 1 y x"]:
        z = (self.tubes(frames) - self.mean) @ self.basis / self.scale
        return z.permute(0, 1, 4, 2, 3)[:, :, :, None].contiguous()

    def decode(self, z: Float[Tensor, "b k c 1 y x"]) -> Float[Tensor, "b f 3 h w"]:
        """The clip whose dropped components are those of the mean."""
        depth, height, width = self.config.tube
        tubes = (z[:, :, :, 0].permute(0, 1, 3, 4, 2) * self.scale) @ self.basis.T + self.mean
        cut = tubes.unflatten(4, (depth, 3, height, width)).permute(0, 1, 4, 5, 2, 6, 3, 7)
        return cut.flatten(6, 7).flatten(4, 5).flatten(1, 2)
