"""For a pipeline without data: its pictures against those that its own teacher makes of the same noise.

    paired.pixel       root mean square difference of pixels
    paired.feature     the same of ImageNet features
    paired.perceptual  distance of normalized feature maps at seven depths, as LPIPS (Zhang et al. 2018, arXiv
                       1801.03924, eq. 1) with all channel weights equal, since none were fitted here

Each is divided by what it is for two unrelated pictures of the teacher, so 0 is the same picture and 1 is no relation.
A clip is compared frame by frame with frames of the same number. This says how far a technique moved a picture, not
whether it is a worse one: a student with samples of its own, as from distribution matching, is far from its teacher's
pictures and may be as good.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from diffusion_opt.evaluation.features import as_saved
from diffusion_opt.evaluation.judges.efficientnet import EfficientNetLite0, imagenet_fingerprint, load_imagenet, shown
from diffusion_opt.evaluation.judges.judge import RESAMPLES, Number, Prompts, as_frames, mean_interval
from diffusion_opt.evaluation.judges.real import RealPictures

BATCH = 50


def perceptual_distance(
    maps: list[Float[Tensor, "b _ _ _"]], others: list[Float[Tensor, "b _ _ _"]]
) -> Float[Tensor, " b"]:
    """Sum over depths of the mean squared difference of feature maps whose channels have length 1 at each place."""
    gaps = [F.normalize(a, dim=1) - F.normalize(b, dim=1) for a, b in zip(maps, others, strict=True)]
    return sum(gap.square().sum(1).mean((1, 2)) for gap in gaps)


@torch.inference_mode()
def distances(
    pictures: Float[Tensor, "n c h w"], others: Float[Tensor, "n c h w"], network: EfficientNetLite0
) -> dict[str, Float[Tensor, " n"]]:
    """Squared distances of pictures to others, pair by pair: of pixels, of features, and perceptual."""
    found: dict[str, list[Tensor]] = {"pixel": [], "feature": [], "perceptual": []}
    for mine, theirs in zip(pictures.split(BATCH), others.split(BATCH), strict=True):
        pixel = (as_saved(mine.float()) - as_saved(theirs.float())).square().flatten(1).mean(1)
        maps, other_maps = network.stages(shown(mine)), network.stages(shown(theirs))
        last = maps[-1].mean((2, 3)) - other_maps[-1].mean((2, 3))
        found["pixel"].append(pixel)
        found["feature"].append(last.square().sum(1))
        found["perceptual"].append(perceptual_distance(maps, other_maps))
    return {name: torch.cat(parts) for name, parts in found.items()}


@dataclass(frozen=True, slots=True)
class PairedJudge:
    """See the module's head."""

    network: EfficientNetLite0 | None = None
    resamples: int = RESAMPLES
    seed: int = 0

    name: ClassVar[str] = "paired"
    needs: ClassVar[frozenset[str]] = frozenset({"teacher"})

    def check(self, pictures: Tensor, prompts: Prompts, real: RealPictures | None) -> None:
        """Raises ValueError for other shapes than pictures and clips."""
        as_frames(pictures)

    def measure(
        self,
        pictures: Tensor,
        prompts: Prompts,
        *,
        real: RealPictures | None = None,
        teacher: Tensor | None = None,
    ) -> dict[str, Number]:
        """Raises ValueError without the teacher's pictures, or if they do not pair up."""
        if teacher is None:
            raise ValueError(
                "the paired judge compares with the teacher: pass teacher=, its pictures of the same noise"
            )
        if pictures.shape != teacher.shape:
            raise ValueError(
                f"pictures and the teacher's are compared pair by pair, got shapes {tuple(pictures.shape)} and "
                f"{tuple(teacher.shape)}"
            )
        frames, others = as_frames(pictures).cpu(), as_frames(teacher).cpu()
        network = self.network or load_imagenet()
        shift = 1 if pictures.ndim == 4 else pictures.shape[1]  # the same frame of the next clip
        unrelated = distances(others, others.roll(shift, 0), network)
        basis = f"EfficientNet-Lite0 {imagenet_fingerprint()[:12]} against the teacher"
        found = {}
        for name, squared in distances(frames, others, network).items():
            scale = unrelated[name].mean()
            if scale == 0:
                raise ValueError("the teacher's pictures are all the same: nothing tells how far apart two may be")
            low, high = mean_interval(squared / scale, self.seed, self.resamples)
            root = 1.0 if name == "perceptual" else 0.5  # the perceptual distance is a squared one by definition
            value = (squared.mean() / scale).item()
            found[f"paired.{name}"] = Number(value**root, len(frames), basis, max(0, low) ** root, high**root)
        return found
