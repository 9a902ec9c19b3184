"""Does the error bound hold? Violations of `ErrorBoundedCache` on samples its calibration never saw.

    python benchmarks/error_bound.py fashion-error-bound

Runs the shipped family of schedules on held-out samples, and for each allowed error counts how many samples exceed it
under the schedule that the calibration chose. The promise is at most 1 - confidence; a count of n samples scatters
around that by sqrt(p (1 - p) / n). Writes `benchmarks/results/error_bound.json`.
"""

import json
import math
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from diffusion_opt.caching.schedules.error_bound import ErrorBound, schedule_errors
from diffusion_opt.caching.schedules.recording import generation_tasks
from diffusion_opt.evaluation import machine
from diffusion_opt.models import load
from diffusion_opt.subjects import Run

RESULTS = Path(__file__).parent / "results"
ALLOWED = (0.01, 0.02, 0.03, 0.05, 0.08, 0.12)


def row(bound: ErrorBound, held_out: torch.Tensor, allowed: float, confidence: float) -> dict[str, Any]:
    """What the calibration chose for an allowed error, and how it fared."""
    mask = bound.mask(allowed, confidence)
    errors = held_out[:, bound.masks.index(mask)]
    return {
        "max_rel_error": allowed,
        "computed": sum(mask),
        "steps": len(mask),
        "violations": float((errors > allowed).float().mean()),
        "mean_error": float(errors.mean()),
    }


def main(
    calibration: Annotated[str, tyro.conf.Positional] = "fashion-error-bound",
    model: str = "fashion",
    confidence: float = 0.9,
    samples: int = 200,
    batch_size: int = 20,
    seed: int = 40_000,
) -> None:
    """Measure and store.

    Args:
        calibration: shipped name or path of the error bound.
        model: shipped name or folder of its model.
        confidence: that is asked for.
        samples: held-out samples.
        batch_size: images a call.
        seed: number of the first of them; must be far from those that search and calibration used.
    """
    pipe = load(model)
    pipe.set_progress_bar_config(disable=True)
    bound = ErrorBound.load(calibration)
    bound.run.check_model(pipe)
    run = Run.for_pipeline(
        pipe,
        num_inference_steps=bound.run.num_inference_steps,
        guidance_scale=bound.run.guidance_scale,
        batch_size=batch_size,
    )
    tasks = generation_tasks(run, samples, first=seed)
    skipping = schedule_errors(pipe, bound.masks[1:], bound.predictor, tasks, progress=True)
    held_out = torch.cat([torch.zeros(len(skipping), 1), skipping], dim=1)  # the first mask computes everything
    promised = 1 - confidence
    report = {
        "calibration": Path(calibration).stem,
        "calibration_samples": len(bound.errors),
        "confidence": confidence,
        "samples": samples,
        "seed": seed,
        "standard_error_of_promise": math.sqrt(promised * confidence / samples),
        "machine": machine(),
        "rows": [row(bound, held_out, allowed, confidence) for allowed in ALLOWED],
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "error_bound.json").write_text(json.dumps(report, indent=2) + "\n")
    for line in report["rows"]:
        print({key: round(value, 4) if isinstance(value, float) else value for key, value in line.items()})


if __name__ == "__main__":
    tyro.cli(main)
