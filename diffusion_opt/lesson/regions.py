"""Scenes and runs of lesson 06: a small sneaker on a canvas of garments, streamed with and without a cache.

What is here is not what the lesson teaches, only what it would otherwise repeat: to draw frames, to run a stream and
note of each frame its picture, time and work, to compare techniques on one generation by error and exact MACs, and to
measure one pass over a share of the tokens. Errors are relative L2 of pictures taken in [-1, 1], as everywhere in
`benchmarks`.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from diffusers import DiffusionPipeline
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor
from torch.nn import functional as F

from diffusion_opt.caching import StreamingRegionCache, region_report, set_region, stream
from diffusion_opt.caching.region.policy import Streaming
from diffusion_opt.caching.region.session import policy_of
from diffusion_opt.datasets import load_fashion_mnist
from diffusion_opt.evaluation import count, interleaved, timed
from diffusion_opt.models import TinyFlux2Config, TinyFlux2Pipeline, build_pipeline, load, position_ids
from diffusion_opt.recipes import Technique

PATCH = 4  # pixels a side of a token of the shipped models


def opened(model: str) -> TinyFlux2Pipeline:
    """A shipped model without progress bars."""
    pipe = load(model)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def garments(label: int, num: int) -> Float[Tensor, "num 1 28 28"]:
    """The first test pictures of a class, in [-1, 1]."""
    data = load_fashion_mnist("test")
    return data.images[data.labels == label][:num]


@dataclass(frozen=True, slots=True)
class Scene:
    """A picture that moves over another."""

    canvas: Float[Tensor, "1 1 h w"]
    sprite: Float[Tensor, "1 1 y x"]

    def frame(self, row: int, column: int) -> Float[Tensor, "1 1 h w"]:
        """The canvas with the sprite's upper left corner at this pixel. Raises ValueError if it would stick out."""
        height, width = self.sprite.shape[2:]
        rows, columns = self.canvas.shape[2] - height, self.canvas.shape[3] - width
        if not (0 <= row <= rows and 0 <= column <= columns):
            raise ValueError(f"the sprite fits at rows 0 … {rows} and columns 0 … {columns}, got {row} and {column}")
        picture = self.canvas.clone()
        picture[:, :, row : row + height, column : column + width] = self.sprite
        return picture


def sneaker_scene() -> Scene:
    """A sneaker of 16 x 16 pixels over four garments, 56 x 56 pixels in all: 4 x 4 of 14 x 14 tokens."""
    rows = [torch.cat([garments(left, 1), garments(right, 1)], dim=3) for left, right in ((0, 7), (8, 5))]
    return Scene(torch.cat(rows, dim=2), F.interpolate(garments(7, 4)[3:], size=(16, 16), mode="area"))


