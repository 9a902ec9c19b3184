"""The teacher by steps and solver, and by guidance scale: the honest baseline of every other table.

    python benchmarks/sampling_steps.py fashion

Writes `benchmarks/results/steps-<name>.json`: FD (fashion features) with its interval for 1, 2, 4, 8, 16 and 50 steps
of Euler and of Adams-Bashforth, and a sweep of the guidance scale at 16 second-order steps.
"""

import json
from pathlib import Path
from typing import Annotated, Any

import tyro

from diffusion_opt.evaluation import Measurement, machine, measure_together
from diffusion_opt.models import TinyFlux2Pipeline, load
from diffusion_opt.recipes import Recipe, Solver, as_rung

RESULTS = Path(__file__).parent / "results"
STEPS = (1, 2, 4, 8, 16, 50)
SCALES = (1.0, 1.25, 1.5, 2.0, 3.0)


def row(record: Measurement, **settings: Any) -> dict[str, Any]:
    """The figures of one setting."""
    quality = record.quality
    return {
        **settings,
        "nfe": record.nfe,
        "distance": quality.distance,
        "distance_low": quality.distance_low,
        "distance_high": quality.distance_high,
        "precision": quality.precision,
        "recall": quality.recall,
        "class_agreement": quality.class_agreement,
    }


def prepared(model: str, solver: Solver, guidance: float | None = None) -> TinyFlux2Pipeline:
    pipe = Recipe((solver,)).apply(load(model))
    pipe.set_progress_bar_config(disable=True)
    if guidance is not None:
        pipe.register_to_config(default_guidance=guidance)
    return pipe


def main(
    model: Annotated[str, tyro.conf.Positional] = "fashion",
    samples: int = 2000,
    batch_size: int = 100,
    only: tuple[str, ...] = ("guidance", "steps"),
) -> None:
    """Measure and store.

    Args:
        model: shipped name or folder.
        samples: images behind each figure.
        batch_size: images a call.
        only: which of the two tables to make.
    """
    path = RESULTS / f"steps-{Path(model).name}.json"
    report = json.loads(path.read_text()) if path.is_file() else {}
    report |= {"model": Path(model).name, "samples": samples, "machine": machine()}
    settings = {"num_samples": samples, "batch_size": batch_size, "rounds": 1}
    if "guidance" in only:
        pipes = {scale: prepared(model, Solver(16), scale) for scale in SCALES}
        records = measure_together({str(s): as_rung(p) for s, p in pipes.items()}, **settings)
        report["guidance"] = [row(records[str(scale)], guidance=scale, steps=16) for scale in SCALES]
    if "steps" in only:
        solvers = [Solver(steps, name) for name in ("euler", "adams_bashforth2") for steps in STEPS]
        solvers = [s for s in solvers if s != Solver(1)]  # one step of either is the same step
        records = measure_together({s.describe(): as_rung(prepared(model, s)) for s in solvers}, **settings)
        report["steps"] = [row(records[s.describe()], solver=s.name, steps=s.steps) for s in solvers]
        report["floor"] = next(iter(records.values())).quality.floor
    RESULTS.mkdir(exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n")
    for table in only:
        for line in report[table]:
            print({key: round(value, 3) if isinstance(value, float) else value for key, value in line.items()})


if __name__ == "__main__":
    tyro.cli(main)
