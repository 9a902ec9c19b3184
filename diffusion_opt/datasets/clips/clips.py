"""Clips by number: `clips(num, num_chunks, seed, split)` makes them on the fly, the same ones each time.

A clip shows one picture that moves over a scene. A chunk of two frames has an action, which is held for a while, as a
person holds a key. Nothing is stored: a seed gives the clips of all lengths in well under a millisecond per frame.

    train, test   different streams of chance; the same kinds of clips
    held_out      starting picture x scene x first three actions that occur in neither: one combination in twelve,
                  those with (scene + 5 picture + a_1 + 5 a_2 + 7 a_3) mod 12 = 0

so that a model that has only stored what it saw is told from one that has learned to combine.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffusion_opt.datasets.clips.physics import ACTIONS, CHUNK, HIGH, LOW, PHYSICS, Chance, Motion, Physics, simulate
from diffusion_opt.datasets.clips.render import render
from diffusion_opt.datasets.clips.sheet import PICTURES, SCENES

Split = Literal["train", "held_out", "test"]
SPLITS: tuple[str, ...] = get_args(Split)
OPENING = (1, 5, 7)  # weights of the first actions in what decides over the split
HELD, IDLE = 0.75, 0.35  # probability that an action is held for another chunk; that a new one is "none"
WARM_UP = 4  # chunks that are simulated before the first frame


@dataclass(frozen=True, eq=False)
class Clips:
    """Frames and everything that is known of them."""

    frames: Float[Tensor, "n f 3 h w"]  # in [-1, 1]
    scenes: Int[Tensor, " n"]
    actions: Int[Tensor, "n k"]  # one a chunk of two frames
    motion: Motion

    def __len__(self) -> int:
        return len(self.scenes)

    @property
    def prompts(self) -> list[str]:
        """What a pipeline is asked for, for example "frog, beach: left left none"."""
        rows = zip(self.motion.pictures[:, 0].tolist(), self.scenes.tolist(), self.actions.tolist(), strict=True)
        return [prompt(PICTURES[picture], SCENES[scene], [ACTIONS[a] for a in row]) for picture, scene, row in rows]


def prompt(picture: str, scene: str, actions: list[str]) -> str:
    """The text that asks for a clip: the picture that it starts with, the scene, an action for each chunk."""
    return f"{picture}, {scene}: {' '.join(actions)}"


def parse(text: str) -> tuple[int, int, list[int]]:
    """Numbers of picture, scene and actions. Raises ValueError naming the word that is none of the known ones."""
    head, colon, tail = text.partition(":")
    picture, comma, scene = (part.strip() for part in head.partition(","))
    if not (colon and comma and tail.split()):
        raise ValueError(f"a clip is asked for as 'frog, beach: left left none', got {text!r}")
    return (
        number_of(picture, PICTURES, "picture"),
        number_of(scene, SCENES, "scene"),
        [number_of(action, ACTIONS, "action") for action in tail.split()],
    )


def number_of(name: str, known: tuple[str, ...], what: str) -> int:
    """The place of a name among those known. Raises ValueError listing them."""
    if name not in known:
        raise ValueError(f"{what} must be one of {', '.join(known)}, got {name!r}")
    return known.index(name)


def draw_actions(num: int, num_chunks: int, generator: torch.Generator) -> Int[Tensor, "n k"]:
    """Random actions that are held, on average for `1 / (1 - HELD)` chunks."""
    idle = torch.rand(num, num_chunks, generator=generator) < IDLE
    fresh = torch.where(idle, 0, torch.randint(1, len(ACTIONS), (num, num_chunks), generator=generator))
    new = torch.rand(num, num_chunks, generator=generator) >= HELD
    new[:, 0] = True
    latest = torch.where(new, torch.arange(num_chunks), 0).cummax(1).values
    return fresh.gather(1, latest)


def is_held_out(
    scenes: Int[Tensor, " n"], pictures: Int[Tensor, " n"], actions: Int[Tensor, "n k"]
) -> Int[Tensor, " n"]:
    """0 where the combination is held out of training, else the number by which the scene is off."""
    opening = (actions[:, : len(OPENING)] * torch.tensor(OPENING)).sum(1)
    return (scenes + 5 * pictures + opening) % len(SCENES)


def clips(num: int, num_chunks: int, seed: int, split: Split = "train", physics: Physics = PHYSICS) -> Clips:
    """`num` clips of `num_chunks` chunks (two frames each), a function of seed and split.

    Raises ValueError for an unknown split, and for fewer than three chunks, whose split would not be decided.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    if num < 1 or num_chunks < len(OPENING):
        raise ValueError(
            f"need num >= 1 and num_chunks >= {len(OPENING)}, since the first {len(OPENING)} actions decide over the "
            f"split; got {num} and {num_chunks}"
        )
    generator = torch.Generator().manual_seed((seed * len(SPLITS) + SPLITS.index(split)) % 2**63)
    picture = torch.randint(len(PICTURES), (num,), generator=generator)
    position = LOW + (HIGH - LOW) * torch.rand(num, 2, generator=generator)
    velocity = (2 * torch.rand(num, 2, generator=generator) - 1) * physics.top * 0.7
    actions = draw_actions(num, WARM_UP + num_chunks, generator)
    chance = Chance.draw(num, CHUNK * (WARM_UP + num_chunks), generator, physics)
    whole = simulate(position, velocity, picture, actions, chance, physics)
    start = CHUNK * WARM_UP
    motion = Motion(*(getattr(whole, name)[:, start:] for name in ("positions", "velocities", "pictures", "hits")))
    actions = actions[:, WARM_UP:]
    off = 0 if split == "held_out" else torch.randint(1, len(SCENES), (num,), generator=generator)
    scenes = (off - is_held_out(torch.zeros(num, dtype=torch.long), motion.pictures[:, 0], actions)) % len(SCENES)
    return Clips(render(scenes, motion.pictures, motion.positions), scenes, actions, motion)
