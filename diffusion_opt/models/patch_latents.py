"""The best linear autoencoder of patches, in closed form, and the same numbers inside the stock `AutoencoderKLFlux2`.

A patch of 8 x 8 pixels in three colors is a vector of 192 numbers. Principal component analysis gives the K directions
that keep most of its variance (Pearson 1901; Eckart & Young 1936): no linear encoder with K channels is better.

    p = unfold(picture)                    z = V^T (p - mean) / scale                    p ~ mean + scale V z

A convolutional encoder learns such latents slowly, so here it is not trained: `put_into` writes the map into the
weights of diffusers' encoder. Strided convolutions fold 2 x 2 cells into channels, 3 -> 12 -> 48 -> K, and residual
branches are zero. Two layers stand in the way, a group norm and a SiLU, and both are passed exactly in the limit:

    silu(a) - silu(-a) = a                 each channel is carried twice, with either sign
    norm(s x) -> s x / sqrt(eps)           for small s; (x, -x) has mean zero, and var(s x) << eps leaves x linear

The error of the second is var(s x) / (2 eps), about 1e-7 at s = 2^-24, which two layers share, because a half-precision
number can hold 2^-12 in full. What remains to be trained is the
decoder, which sees that a line goes on in the next patch and so exceeds the linear one.

The transformer sees packed latents, 2 x 2 cells in one token of 4 K numbers, normalized by `vae.bn` as in FLUX.2. The
mean there is that of the data. The deviation is the square root of the data's, with one common factor that makes the
whole unit variance: full whitening would give the faint components, which are fine detail, as large a part in noise and
loss as the strong ones, which are the picture.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline
from jaxtyping import Float, Integer
from torch import Tensor, nn
from torch.nn import functional as F

PATCH = 8  # pixels a side
COLORS = 3
SHRINK = 2.0**-12  # of each of two layers: the group norm sees 2^-24, far below the square root of its eps, 1e-3
_BATCH = 256  # pictures at a time


@dataclass(frozen=True)
class PatchPCA:
    """Pictures (B, 3, H, W) in [-1, 1] <-> latents (B, K, H/8, W/8) of unit variance over all channels together."""

    mean: Float[Tensor, " d"]  # of a patch, d = 192, in the order of `pixel_unshuffle`: color, row, column
    directions: Float[Tensor, "d k"]  # orthonormal columns, the strongest first
    scale: float

    @property
    def channels(self) -> int:
        return self.directions.shape[1]

    def to(self, device: torch.device | str) -> "PatchPCA":
        """The same map on a device."""
        return PatchPCA(self.mean.to(device), self.directions.to(device), self.scale)

    def encode(self, x: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b k i j"]:
        patches = F.pixel_unshuffle(x, PATCH).movedim(1, -1) - self.mean
        return (patches @ self.directions / self.scale).movedim(-1, 1)

    def decode(self, z: Float[Tensor, "b k i j"]) -> Float[Tensor, "b 3 h w"]:
        patches = z.movedim(1, -1) @ self.directions.T * self.scale + self.mean
        return F.pixel_shuffle(patches.movedim(-1, 1), PATCH)


def pixels(pictures: Integer[Tensor, "*b 3 h w"]) -> Float[Tensor, "*b 3 h w"]:
    """Bytes 0 … 255 as numbers in [-1, 1]."""
    return pictures.float() / 127.5 - 1


def batches(pictures: Integer[Tensor, "n 3 h w"]) -> Iterator[Float[Tensor, "b 3 h w"]]:
    """All pictures as numbers, some at a time."""
    for some in pictures.split(_BATCH):
        yield pixels(some)


def fit(pictures: Integer[Tensor, "n 3 h w"], channels: int) -> PatchPCA:
    """The principal components of all patches of the pictures, summed in double precision.

    Raises ValueError for sizes that are no multiple of the patch, and more channels than a patch has numbers.
    """
    size = COLORS * PATCH**2
    if not 1 <= channels <= size:
        raise ValueError(f"a patch of {PATCH} x {PATCH} pixels has {size} numbers: 1 … {size} channels, got {channels}")
    if pictures.shape[-1] % PATCH or pictures.shape[-2] % PATCH:
        raise ValueError(f"height and width must be multiples of {PATCH}, got {tuple(pictures.shape[-2:])}")
    count, total, products = 0, torch.zeros(size, dtype=torch.float64), torch.zeros(size, size, dtype=torch.float64)
    for x in batches(pictures):
        patches = F.pixel_unshuffle(x, PATCH).movedim(1, -1).flatten(0, -2)
        count += len(patches)
        total += patches.sum(0).double()
        products += (patches.T @ patches).double()
    mean = total / count
    values, vectors = torch.linalg.eigh(products / count - mean.outer(mean))
    directions = vectors.flip(1)[:, :channels]
    signs = directions.sum(0).sign()  # an eigenvector's sign is free: fixed, so that all machines agree
    scale = (values.flip(0)[:channels].clamp_min(0).mean()).sqrt().item()
    return PatchPCA(mean.float(), (directions * torch.where(signs == 0, 1.0, signs)).float().contiguous(), scale)


def packed(latents: Float[Tensor, "b k i j"]) -> Float[Tensor, "b c h w"]:
    """2 x 2 cells of latents as one of 4 K channels, in FLUX.2's order."""
    return Flux2KleinPipeline._patchify_latents(latents)


