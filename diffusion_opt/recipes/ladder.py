"""The ladder: from the teacher as it comes to everything combined, each rung a recipe, all measured in one run.

Every rung starts from a fresh copy of the teacher, makes the same images (same noise, same classes) and is timed in
turns with the others, so a speed-up is a ratio of medians under one protocol. The first rung is the reference; the
second, a better solver with fewer steps, is what each later one has to beat to have earned its place. Two judges that
can contradict each other measure the distance to real pictures, and plain statistics say how much fine detail there is.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from diffusion_opt.caching import GuidanceCache, TeaCache
from diffusion_opt.evaluation import Measurement, measure_together, speedup
from diffusion_opt.evaluation.judges.real import SHIPPED_REAL
from diffusion_opt.models import load
from diffusion_opt.quantization import W8A8, Bfloat16, DynamicInt8
from diffusion_opt.quantization.faster import w8a8
from diffusion_opt.quantization.faster.bfloat16 import fast_here
from diffusion_opt.recipes.measuring import as_rung
from diffusion_opt.recipes.recipe import Recipe
from diffusion_opt.recipes.sampling import Compile, Solver, Student

TEACHER = "teacher"
JUDGES = ("fashion", "imagenet", "statistics")
GUIDANCE = GuidanceCache(every=1, interval=(0.3, 0.9))  # chosen in `benchmarks/sampling_steps.py`
FASHION_LADDER: dict[str, Recipe] = {
    TEACHER: Recipe(),
    "better solver": Recipe((Solver(12),)),
    "+ guidance interval": Recipe((Solver(12), GUIDANCE)),
    "+ step cache": Recipe((Solver(12), TeaCache(0.2), GUIDANCE)),
    "+ INT8": Recipe((Solver(12), DynamicInt8(), TeaCache(0.2), GUIDANCE)),
    "4-step student": Recipe((Student("fashion-4step-interval"),)),
    "2-step student": Recipe((Student("fashion-2step"),)),
    "1-step student": Recipe((Student("fashion-1step"),)),
    "combined": Recipe((Student("fashion-1step"), DynamicInt8())),
    "combined, bfloat16": Recipe((Student("fashion-1step"), Bfloat16())),
}


@dataclass(frozen=True)
class LadderResult:
    """What a run of the ladder measured: one `Measurement` and one line of description a rung, and example images."""

    measurements: dict[str, Measurement]
    descriptions: dict[str, str]
    images: dict[str, torch.Tensor]  # rung -> (N, 1, H, W) in [-1, 1], the same noise and classes on each rung
    skipped: dict[str, str]  # rung -> why it could not run on this machine

    def speedup(self, name: str) -> float:
        """Time of the teacher over time of a rung, per image."""
        return speedup(self.measurements[TEACHER], self.measurements[name])

    def rows(self) -> list[dict[str, Any]]:
        """One row a rung, the teacher first, with the fields of the report."""
        return [
            {
                "name": name,
                "recipe": self.descriptions[name],
                "nfe": m.nfe,
                "macs_per_image": m.macs,
                "ms_per_image": m.ms_per_image,
                "speedup": self.speedup(name),
                "weight_mb": m.weight_bytes / 1e6,
                "fid": m.quality.distance,
                "fid_low": m.quality.distance_low,
                "fid_high": m.quality.distance_high,
                "fid_floor": m.quality.floor,
                "precision": m.quality.precision,
                "recall": m.quality.recall,
                "class_agreement": m.quality.class_agreement,
                "distance_to_teacher": m.quality.teacher.feature_rms if m.quality.teacher else 0.0,
                "features": m.quality.metric,
                "judged": {name: number.to_dict() for name, number in m.judged.items()},
            }
            for name, m in self.measurements.items()
        ]


def fitted(recipe: Recipe, device: torch.device) -> Recipe:
    """The recipe for this device: INT8 has one kernel for CPUs and another for CUDA GPUs."""
    if device.type != "cuda":
        return recipe
    return Recipe(tuple(W8A8("int8", skip=t.skip) if isinstance(t, DynamicInt8) else t for t in recipe.techniques))


def obstacle(recipe: Recipe, device: torch.device) -> str | None:
    """Why a recipe has no place in a measurement on this device; None if nothing is in its way."""
    for technique in recipe.techniques:
        if isinstance(technique, DynamicInt8) and device.type != "cpu":
            return "dynamic INT8 runs on a CPU only, on a CUDA GPU W8A8 takes its place"
        if isinstance(technique, W8A8) and technique.require_fast and (why := w8a8.obstacle(technique.numbers, device)):
            return why
        if isinstance(technique, Bfloat16) and technique.require_fast and not fast_here(device):
            return f"this {device.type} has no bfloat16 units (AMX on a CPU), float32 is faster"
    return None


def real_pictures(size: int) -> str:
    """Name of the shipped real pictures of a size in pixels. Raises ValueError if there are none."""
    found = [name for name, pixels in SHIPPED_REAL.items() if pixels == size]
    if not found:
        raise ValueError(
            f"the ladder knows real pictures of {sorted(SHIPPED_REAL.values())} pixels, the model makes {size}; "
            "measure other models with measure_together(…, judges=…, real=…)"
        )
    return found[0]


def run_ladder(
    recipes: Mapping[str, Recipe] = FASHION_LADDER,
    *,
    model: str = "fashion",
    num_samples: int = 500,
    batch_size: int = 50,
    rounds: int = 5,
    seed: int = 0,
    device: str = "cpu",
    compile: bool = False,
    progress: bool = True,
    judges: Sequence[str] = JUDGES,
) -> LadderResult:
    """Measure all rungs together, by several judges against the shipped real pictures of the model's size.

    Rungs with a technique that this machine cannot run, or only more slowly, are left out and named in `skipped`; on a
    CUDA GPU `W8A8` takes the place of `DynamicInt8`. With `compile` the blocks of every rung are compiled. Raises
    ValueError if a recipe does not fit the model.
    """
    pipes, skipped = {}, {}
    recipes = {name: fitted(recipe, torch.device(device)) for name, recipe in recipes.items()}
    for name, recipe in recipes.items():
        if (reason := obstacle(recipe, torch.device(device))) is not None:
            skipped[name] = reason
            continue
        if compile:
            recipe = Recipe((*recipe.techniques, Compile()))
        pipe = load(model, device=device)
        pipe.set_progress_bar_config(disable=True)
        pipes[name] = recipe.apply(pipe)
    images: dict[str, torch.Tensor] = {}
    measurements = measure_together(
        {name: as_rung(pipe) for name, pipe in pipes.items()},
        num_samples=num_samples,
        batch_size=batch_size,
        rounds=rounds,
        num_classes=pipes[TEACHER].class_embedder.num_classes,
        seed=seed,
        device=device,
        progress=progress,
        images=images,
        judges=judges,
        real=real_pictures(pipes[TEACHER].vae.config.sample_size),
    )
    descriptions = {name: recipes[name].describe() for name in pipes}
    guidance = pipes[TEACHER].config.default_guidance
    descriptions[TEACHER] = f"{pipes[TEACHER].config.default_steps} Euler steps, guidance {guidance:g}"
    return LadderResult(measurements, descriptions, images, skipped)
