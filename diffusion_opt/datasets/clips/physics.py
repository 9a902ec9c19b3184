"""How a picture moves: exactly known, steered by an action, with chance at the walls.

One frame is 1/25 s. With the action a of the chunk that a frame belongs to, the velocity v (pixels per frame) and the
position p of the picture's middle follow

    v <- drag (v + push a), shortened to `top` if longer;      p <- p + v.

If that would leave the frame, p is mirrored at the wall, **the picture turns into one of the others, each equally
likely**, and it leaves at an angle from the wall's normal of

    clamp(mirrored angle + U(-spread, spread), -widest, widest),     speed = max(keep |v|, kick).

The two draws are why this world needs a generative model: without them the future is determined, its mean is the
answer, and one step of a regression does it. Both can be counted, see the judge of clips. Walls kick, so that a
picture pressed against one does not turn at each frame. The position at a hit is not random; what follows is.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from diffusion_opt.datasets.clips.sheet import PICTURE, PICTURES, SIZE

ACTIONS = ("none", "left", "right", "up", "down")
DIRECTIONS = ((0.0, 0.0), (-1.0, 0.0), (1.0, 0.0), (0.0, -1.0), (0.0, 1.0))  # x to the right, y downward
CHUNK = 2  # frames that share an action
FRAMES_PER_SECOND = 25
LOW, HIGH = PICTURE / 2, SIZE - PICTURE / 2  # where the middle of a picture may be, in pixels
CORNER = math.radians(40)  # widest angle from a corner's diagonal


@dataclass(frozen=True, slots=True)
class Physics:
    """The constants of motion, in pixels and frames. Raises ValueError for what would let a picture leave."""

    push: float = 0.2  # velocity that an action adds in a frame
    drag: float = 0.985  # share of the velocity that is left after a frame
    top: float = 2.5  # speed limit
    keep: float = 0.9  # share of the speed after a hit …
    kick: float = 1.6  # … and at least this
    spread: float = math.radians(30)  # of the random angle, to either side
    widest: float = math.radians(55)  # from the wall's normal

    def __post_init__(self) -> None:
        if not 0 < self.kick <= self.top < HIGH - LOW or min(self.push, self.spread) < 0:
            raise ValueError(
                f"need 0 < kick <= top < {HIGH - LOW:g} px, push and spread not negative; got kick {self.kick}, "
                f"top {self.top}, push {self.push}, spread {self.spread}"
            )
        if not (0 < self.drag <= 1 and 0 < self.keep <= 1 and 0 < self.widest < math.pi / 2):
            raise ValueError(
                f"need drag and keep in (0, 1] and widest in (0, 90) degrees, got {self.drag}, {self.keep} and "
                f"{math.degrees(self.widest):.0f}"
            )


PHYSICS = Physics()


@dataclass(frozen=True, eq=False)
class Chance:
    """What hits will draw, one row for each picture and frame: which of the others it becomes, and the angle."""

    turns: Int[Tensor, "n f"]  # 1 … number of pictures - 1, added to the present one
    angles: Float[Tensor, "n f"]  # radians

    @classmethod
    def draw(cls, num: int, frames: int, generator: torch.Generator, physics: Physics = PHYSICS) -> "Chance":
        turns = torch.randint(1, len(PICTURES), (num, frames), generator=generator)
        angles = (2 * torch.rand(num, frames, generator=generator) - 1) * physics.spread
        return cls(turns, angles)


@dataclass(frozen=True, eq=False)
class Motion:
    """What happened in each frame: ground truth of a clip. A hit's velocity is the one after it."""

    positions: Float[Tensor, "n f 2"]  # of the picture's middle, pixels
    velocities: Float[Tensor, "n f 2"]  # pixels per frame
    pictures: Int[Tensor, "n f"]
    hits: Bool[Tensor, "n f"]  # whether the picture turned in this frame


def driven(velocity: Float[Tensor, "*b 2"], action: Int[Tensor, "*b"], physics: Physics = PHYSICS) -> Tensor:
    """The velocity one frame later, away from walls."""
    pushed = physics.drag * (velocity + physics.push * torch.tensor(DIRECTIONS, device=action.device)[action])
    speed = pushed.norm(dim=-1, keepdim=True)
    return pushed * (physics.top / speed.clamp(min=physics.top))


def mirrored(position: Float[Tensor, "*b 2"]) -> tuple[Float[Tensor, "*b 2"], Float[Tensor, "*b 2"]]:
    """Positions folded back at the walls, and the walls' inward normals, 0 where there was no hit."""
    low, high = position < LOW, position > HIGH
    folded = torch.where(low, 2 * LOW - position, torch.where(high, 2 * HIGH - position, position))
    return folded, low.to(position.dtype) - high.to(position.dtype)


def bounced(
    velocity: Float[Tensor, "n 2"], normal: Float[Tensor, "n 2"], angle: Float[Tensor, " n"], physics: Physics = PHYSICS
) -> Float[Tensor, "n 2"]:
    """The velocity after a hit that adds `angle` (radians) to the mirrored direction."""
    corner = normal.abs().sum(-1) == 2
    heading = torch.atan2(normal[:, 1], normal[:, 0])
    away = torch.where(normal != 0, -velocity, velocity)
    turned = torch.atan2(away[:, 1], away[:, 0]) - heading + angle
    turned = torch.atan2(turned.sin(), turned.cos())  # into (-pi, pi]
    widest = torch.where(corner, min(CORNER, physics.widest), physics.widest)
    direction = heading + torch.maximum(torch.minimum(turned, widest), -widest)
    speed = (physics.keep * velocity.norm(dim=-1)).clamp(min=physics.kick)
    return speed[:, None] * torch.stack([direction.cos(), direction.sin()], -1)


def simulate(
    position: Float[Tensor, "n 2"],
    velocity: Float[Tensor, "n 2"],
    picture: Int[Tensor, " n"],
    actions: Int[Tensor, "n k"],
    chance: Chance,
    physics: Physics = PHYSICS,
) -> Motion:
    """The `CHUNK` frames of each action, the first of them one frame after the state that is given.

    Raises ValueError if `chance` has another number of frames.
    """
    num_frames = CHUNK * actions.shape[1]
    if chance.turns.shape != (len(position), num_frames):
        raise ValueError(f"{num_frames} frames of {len(position)} clips need as many draws, got {chance.turns.shape}")
    seen = []
    for frame in range(num_frames):
        velocity = driven(velocity, actions[:, frame // CHUNK], physics)
        position, normal = mirrored(position + velocity)
        hit = normal.any(-1)
        if hit.any():
            left = bounced(velocity, normal, chance.angles[:, frame], physics)
            velocity = torch.where(hit[:, None], left, velocity)
            picture = torch.where(hit, (picture + chance.turns[:, frame]) % len(PICTURES), picture)
        seen.append((position, velocity, picture, hit))
    return Motion(*(torch.stack(each, 1) for each in zip(*seen, strict=True)))
