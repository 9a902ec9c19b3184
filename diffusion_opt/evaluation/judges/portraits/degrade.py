"""What goes wrong with pictures on their way through a model, as augmentation and as a test of the reader.

A reader trained on exact renders alone reads exact renders alone. Generated pictures are blurred, noisy, a little
displaced and, above all, decoded by an autoencoder that cannot hold everything. The last is imitated by the best linear
one: each 8 x 8 patch is projected on its leading principal components, which is also what an autoencoder with an 8-fold
downsampling converges to if it is linear.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

PATCH = 8  # pixels


@dataclass(frozen=True, eq=False)
class PatchComponents:
    """Principal components of 8 x 8 patches: mean (192,), and the leading ones as columns (192, k)."""

    mean: Float[Tensor, " p"]
    basis: Float[Tensor, "p k"]

    @classmethod
    def of(cls, pictures: Float[Tensor, "n 3 h w"], count: int = 48) -> "PatchComponents":
        """Fit to pictures in [-1, 1]."""
        patches = F.pixel_unshuffle(pictures, PATCH).movedim(1, -1).flatten(0, 2)
        vectors = torch.linalg.eigh(torch.cov(patches.T.double())).eigenvectors
        return cls(patches.mean(0), vectors.flip(1)[:, :count].float())

    def keep(self, pictures: Float[Tensor, "n 3 h w"], counts: list[int]) -> Float[Tensor, "n 3 h w"]:
        """Each picture projected on its own number of components."""
        patches = F.pixel_unshuffle(pictures, PATCH).movedim(1, -1) - self.mean
        ranks = torch.arange(self.basis.shape[1])[None] < torch.tensor(counts)[:, None]
        kept = (patches @ self.basis * ranks[:, None, None]) @ self.basis.T + self.mean
        return F.pixel_shuffle(kept.movedim(-1, 1), PATCH)


def blur(pictures: Float[Tensor, "n 3 h w"], sigma: float) -> Float[Tensor, "n 3 h w"]:
    """Gaussian blur by `sigma` pixels, edges repeated."""
    if sigma < 0.2:
        return pictures
    reach = max(1, round(3 * sigma))
    line = torch.exp(-torch.arange(-reach, reach + 1).float().square() / (2 * sigma**2))
    kernel = (line / line.sum()).expand(3, 1, -1)
    padded = F.pad(pictures, (reach,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(padded, kernel[..., None], groups=3), kernel[:, :, None], groups=3)


def shift(pictures: Float[Tensor, "n 3 h w"], rows: int, columns: int) -> Float[Tensor, "n 3 h w"]:
    """Moved by whole pixels, edges repeated."""
    reach = max(abs(rows), abs(columns))
    height, width = pictures.shape[-2:]
    padded = F.pad(pictures, (reach,) * 4, mode="replicate") if reach else pictures
    return padded[..., reach + rows : reach + rows + height, reach + columns : reach + columns + width]


def degrade(
    pictures: Float[Tensor, "n 3 h w"], components: PatchComponents, generator: torch.Generator, strength: float = 1.0
) -> Float[Tensor, "n 3 h w"]:
    """A random mixture, half of the batch left compressed only mildly; blur and shift are the same within a batch."""

    def chance() -> float:
        return torch.rand((), generator=generator).item()

    fewest = round(48 - 36 * strength)  # 12 components at full strength, about 25 dB
    counts = torch.randint(fewest, 49, (len(pictures),), generator=generator).tolist()
    out = components.keep(pictures, counts) if chance() < 0.7 else pictures
    out = blur(out, 1.5 * strength * chance())
    reach = round(2 * strength)
    rows, columns = (int(torch.randint(-reach, reach + 1, (), generator=generator)) for _ in range(2))
    out = shift(out, rows, columns)
    scale = 0.2 * strength * torch.rand(len(out), 1, 1, 1, generator=generator).square()
    return (out + scale * torch.randn(out.shape, generator=generator)).clamp(-1, 1)