def statistics(pca: PatchPCA, pictures: Integer[Tensor, "n 3 h w"]) -> tuple[Float[Tensor, " c"], Float[Tensor, " c"]]:
    """Mean and tempered variance (4 K,) of packed latents for `vae.bn`: see the top of this file."""
    width, count = 4 * pca.channels, 0
    total, squares = torch.zeros(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64)
    for x in batches(pictures):
        rows = packed(pca.encode(x)).movedim(1, -1).flatten(0, -2).double()
        count, total, squares = count + len(rows), total + rows.sum(0), squares + rows.square().sum(0)
    mean = total / count
    variance = (squares / count - mean.square()).clamp_min(1e-6)
    deviation = variance.sqrt()  # the square root of the deviation is divided by; what is left has variance `deviation`
    return mean.float(), (deviation * deviation.mean()).float()


def encoder_widths(channels: int) -> tuple[int, int, int, int]:
    """`block_out_channels` that `put_into` needs: 48 numbers of 4 x 4 pixels, then each latent twice."""
    width = max(2 * channels, 16 * COLORS)
    return (4 * COLORS, 16 * COLORS, width, width)


@torch.no_grad()
def put_into(vae: AutoencoderKLFlux2, pca: PatchPCA) -> None:
    """Make the encoder of a stock autoencoder this linear map; its log-variance is -30, so a sample is the mean.

    Raises ValueError for an autoencoder of other widths than `encoder_widths` says, or without `quant_conv`.
    """
    widths, encoder = encoder_widths(pca.channels), vae.encoder
    if tuple(vae.config.block_out_channels) != widths or vae.quant_conv is None:
        raise ValueError(
            f"{pca.channels} linear latents need block_out_channels={widths} and a quant_conv, "
            f"got {tuple(vae.config.block_out_channels)}"
        )
    for module in (encoder, vae.quant_conv):
        for parameter in module.parameters():
            parameter.zero_()
    _identity(encoder.conv_in, SHRINK)
    for block in encoder.down_blocks:
        for resnet in block.resnets:
            if resnet.conv_shortcut is not None:
                _identity(resnet.conv_shortcut)
    _fold(encoder.down_blocks[0].downsamplers[0].conv, COLORS, SHRINK)
    _fold(encoder.down_blocks[1].downsamplers[0].conv, 4 * COLORS)
    _project(encoder.down_blocks[2].downsamplers[0].conv, pca)
    encoder.conv_norm_out.weight.fill_(encoder.conv_norm_out.eps**0.5 / SHRINK**2)
    encoder.conv_out.bias[: pca.channels] = -pca.mean @ pca.directions / pca.scale
    for channel in range(pca.channels):
        encoder.conv_out.weight[channel, 2 * channel : 2 * channel + 2, 1, 1] = torch.tensor([1.0, -1.0])
    vae.quant_conv.weight[: pca.channels, : pca.channels, 0, 0] = torch.eye(pca.channels)
    vae.quant_conv.bias[pca.channels :] = -30.0


@torch.no_grad()
def taken_from(vae: AutoencoderKLFlux2) -> PatchPCA:
    """The linear map that `put_into` wrote into an encoder, whatever has trained on it since.

    Its mean is the part of the original that latents can tell, so `encode` is the same and `decode` nearly.
    """
    conv, channels = vae.encoder.down_blocks[2].downsamplers[0].conv, vae.config.latent_channels
    directions = torch.zeros(COLORS * PATCH**2, channels)
    for row in range(2):
        for column in range(2):
            rows = _sources(row, column)
            directions[rows] = conv.weight[0 : 2 * channels : 2, : len(rows), row, column].T.float()
    scale = 1 / directions.norm(dim=0).mean().item()
    directions = directions * scale
    offset = -vae.encoder.conv_out.bias[:channels].float() * scale
    return PatchPCA(torch.linalg.pinv(directions).T @ offset, directions, scale)


def _identity(conv: nn.Conv2d, factor: float = 1.0) -> None:
    """The first channels through, at the center of the kernel."""
    center = conv.kernel_size[0] // 2
    for channel in range(min(conv.in_channels, conv.out_channels)):
        conv.weight[channel, channel, center, center] = factor


def _fold(conv: nn.Conv2d, colors: int, factor: float = 1.0) -> None:
    """2 x 2 cells of `colors` channels into 4 `colors` channels, as `pixel_unshuffle` orders them."""
    for channel in range(4 * colors):
        color, place = divmod(channel, 4)
        conv.weight[channel, color, place // 2, place % 2] = factor


def _project(conv: nn.Conv2d, pca: PatchPCA) -> None:
    """Fold for the third time and project on the components, each with both signs."""
    for row in range(2):
        for column in range(2):
            rows = _sources(row, column)
            part = pca.directions[rows].T / pca.scale  # (k, 48)
            conv.weight[0 : 2 * pca.channels : 2, : len(rows), row, column] = part
            conv.weight[1 : 2 * pca.channels : 2, : len(rows), row, column] = -part


def _sources(row: int, column: int) -> list[int]:
    """For each of the 48 channels that were folded twice: which number of an 8 x 8 patch it is in this 2 x 2 cell."""
    found = []
    for channel in range(16 * COLORS):
        rest, inner = divmod(channel, 4)  # the second fold: bit of the middle place
        color, first = divmod(rest, 4)  # the first fold: bit of the finest place
        y = 4 * row + 2 * (inner // 2) + first // 2
        x = 4 * column + 2 * (inner % 2) + first % 2
        found.append(color * PATCH**2 + y * PATCH + x)
    return found
