"""Clips of a named picture that moves over a scene by exactly known physics, with countable chance; made on the fly."""

from diffusion_opt.datasets.clips.clips import SPLITS, Clips, Split, clips, draw_actions, number_of, parse, prompt
from diffusion_opt.datasets.clips.physics import (
    ACTIONS,
    CHUNK,
    FRAMES_PER_SECOND,
    PHYSICS,
    Chance,
    Motion,
    Physics,
    simulate,
)
from diffusion_opt.datasets.clips.render import render
from diffusion_opt.datasets.clips.sheet import PICTURES, SCENES, SIZE, sheet

__all__ = [
    "ACTIONS",
    "CHUNK",
    "FRAMES_PER_SECOND",
    "PHYSICS",
    "PICTURES",
    "SCENES",
    "SIZE",
    "SPLITS",
    "Chance",
    "Clips",
    "Motion",
    "Physics",
    "Split",
    "clips",
    "draw_actions",
    "number_of",
    "parse",
    "prompt",
    "render",
    "sheet",
    "simulate",
]
