"""Recipes to start from, by model and goal, each saying where its numbers come from and what was not measured.

    chosen = diffusion_opt.preset("flux2-klein-base", goal="balanced")
    print(chosen.source)
    chosen.recipe.apply(pipe)

For the shipped models settings were measured by committed scripts. For the large ones they are the settings that served
the small models of the same classes, under the rules of `advice.py`: no step cache on a model of 4 steps, none of our
solvers in the place of UniPC, guidance spared only where it is a pass of its own. A preset for a GPU refuses on a
machine without the kernel that makes it faster, as its techniques do. `diffusion-opt search` finds better ones for your
prompts; a preset is what to compare it with.
"""

from dataclasses import dataclass

from diffusion_opt.caching import GuidanceCache, TeaCache
from diffusion_opt.names import KNOWN, nearest
from diffusion_opt.quantization import W8A8, DynamicInt8
from diffusion_opt.recipes.recipe import Recipe
from diffusion_opt.recipes.sampling import Solver, Student

GOALS = ("quality", "balanced", "fast")
LADDER = "benchmarks/sampling_steps.py, and the ladder of `diffusion-opt demo`, on the shipped model"
UNMEASURED = "not yet measured on a GPU; settings of the small model of the same classes ({measured})"
INTERVAL = GuidanceCache(1, interval=(0.3, 0.9))
FP8 = W8A8("e4m3")


@dataclass(frozen=True, slots=True)
class Preset:
    """A recipe, what it is for, and where its numbers come from."""

    model: str
    goal: str
    recipe: Recipe
    expect: str  # what it changes, in arithmetic
    source: str

    def describe(self) -> str:
        """One line."""
        return f"{self.model}, {self.goal}: {self.recipe.describe()} ({self.expect}; {self.source})"


_TINY = UNMEASURED.format(measured=LADDER)
# (recipe, what to expect, source) by model and goal. Passes are counted, not timed: times depend on the machine.
PRESETS: dict[tuple[str, str], tuple[Recipe, str, str]] = {
    ("fashion", "quality"): (Recipe((Solver(12), INTERVAL)), "19 passes in place of 100", LADDER),
    ("fashion", "balanced"): (Recipe((Student("fashion-4step-interval"),)), "4 passes in place of 100", LADDER),
    ("fashion", "fast"): (Recipe((Student("fashion-1step"), DynamicInt8())), "1 pass in place of 100", LADDER),
    ("flux2-dev", "quality"): (Recipe((Solver(28), FP8)), "28 passes in place of 50, 8-bit linears", _TINY),
    ("flux2-dev", "balanced"): (Recipe((Solver(28), FP8, TeaCache(0.2))), "fewer than 28 passes", _TINY),
    ("flux2-dev", "fast"): (Recipe((Solver(16), FP8, TeaCache(0.3))), "fewer than 16 passes", _TINY),
    ("flux2-klein-base", "quality"): (Recipe((Solver(28), FP8, INTERVAL)), "under 56 passes in place of 100", _TINY),
    ("flux2-klein-base", "balanced"): (
        Recipe((Solver(20), FP8, TeaCache(0.2), INTERVAL)), "under 40 passes in place of 100", _TINY,
    ),
    ("flux2-klein-base", "fast"): (
        Recipe((Student(KNOWN["flux2-klein"]), FP8)), "4 passes in place of 100: the student of its makers", _TINY,
    ),
    ("flux2-klein", "quality"): (Recipe(), "4 passes, as it comes: nothing to skip", _TINY),
    ("flux2-klein", "balanced"): (Recipe((FP8,)), "4 passes, 8-bit linears", _TINY),
    ("flux2-klein", "fast"): (Recipe((FP8,)), "4 passes, 8-bit linears: fewer bits break a student first", _TINY),
    ("ltx-2", "quality"): (Recipe((FP8, GuidanceCache(2))), "half of the guidance passes, 8-bit linears", _TINY),
    ("ltx-2", "balanced"): (
        Recipe((Solver(20), FP8, TeaCache(0.2), GuidanceCache(2))), "20 steps, half of the guidance passes", _TINY,
    ),
    ("ltx-2", "fast"): (
        Recipe((Solver(14), FP8, TeaCache(0.3), GuidanceCache(3))), "14 steps, a third of the guidance passes", _TINY,
    ),
    **{
        (model, goal): made
        for model in ("wan2.1", "wan2.1-1.3b")
        for goal, made in {
            "quality": (Recipe((FP8, INTERVAL)), "guidance for part of the steps, 8-bit linears", _TINY),
            "balanced": (Recipe((FP8, TeaCache(0.1), INTERVAL)), "fewer than 50 steps", _TINY),
            "fast": (Recipe((FP8, TeaCache(0.3), GuidanceCache(2))), "half of the guidance passes", _TINY),
        }.items()
    },
    ("wan2.2", "quality"): (Recipe((FP8,)), "8-bit linears; guidance is not spared over two networks", _TINY),
    ("wan2.2", "balanced"): (Recipe((FP8, TeaCache(0.1))), "fewer than 50 steps; each network has its cache", _TINY),
    ("wan2.2", "fast"): (Recipe((FP8, TeaCache(0.3))), "fewer than 50 steps; each network has its cache", _TINY),
}  # fmt: skip
MODELS = tuple(dict.fromkeys(model for model, _ in PRESETS))


def preset(model: str, goal: str = "balanced") -> Preset:
    """The preset of a model (a short name, or its name on the hub) and a goal: quality, balanced or fast.

    Raises ValueError for a model or a goal that there is none for, with the nearest name.
    """
    short = next((ours for ours, theirs in KNOWN.items() if theirs == model), model)
    if goal not in GOALS:
        raise ValueError(f"goal must be one of {', '.join(GOALS)}, got {goal!r}{nearest(goal, GOALS)}")
    if short not in MODELS:
        raise ValueError(
            f"no preset for {model!r}{nearest(model, MODELS)}: there are {', '.join(MODELS)}; for any other pipeline "
            "`diffusion-opt advise` says what applies and `diffusion-opt search` finds settings"
        )
    recipe, expect, source = PRESETS[short, goal]
    return Preset(short, goal, recipe, expect, source)
