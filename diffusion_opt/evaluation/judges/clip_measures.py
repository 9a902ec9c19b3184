"""What is measured on tracked clips, one value for each clip: motion, chance, and pixels where no picture is.

Motion. A chunk is explained by that action, of the five, whose physics leaves the least error; velocities come from the
frames before, so a frame after a hit, whose velocity chance has drawn, explains nothing. What remains is `physics`; how
often the explaining action is the one that was asked for is `action`. Where two actions explain a chunk alike (at the
speed limit they may), and one of them was asked for, it counts as followed; a chunk that no action explains to half a
push counts in `physics` alone.

Pixels. Those that no picture covers must show the scene and stand still. The three figures of them are blind to one
another: `background` is the error of their mean over time, `drift` the change from the first to the last quarter of a
clip, `flicker` the change from frame to frame less what drift alone would give.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from diffusion_opt.datasets.clips import ACTIONS, CHUNK, PHYSICS, PICTURES, SIZE, sheet
from diffusion_opt.datasets.clips.physics import HIGH, LOW, driven, mirrored
from diffusion_opt.datasets.clips.render import SQUARE
from diffusion_opt.evaluation.judges.clip_tracking import Track

UNSURE = 0.3  # pixels beyond a wall from which on a hit is certain
LEVELS = 127.5  # of eight bits, for a difference of 1 in [-1, 1]


@dataclass(frozen=True, eq=False)
class Moved:
    """What motion says of clips, frame by frame or chunk by chunk; NaN where nothing can be said."""

    physics: Float[Tensor, "n f"]  # pixels from where the explaining action would lead
    action: Float[Tensor, "n k"]  # 1: the explaining action is the asked one
    identity: Float[Tensor, "n f"]  # 1: the same picture as before, away from walls
    turned: Float[Tensor, "n f"]  # 1: another picture than before, at a wall
    turns: Int[Tensor, "n f"]  # which of the others it became there, 1 … number - 1; 0: no turn


def moved(found: Track, actions: Int[Tensor, "n k"]) -> Moved:
    """Compare tracked clips with the physics and the actions that were asked for."""
    p, num = found.positions, len(found.positions)
    num_chunks = p.shape[1] // CHUNK
    blank = torch.full(p.shape[:2], torch.nan)
    physics, identity, turned = blank, blank.clone(), blank.clone()
    turns, followed = torch.zeros(p.shape[:2], dtype=torch.long), torch.full((num, num_chunks), torch.nan)
    same = (found.pictures[:, 1:] == found.pictures[:, :-1]).float()
    change = (found.pictures[:, 1:] - found.pictures[:, :-1]) % len(PICTURES)
    kept = F.pad(same, (1, 0), value=1.0) > 0  # where the law cannot tell a hit, the turn does
    known = torch.zeros(num, dtype=torch.bool)  # whether the step to the frame before was free of hits
    every = torch.arange(len(ACTIONS)).expand(num, -1)
    for chunk in range(num_chunks):
        errors, hits, unsure, valid = [], [], [], []
        before = known[:, None].expand(-1, len(ACTIONS))
        for t in range(CHUNK * chunk, CHUNK * (chunk + 1)):
            if t < 2:
                error = torch.zeros(num, len(ACTIONS))
                hit = doubt = torch.zeros(num, len(ACTIONS), dtype=torch.bool)
                ready = hit
                after = kept[:, t, None].expand_as(hit) & (t == 1)
            else:
                velocity = (p[:, t - 1] - p[:, t - 2])[:, None].expand(-1, len(ACTIONS), -1)
                ahead = p[:, t - 1, None] + driven(velocity, every)
                error = (mirrored(ahead)[0] - p[:, t, None]).norm(dim=-1)
                beyond = torch.maximum(LOW - ahead, ahead - HIGH).amax(-1)
                ready, hit, doubt = before, before & (beyond > UNSURE), before & (beyond.abs() <= UNSURE)
                after = torch.where(before & ~doubt, ~hit, kept[:, t, None])
            errors.append(error), hits.append(hit), unsure.append(doubt), valid.append(ready)
            before = after
        asked = actions[:, chunk]
        total = sum(torch.where(ok, e, 0.0) for ok, e in zip(valid, errors, strict=True))
        best = total.argmin(1)
        best = torch.where(total.gather(1, asked[:, None])[:, 0] <= total.amin(1) + 1e-3, asked, best)
        pick = lambda x, best=best: x.gather(1, best[:, None])[:, 0]  # noqa: E731
        counted = sum(pick(ok).float() for ok in valid)
        explained = pick(total) / counted.clamp(min=1) <= PHYSICS.push / 2
        alike = total.gather(1, asked[:, None])[:, 0] <= pick(total) + counted * PHYSICS.push / 4
        followed[:, chunk] = torch.where((counted == CHUNK) & explained, alike.float(), torch.nan)
        for j, t in enumerate(range(CHUNK * chunk, CHUNK * (chunk + 1))):
            ok, hit, doubt = pick(valid[j]), pick(hits[j]), pick(unsure[j])
            physics[:, t] = torch.where(ok, pick(errors[j]), torch.nan)
            if t:
                identity[:, t] = torch.where(ok & ~hit & ~doubt, same[:, t - 1], torch.nan)
                turned[:, t] = torch.where(hit, 1 - same[:, t - 1], torch.nan)
                turns[:, t] = torch.where(hit, change[:, t - 1], 0)
        known = pick(before)
    return Moved(physics, followed, identity, turned, turns)


def uncovered(positions: Float[Tensor, "n f 2"]) -> Bool[Tensor, "n f 1 h w"]:
    """Pixels that the square around the picture does not reach."""
    grid = torch.arange(SIZE) + 0.5
    far_x, far_y = ((grid - positions[..., axis, None]).abs() > SQUARE / 2 for axis in (0, 1))
    return (far_x[..., None, :] | far_y[..., :, None])[:, :, None]


@dataclass(frozen=True, eq=False)
class Still:
    """What the pixels without a picture say of clips; one value each."""

    background: Float[Tensor, " n"]  # mean square error of the mean over time
    drift: Float[Tensor, " n"]  # levels of 255, rms
    flicker: Float[Tensor, " n"]  # levels of 255, rms


def still(frames: Float[Tensor, "n f 3 h w"], scenes: Int[Tensor, " n"], positions: Float[Tensor, "n f 2"]) -> Still:
    """Compare the pixels that no picture covers with the scene and with each other."""
    free = uncovered(positions).float()
    off = frames.float() - sheet().scenes[scenes][:, None]
    quarter = max(1, frames.shape[1] // 4)

    def mean(part: slice) -> tuple[Tensor, Tensor]:
        count = free[:, part].sum(1)
        return (off[:, part] * free[:, part]).sum(1) / count.clamp(min=1), (count > 0).float()

    def over(values: Tensor, weights: Tensor) -> Tensor:
        total = (3 * weights.flatten(1).sum(1)).clamp(min=1)
        return (values.square() * weights).flatten(1).sum(1) / total

    whole, seen = mean(slice(None))
    (first, seen_first), (last, seen_last) = mean(slice(0, quarter)), mean(slice(-quarter, None))
    both = free[:, 1:] * free[:, :-1]
    steps = off[:, 1:] - off[:, :-1]
    trend = (steps * both).sum(1, keepdim=True) / both.sum(1, keepdim=True).clamp(min=1)
    return Still(
        over(whole, seen),
        LEVELS * over(last - first, seen_first * seen_last).sqrt(),
        LEVELS * over(steps - trend, both).sqrt(),
    )


def appearance(frames: Float[Tensor, "m 3 h w"]) -> Float[Tensor, "m 64"]:
    """64 features that nothing was trained for: mean color, and mean strength of edges, of 4x4 cells."""
    cells = F.adaptive_avg_pool2d
    x = frames.float()
    edges = x.diff(dim=-1).abs()[..., 1:, :] + x.diff(dim=-2).abs()[..., :, 1:]
    return torch.cat([cells(x, 4).flatten(1), 4 * cells(edges.mean(1, keepdim=True), 4).flatten(1)], 1)
