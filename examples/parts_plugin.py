"""A technique, a judge and a subject of one's own, outside the package, as one plugin.

    diffusion-opt generate DIR --plugin examples/parts_plugin.py --recipe fused.json --prompts "a cat"
    diffusion-opt measure fashion --plugin examples/parts_plugin.py --against fused.json --judges brightness
    diffusion-opt distill --plugin examples/parts_plugin.py --teacher mirrored:fashion --method finetune --steps 50

with fused.json being {"techniques": [{"technique": "fused_projections"}]}. Each is small on purpose: what a part must
have is all there is to see. A method of distillation is in `imm_plugin.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from diffusion_opt.datasets import ImageData
from diffusion_opt.distillation import opening
from diffusion_opt.evaluation import judges
from diffusion_opt.evaluation.judges import Number, RealPictures
from diffusion_opt.evaluation.judges.judge import as_frames, mean_interval
from diffusion_opt.recipes import recipe
from diffusion_opt.subjects import ClassConditional, denoisers


@dataclass(frozen=True, slots=True)
class FusedProjections:
    """Technique: q, k and v of each attention layer by one matrix product; diffusers does the work."""

    def apply(self, pipe: DiffusionPipeline) -> DiffusionPipeline:
        """Fuse all denoisers. Raises ValueError, before anything is touched, for a class that cannot, or has been."""
        networks = denoisers(pipe)
        for name, network in networks.items():
            if not hasattr(network, "fuse_qkv_projections"):
                raise ValueError(f"{type(network).__name__} cannot fuse its projections")
            if any(getattr(module, "fused_projections", False) for module in network.modules()):
                raise ValueError(f"the projections of {name} are fused already")
        for network in networks.values():
            network.fuse_qkv_projections()
        return pipe

    def remove(self, pipe: DiffusionPipeline) -> None:
        for network in denoisers(pipe).values():
            network.unfuse_qkv_projections()

    def describe(self) -> str:
        return "q, k and v in one product"


@dataclass(frozen=True)
class BrightnessJudge:
    """How far a picture's mean brightness lies from that of the teacher's picture of the same noise; 0 is best."""

    resamples: int = 200
    seed: int = 0

    name: ClassVar[str] = "brightness"
    needs: ClassVar[frozenset[str]] = frozenset({"teacher"})

    def check(self, pictures: Tensor, prompts: Sequence[str | int] | Tensor, real: RealPictures | None) -> None:
        """Nothing that `as_frames` does not say of the first batch."""
        as_frames(torch.cat([pictures, pictures]))

    def measure(
        self, pictures: Tensor, prompts: Sequence[str | int] | Tensor, *, real: RealPictures | None = None,
        teacher: Tensor | None = None,
    ) -> dict[str, Number]:  # fmt: skip
        """Raises ValueError without the teacher's pictures."""
        if teacher is None:
            raise ValueError("the brightness judge compares with the teacher's pictures: give them")
        mine, theirs = (as_frames(side).float().mean((1, 2, 3)) for side in (pictures, teacher))
        off = (mine - theirs).abs()
        low, high = mean_interval(off, self.seed, self.resamples)
        return {"brightness.off": Number(float(off.mean()), len(off), "mean of all pixels in [-1, 1]", low, high)}


def open_mirrored(
    teacher: str, prompts: tuple[str, ...], samples: opening.Samples, device: str, dtype: Any, **asked: Any
) -> ClassConditional:
    """A class-conditional teacher that learns from its images turned left to right: `mirrored:MODEL`."""
    if prompts or samples != opening.Samples():
        raise ValueError(f"mirrored:{teacher} has classes and images of its own: leave out prompts and samples")
    return Mirrored.open(teacher, device)


class Mirrored(ClassConditional):
    """The same teacher, its data mirrored; the name says so, and so does what is stored."""

    def __init__(self, pipe: DiffusionPipeline, name: str, data: ImageData | None = None) -> None:
        super().__init__(pipe, f"mirrored:{name}", data)

    def identity(self) -> dict[str, str]:
        return super().identity() | {"data": "mirrored"}

    def with_data(self, num: int | None = None, classes: tuple[str, ...] = ()) -> "Mirrored":
        found = super().with_data(num, classes)
        found.data = replace(found.data, images=found.data.images.flip(-1))
        return found


def register() -> None:
    recipe.register("fused_projections", FusedProjections, recipe.STORED)
    judges.register("brightness", BrightnessJudge)
    opening.register("mirrored", open_mirrored)
