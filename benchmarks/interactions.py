"""Which gains multiply and which cancel: six techniques on the shipped teacher, alone, in pairs and together.

    python benchmarks/interactions.py --samples 1000 --rounds 5          the full study
    python benchmarks/interactions.py --model fashion-micro --samples 40 --rounds 1 --out runs/interactions

Writes `interactions.json` and `interactions.png` to --out. Both judges look at every recipe; times are interleaved. The
second part calibrates a table cache before and after the network is quantized to NVFP4, and measures both.
"""

import tempfile
from pathlib import Path

import tyro

from diffusion_opt.caching import GuidanceCache, TeaCache
from diffusion_opt.datasets import write_json
from diffusion_opt.evaluation import machine, measure_together
from diffusion_opt.evaluation.judges.real import SHIPPED_REAL
from diffusion_opt.models import load
from diffusion_opt.names import SHIPPED
from diffusion_opt.quantization import PTQ, LowPrecisionAttention
from diffusion_opt.recipes import Recipe, Solver, Student, as_rung
from diffusion_opt.recipes.interactions import TEACHER, as_dict, effect, figure, recalibrated, study, table
from diffusion_opt.recipes.search.verdict import with_own_networks
from diffusion_opt.subjects import Run

NUMBERS = ("fashion.distance", "imagenet.distance")
RESULTS = Path(__file__).parent / "results"
TABLE_BUDGET = 0.2  # accumulated change at which the table cache computes


def factors(model: str, run: Run) -> dict:
    """The techniques of the study; a student where one ships."""
    student = next((one.name for one in SHIPPED.values() if one.teacher == model and "2step" in one.name), None)
    found = {
        "solver": Solver(12),
        "guidance interval": GuidanceCache(1, interval=(0.3, 0.9)),
        "step cache": TeaCache(0.2),
        "FP8 weights": PTQ("fp8", run=run, samples=4),
        "INT8 attention": LowPrecisionAttention("int8"),
    }
    return found if student is None else found | {"student": Student(student)}


def main(
    model: str = "fashion", samples: int = 1000, batch_size: int = 50, rounds: int = 5, seed: int = 0,
    out: Path = RESULTS,
) -> None:  # fmt: skip
    """Run the study on a shipped model."""
    pipe = load(model)
    pipe.set_progress_bar_config(disable=True)
    run = Run.for_pipeline(pipe, batch_size=batch_size, seed=seed)
    sizes = {size: name for name, size in SHIPPED_REAL.items()}
    real = sizes[pipe.vae.config.sample_size]
    effects = study(pipe, factors(model, run), run, NUMBERS, samples=samples, rounds=rounds, real=real)
    with tempfile.TemporaryDirectory() as folder:
        stored = PTQ("nvfp4", run=run, samples=4)
        recipes = recalibrated(pipe, stored, run, TABLE_BUDGET, Path(folder))
        rungs = {TEACHER: as_rung(pipe, run)}
        for name, recipe in {"NVFP4": Recipe((stored,)), **recipes}.items():
            rungs[name] = as_rung(recipe.apply(with_own_networks(pipe)), run)
        found = measure_together(
            rungs, num_samples=samples, batch_size=batch_size, prompts=run.prompts, rounds=1, seed=seed, real=real,
            judges=tuple(name.partition(".")[0] for name in NUMBERS),
        )  # fmt: skip
    calibrated = [effect((name,), one, found[TEACHER], NUMBERS) for name, one in found.items()]
    out.mkdir(parents=True, exist_ok=True)
    record = {
        "command": f"python benchmarks/interactions.py --model {model} --samples {samples} --rounds {rounds}",
        "machine": machine(), "model": model, "samples": samples, "rounds": rounds, "seed": seed,
        **as_dict(effects), "recalibration": as_dict(calibrated)["effects"],
    }  # fmt: skip
    write_json(out / "interactions.json", record)
    figure(effects).savefig(out / "interactions.png", dpi=120)
    print("\n".join([*table(effects), "a table cache over NVFP4 weights", *table(calibrated)[1:-1]]))


if __name__ == "__main__":
    tyro.cli(main)
