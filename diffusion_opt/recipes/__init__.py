"""Combine: recipes of techniques, and the ladder that measures them side by side."""

from diffusion_opt.recipes.ladder import FASHION_LADDER, LadderResult, run_ladder
from diffusion_opt.recipes.measuring import as_rung, measure
from diffusion_opt.recipes.recipe import TECHNIQUES, Recipe, Technique, apply
from diffusion_opt.recipes.sampling import Compile, Solver, Student
from diffusion_opt.recipes.saving import load, save

__all__ = [
    "FASHION_LADDER",
    "TECHNIQUES",
    "Compile",
    "LadderResult",
    "Recipe",
    "Solver",
    "Student",
    "Technique",
    "apply",
    "as_rung",
    "load",
    "measure",
    "run_ladder",
    "save",
]
