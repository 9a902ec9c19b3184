"""Labeled samples in memory, and the data sets that this repository knows by the classes they hold.

Methods that learn from data ask for one thing: `draw(num, generator)`, some samples with their conditions. Anything
that has it may stand for the images: points of a mixture, latents of clips, a reader of a folder.

A class-conditional network says which classes it draws and at which size; `data_for` finds the data set with exactly
these. There is no default: a network of other classes gets no data, and the message says what was looked for.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffusion_opt.flow import ClassCondition


@dataclass(frozen=True)
class ImageData:
    """Labeled images: `images` (N, channels, height, width) in [-1, 1], `labels` (N,) in 0 … number of classes - 1.

    Methods that learn from data ask for no more than this, so points (N, 2) of a mixture may stand for the images.
    Raises ValueError for labels that are no classes, or another number of them than of images.
    """

    images: Float[Tensor, "n *s"]
    labels: Int[Tensor, " n"]
    class_names: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.images) != len(self.labels):
            raise ValueError(f"{len(self.images)} images have {len(self.labels)} labels; give one for each")
        if len(self.labels) and not 0 <= int(self.labels.min()) <= int(self.labels.max()) < len(self.class_names):
            raise ValueError(
                f"labels must lie in 0 … {len(self.class_names) - 1}, one of {len(self.class_names)} classes, "
                f"got {int(self.labels.min())} … {int(self.labels.max())}"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def draw(self, num: int, generator: torch.Generator) -> tuple[Float[Tensor, "num *s"], ClassCondition]:
        """`num` random images (with repetition) and their classes, on the generator's device."""
        index = torch.randint(len(self), (num,), generator=generator, device=generator.device)
        return self.images[index], ClassCondition(self.labels[index], len(self.class_names))

    def to(self, device: torch.device | str) -> "ImageData":
        """The same images on a device."""
        return ImageData(self.images.to(device), self.labels.to(device), self.class_names)

    def part(self, num: int | None = None, classes: Sequence[str] = ()) -> "ImageData":
        """The first `num` images of these classes (None, none given: all): a smaller number is a part of a larger one.

        Raises ValueError for an unknown class, and where nothing is left.
        """
        if unknown := [name for name in classes if name not in self.class_names]:
            raise ValueError(f"classes must be some of {', '.join(self.class_names)}, got {unknown[0]!r}")
        wanted = [self.class_names.index(name) for name in classes or self.class_names]
        index = torch.isin(self.labels, torch.tensor(wanted, device=self.labels.device)).nonzero()[:, 0][:num]
        if not len(index):
            raise ValueError(f"no images of the classes {', '.join(classes)} are left")
        return ImageData(self.images[index], self.labels[index], self.class_names)

    def fingerprint(self) -> str:
        """16 hex digits of class names, images and labels."""
        digest = hashlib.sha256("\n".join(self.class_names).encode())
        for tensor in (self.images, self.labels):
            digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class DataSet:
    """A data set by name: its classes, the shapes (C, H, W) it comes in, and how its training images are read."""

    name: str
    class_names: tuple[str, ...]
    shapes: tuple[tuple[int, int, int], ...]
    training: Callable[[tuple[int, int, int]], ImageData]


def data_for(known: Sequence[DataSet], class_names: Sequence[str], shape: tuple[int, ...]) -> DataSet:
    """The data set of these classes that comes in this shape.

    Raises ValueError if none has these classes, in this order, or none of this size and number of channels.
    """
    found = [one for one in known if one.class_names == tuple(class_names)]
    if not found:
        there = "; ".join(f"{one.name}: {', '.join(one.class_names)}" for one in known)
        raise ValueError(
            f"no data set here has the classes {', '.join(class_names)} (there are {there}); "
            "give images of your own: subject=ClassConditional(pipe, data=ImageData(…))"
        )
    if tuple(shape) not in found[0].shapes:
        sizes = ", ".join(str(one) for one in found[0].shapes)
        raise ValueError(f"{found[0].name} comes as (channels, height, width) = {sizes}, the network draws {shape}")
    return found[0]
