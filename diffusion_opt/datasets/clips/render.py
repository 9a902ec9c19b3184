"""Frames from a state: a picture at any place over its scene, also between two pixels.

    frame = scene (1 - alpha) + color alpha,      alpha and color alpha read from the averaged texture at p

Only the 18x18 pixels around the picture are computed; the rest is the scene. `stamp` is that square by itself: the
judge of clips finds pictures with it, so what it looks for is what was drawn.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from diffusion_opt.datasets.clips.sheet import PICTURE, SIZE, TEXELS, Sheet, sheet

SQUARE = PICTURE + 2  # pixels of the square around a picture in which it can be seen
BORDER = 2  # pixels around the frame, so that a square at the wall lies inside


def corner(positions: Float[Tensor, "*b 2"]) -> Int[Tensor, "*b 2"]:
    """The first pixel (x, y) of the square around each position."""
    return (positions - SQUARE / 2).floor().long()


def stamp(
    pictures: Int[Tensor, " m"],
    positions: Float[Tensor, "m 2"],
    corners: Int[Tensor, "m 2"],
    drawn: Sheet | None = None,
) -> Float[Tensor, "m 4 q q"]:
    """Color times alpha (3 channels) and alpha of each picture at its position, on the square that starts at a corner.

    What lies outside of the square is cut off; the corner need not be the one of `corner`, only near it.
    """
    textures = (drawn or sheet()).textures
    side = textures.shape[-1]
    places = torch.arange(SQUARE, device=positions.device) + 0.5 + corners[..., None] - positions[..., None]  # m 2 q
    grid = 2 * TEXELS * places / side  # texture coordinates in [-1, 1] for align_corners=False
    # Texel i of the averaged texture stands for the interval that begins at i - 2: shift by half a texel.
    grid = grid + 1.0 / side
    across = grid[:, 0, None, :].expand(-1, SQUARE, -1)
    down = grid[:, 1, :, None].expand(-1, -1, SQUARE)
    return F.grid_sample(textures[pictures], torch.stack([across, down], -1), align_corners=False)


def squares(frames: Float[Tensor, "m c h w"], corners: Int[Tensor, "m 2"]) -> Float[Tensor, "m c q q"]:
    """The pixels of each frame in the square that starts at its corner; beyond the border they are 0."""
    padded = F.pad(frames, (BORDER,) * 4)
    return padded.flatten(2).gather(2, square_index(corners)[:, None].expand(-1, frames.shape[1], -1)).unflatten(
        2, (SQUARE, SQUARE)
    )  # fmt: skip


def square_index(corners: Int[Tensor, "m 2"]) -> Int[Tensor, "m qq"]:
    """Where the pixels of the squares stand in a frame with its border, flattened."""
    side = torch.arange(SQUARE, device=corners.device)
    rows = (corners[:, 1, None] + BORDER + side).clamp(0, SIZE + 2 * BORDER - 1)
    columns = (corners[:, 0, None] + BORDER + side).clamp(0, SIZE + 2 * BORDER - 1)
    return (rows[:, :, None] * (SIZE + 2 * BORDER) + columns[:, None]).flatten(1)


def render(
    scenes: Int[Tensor, " n"], pictures: Int[Tensor, "n f"], positions: Float[Tensor, "n f 2"]
) -> Float[Tensor, "n f 3 h w"]:
    """Frames in [-1, 1] of a picture at each position over its scene."""
    drawn = sheet()
    num, num_frames = pictures.shape
    grown = F.pad(drawn.scenes, (BORDER,) * 4)[scenes]
    canvas = grown[:, None].expand(-1, num_frames, -1, -1, -1).flatten(0, 1).flatten(2).contiguous()
    flat = positions.flatten(0, 1)
    corners = corner(flat)
    square = stamp(pictures.flatten(), flat, corners, drawn).flatten(2)
    index = square_index(corners)[:, None].expand(-1, 3, -1)
    canvas.scatter_(2, index, canvas.gather(2, index) * (1 - square[:, 3:]) + square[:, :3])
    inside = canvas.unflatten(2, (SIZE + 2 * BORDER,) * 2)[..., BORDER:-BORDER, BORDER:-BORDER]
    return inside.reshape(num, num_frames, 3, SIZE, SIZE)