def tokens_of(picture: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n k"]:
    """The pixels of each token."""
    return F.pixel_unshuffle(picture, PATCH).flatten(2).mT


def token_picture(values: Num[Tensor, " n"] | Bool[Tensor, " n"], columns: int) -> Float[Tensor, "1 1 h w"]:
    """One number a token, from 0 up, as a picture in [-1, 1]: black is 0, white the largest."""
    grid = values.float().reshape(1, 1, -1, columns)
    return F.interpolate(2 * grid / grid.max().clamp(min=1e-9) - 1, scale_factor=PATCH)


def relative(images: Float[Tensor, "*s"], exact: Float[Tensor, "*s"]) -> float:
    """Error of pictures in [0, 1], taken in [-1, 1]."""
    return (2 * (images - exact).norm() / (2 * exact - 1).norm()).item()


@contextmanager
def applied(technique: Technique | None, pipe: DiffusionPipeline) -> Iterator[DiffusionPipeline]:
    """The pipeline with a technique on it (None: as it is), which is taken off at the end."""
    if technique is not None:
        technique.apply(pipe)
    try:
        yield pipe
    finally:
        if technique is not None:
            technique.remove(pipe)


@dataclass(frozen=True, slots=True)
class Streamed:
    """One frame that came out of a stream."""

    image: Float[Tensor, "1 1 h w"]  # in [0, 1]
    seconds: float
    num_computed: int | None = None  # tokens of its first pass; None without a cache
    work: float = 1.0  # tokens computed over tokens, of all its passes
    reason: str = ""  # why those


def next_frame(
    pipe: TinyFlux2Pipeline, frame: Float[Tensor, "1 1 h w"], *, steps: int, strength: float = 0.5
) -> Streamed:
    """One more frame of a stream without a prompt; the pipeline's region cache, if any, remembers the one before."""
    image, seconds = timed(partial(next, stream(pipe, [frame], "", steps=steps, strength=strength)), 0)
    if policy_of(pipe.transformer, Streaming) is None:
        return Streamed(image, seconds)
    report = region_report(pipe)
    return Streamed(image, seconds, report.passes[0].num_computed, report.work, report.passes[0].reason)


def streamed(
    pipe: TinyFlux2Pipeline,
    frames: Iterable[Float[Tensor, "1 1 h w"]],
    cache: StreamingRegionCache | None = None,
    *,
    steps: int,
    strength: float = 0.5,
) -> list[Streamed]:
    """A stream of frames under a cache, which begins empty, or without one."""
    with applied(cache, pipe):
        return [next_frame(pipe, frame, steps=steps, strength=strength) for frame in frames]


def compared(
    pipe: DiffusionPipeline, sample: Callable[[], Float[Tensor, "..."]], techniques: Sequence[Technique]
) -> list[tuple[float, float]]:
    """Relative error and share of the MACs of each technique, against `sample()` with nothing applied."""
    exact, full = _counted(sample)
    rows = []
    for technique in techniques:
        with applied(technique, pipe):
            images, macs = _counted(sample)
        rows.append((relative(images, exact), macs / full))
    return rows


def _counted(sample: Callable[[], Tensor]) -> tuple[Tensor, int]:
    images = []
    macs = count(lambda: images.append(sample())).macs
    return images[0], macs


@dataclass(frozen=True, slots=True)
class PassCost:
    """Cost of one pass over some of the tokens, relative to one over all."""

    macs: float
    time: float


@torch.no_grad()
def pass_costs(shares: Sequence[float], side: int, batch: int, rounds: int) -> dict[float, PassCost]:
    """Exact MACs and median time of a pass over each share of side x side tokens (hidden size 256, random weights)."""
    pipe = build_pipeline(TinyFlux2Config(image_size=PATCH * side, num_heads=4))
    given = {
        "hidden_states": torch.randn(batch, side * side, 16, generator=torch.Generator().manual_seed(0)),
        "encoder_hidden_states": torch.zeros(batch, 1, 64),
        "timestep": torch.full((batch,), 0.5),
        "img_ids": position_ids(side, side, torch.device("cpu")),
        "txt_ids": torch.zeros(1, 4),
    }

    def one_pass(num_active: int) -> None:
        set_region(pipe, torch.arange(side * side) < num_active)
        with pipe.transformer.cache_context("cond"):
            pipe.transformer(**given)

    with applied(StreamingRegionCache(ring=0, probe=0.0), pipe):
        calls = {share: partial(one_pass, round(share * side * side)) for share in (1.0, *shares)}
        calls[1.0]()  # the slots are filled
        timings = interleaved({str(share): call for share, call in calls.items()}, rounds, progress=False)
        macs = {share: count(call).macs for share, call in calls.items()}
    full_s = timings["1.0"].median_s
    return {share: PassCost(macs[share] / macs[1.0], timings[str(share)].median_s / full_s) for share in calls}


def grid(side: int) -> Int[Tensor, "n 3"]:
    """Frame, row and column of each token of a square picture."""
    return torch.cartesian_prod(torch.tensor([0]), torch.arange(side), torch.arange(side))
