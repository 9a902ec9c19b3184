"""The exact judge of portraits: an attribute reader, the variety of what prompts leave open, and exact likeness."""

from diffusion_opt.evaluation.judges.portraits.judge import PortraitsJudge
from diffusion_opt.evaluation.judges.portraits.likeness import (
    Copies,
    copies,
    nearest,
    nearest_among_neighbors,
    nearest_is_asked,
    neighbors,
)
from diffusion_opt.evaluation.judges.portraits.reader import Reading, load_reader, look, read
from diffusion_opt.evaluation.judges.portraits.settle import settled
from diffusion_opt.evaluation.judges.portraits.variety import Variety, mean_variation, open_choices, variety

__all__ = [
    "Copies",
    "PortraitsJudge",
    "Reading",
    "Variety",
    "copies",
    "load_reader",
    "look",
    "mean_variation",
    "nearest",
    "nearest_among_neighbors",
    "nearest_is_asked",
    "neighbors",
    "open_choices",
    "read",
    "settled",
    "variety",
]
