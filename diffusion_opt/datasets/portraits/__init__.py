"""Portraits in seven styles, drawn exactly from words: endless pictures from a file of 155 KB, and their prompts."""

from diffusion_opt.datasets.portraits.drawing import compose, draw, draw_many, svg_of
from diffusion_opt.datasets.portraits.parsing import parse, styles_for
from diffusion_opt.datasets.portraits.picture_cache import fingerprint, pictures
from diffusion_opt.datasets.portraits.portrait import Portrait, Split, allowed, held_out_pairs, sample, split_of
from diffusion_opt.datasets.portraits.prompts import choose_names, partial_prompt, prompt
from diffusion_opt.datasets.portraits.tables import ATTRIBUTES, HELD_OUT, STYLES

__all__ = [
    "ATTRIBUTES",
    "HELD_OUT",
    "STYLES",
    "Portrait",
    "Split",
    "allowed",
    "choose_names",
    "compose",
    "draw",
    "draw_many",
    "fingerprint",
    "held_out_pairs",
    "parse",
    "partial_prompt",
    "pictures",
    "prompt",
    "sample",
    "split_of",
    "styles_for",
    "svg_of",
]
