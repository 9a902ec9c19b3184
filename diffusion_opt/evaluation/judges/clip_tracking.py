"""Where the picture of a clip is, which one it is and how clearly it shows, by least squares against what was drawn.

Scenes and pictures are known (`datasets.clips`), so a frame less its scene is a times m(p, k): the stamp of picture k
at position p, seen over the scene, with opacity a. For each p and k the best a is closed, and what it explains is

    d = frame - scene,    m = color alpha - alpha scene,    a = (d . m) / |m|^2,    explained = (d . m)^2 / |m|^2.

All pictures are tried at places two pixels apart, by correlation. The three best pictures are then placed between the
pixels by Gauss-Newton steps on a and p together, since m is smooth in p. The clearest one, with the largest share of
|d|^2 explained, is what the frame shows. A frame of the world itself is found again to a thousandth of a pixel.
"""

from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from diffusion_opt.datasets.clips import PICTURES, sheet
from diffusion_opt.datasets.clips.physics import HIGH, LOW
from diffusion_opt.datasets.clips.render import BORDER, SQUARE, corner, square_index, stamp

STRIDE = 2  # pixels between the places that are tried first
CANDIDATES, COARSE_STEPS, FINE_STEPS = 3, 2, 3  # pictures that are placed, Gauss-Newton steps for all and for one
HALF_STEP = 0.25  # pixels, of the difference that stands for the derivative
AT_ONCE = 256  # frames


@dataclass(frozen=True, eq=False)
class Track:
    """What was found in each frame."""

    positions: Float[Tensor, "n f 2"]  # pixels
    pictures: Int[Tensor, "n f"]
    opacity: Float[Tensor, "n f"]  # 1: as drawn
    clearness: Float[Tensor, "n f"]  # share of what differs from the scene that this picture explains, at most 1


def track(frames: Float[Tensor, "n f 3 h w"], scenes: Int[Tensor, " n"]) -> Track:
    """Find the picture in each frame of clips over known scenes."""
    flat = frames.float().flatten(0, 1)
    of_frame = scenes.repeat_interleave(frames.shape[1])
    parts = [_found(x, s) for x, s in zip(flat.split(AT_ONCE), of_frame.split(AT_ONCE), strict=True)]
    return Track(*(torch.cat(each).unflatten(0, frames.shape[:2]) for each in zip(*parts, strict=True)))


@cache
def _kernels() -> tuple[Tensor, Tensor, Tensor]:
    """Color and alpha of all stamps on the pixel grid, and |m|^2 by scene, picture and place tried."""
    middle = torch.full((len(PICTURES), 2), SQUARE / 2)
    whole = stamp(torch.arange(len(PICTURES)), middle, torch.zeros(len(PICTURES), 2, dtype=torch.long))
    color, alpha = whole[:, :3], whole[:, 3:]
    scenes = F.pad(sheet().scenes, (1, 1, 1, 1))
    squared = color.square().sum((1, 2, 3))[:, None, None]
    crossed = F.conv2d(scenes, color * alpha, stride=STRIDE)
    covered = F.conv2d(scenes.square().sum(1, keepdim=True), alpha.square(), stride=STRIDE)
    return color, alpha, (squared - 2 * crossed + covered).clamp(min=1e-6)


def _found(frames: Float[Tensor, "m 3 h w"], scenes: Int[Tensor, " m"]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Positions, pictures, opacity and clearness of single frames."""
    color, alpha, norms = _kernels()
    drawn = sheet().scenes[scenes]
    difference = frames - drawn
    over = F.pad((difference * drawn).sum(1, keepdim=True), (1, 1, 1, 1))
    product = F.conv2d(F.pad(difference, (1, 1, 1, 1)), color, stride=STRIDE) - F.conv2d(over, alpha, stride=STRIDE)
    explained = product.clamp(min=0).square() / norms[scenes]
    best, place = explained.flatten(2).max(2)
    pictures = best.topk(CANDIDATES, 1).indices  # (m, candidates)
    place = place.gather(1, pictures)
    side = explained.shape[-1]
    positions = LOW + STRIDE * torch.stack([place % side, place // side], -1).float()
    pixels = F.pad(torch.cat([difference, drawn], 1), (BORDER,) * 4).flatten(2)
    positions, _, clear = _placed(pixels, pictures, positions, COARSE_STEPS)
    winner = clear.argmax(1, keepdim=True)
    pictures = pictures.gather(1, winner)
    positions = positions.gather(1, winner[..., None].expand(-1, -1, 2))
    positions, opacity, clear = _placed(pixels, pictures, positions, FINE_STEPS)
    return positions[:, 0], pictures[:, 0], opacity[:, 0], clear[:, 0]


def _placed(
    pixels: Float[Tensor, "m 6 l"], pictures: Int[Tensor, "m k"], positions: Float[Tensor, "m k 2"], steps: int
) -> tuple[Float[Tensor, "m k 2"], Float[Tensor, "m k"], Float[Tensor, "m k"]]:
    """Gauss-Newton from k positions in each frame: refined positions, opacity, and the share explained.

    `pixels` are difference and scene with a border, flat.
    """
    shape = pictures.shape
    which, at = pictures.flatten(), positions.flatten(0, 1)

    def seen(position: Tensor, corners: Tensor, behind: Tensor) -> Tensor:
        whole = stamp(which, position, corners)
        return (whole[:, :3] - whole[:, 3:] * behind).flatten(1)

    for step in range(steps + 1):
        corners = corner(at)
        index = square_index(corners).unflatten(0, shape).flatten(1)  # (m, k * q * q)
        read = pixels.gather(2, index[:, None].expand(-1, 6, -1)).unflatten(2, (shape[1], SQUARE, SQUARE))
        target, behind = read.transpose(1, 2).flatten(0, 1).split(3, dim=1)
        target, model = target.flatten(1), seen(at, corners, behind)
        if step == steps:
            break
        slopes = [
            (seen(at + shift, corners, behind) - seen(at - shift, corners, behind)) / (2 * HALF_STEP)
            for shift in torch.eye(2) * HALF_STEP
        ]
        basis = torch.stack([model, *slopes], 2)  # d ~ a m + (a delta) . dm/dp
        normal = basis.mT @ basis + 1e-6 * torch.eye(3)
        solved = torch.linalg.solve(normal, basis.mT @ target[..., None])[..., 0]
        move = solved[:, 1:] / solved[:, :1].clamp(min=0.1)
        at = (at + move.clamp(-1, 1)).clamp(LOW - 1, HIGH + 1)
    product = (model * target).sum(1)
    norm = model.square().sum(1).clamp(min=1e-6)
    total = target.square().sum(1).clamp(min=1e-6)
    clear = product.clamp(min=0).square() / norm / total
    return at.unflatten(0, shape), (product / norm).unflatten(0, shape), clear.unflatten(0, shape)
