"""The teacher by steps and solver, by guidance scale and by the times at which guidance counts: the honest baselines.

    python benchmarks/sampling_steps.py fashion

Writes `benchmarks/results/steps-<name>.json`: FD (fashion features) with its interval for 1, 2, 4, 8, 16 and 50 steps
of Euler and of Adams-Bashforth, and at 16 second-order steps a sweep of the guidance scale and of the interval of times
at which it counts (`flow.Guided` and the sampler; in a pipeline `GuidanceCache(every=1, interval=…)` does the same).
"""

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from tqdm.auto import tqdm

from diffusion_opt.evaluation import Measurement, Quality, machine, measure_together, quality
from diffusion_opt.flow import SAMPLERS, ClassCondition, Guided, randn, sampling_times
from diffusion_opt.models import TinyFlux2Pipeline, load, velocity_model
from diffusion_opt.recipes import Recipe, Solver, as_rung

RESULTS = Path(__file__).parent / "results"
STEPS = (1, 2, 4, 8, 16, 50)
SCALES = (1.0, 1.25, 1.5, 2.0, 3.0)
INTERVALS = ((0.0, 1.0), (0.0, 0.9), (0.3, 1.0), (0.3, 0.9), (0.3, 0.8), (0.5, 0.9))
GUIDED_STEPS = 16


def row(found: Quality, nfe: int, **settings: Any) -> dict[str, Any]:
    """The figures of one setting."""
    return {
        **settings,
        "nfe": nfe,
        "distance": found.distance,
        "distance_low": found.distance_low,
        "distance_high": found.distance_high,
        "precision": found.precision,
        "recall": found.recall,
        "class_agreement": found.class_agreement,
    }


def row_of(record: Measurement, **settings: Any) -> dict[str, Any]:
    return row(record.quality, record.nfe, **settings)


@torch.no_grad()
def limited(model: str, scale: float, interval: tuple[float, float], samples: int, batch_size: int) -> dict[str, Any]:
    """The teacher with guidance in an interval of times; passes are counted as if none was made in vain."""
    pipe = load(model)
    teacher = Guided(velocity_model(pipe).eval(), scale, interval)
    size, classes = pipe.vae.config.sample_size, pipe.class_embedder.num_classes
    labels, times = torch.arange(samples) % classes, sampling_times(GUIDED_STEPS)
    images = []
    for i, part in enumerate(tqdm(labels.split(batch_size), desc=f"guidance {scale:g} in {interval}", leave=False)):
        noise = randn((len(part), pipe.vae.config.in_channels, size, size), torch.Generator().manual_seed(i))
        images.append(SAMPLERS["adams_bashforth2"](teacher, noise, times, ClassCondition(part, classes)).clamp(-1, 1))
    guided = ((times[:-1] >= interval[0]) & (times[:-1] <= interval[1])).sum().item()
    found = quality(torch.cat(images), labels)
    return row(found, GUIDED_STEPS + guided, guidance=scale, interval=interval, steps=GUIDED_STEPS)


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
    only: tuple[str, ...] = ("guidance", "interval", "steps"),
) -> None:
    """Measure and store.

    Args:
        model: shipped name or folder.
        samples: images behind each figure.
        batch_size: images a call.
        only: which of the tables to make.
    """
    path = RESULTS / f"steps-{Path(model).name}.json"
    report = json.loads(path.read_text()) if path.is_file() else {}
    report |= {"model": Path(model).name, "samples": samples, "machine": machine()}
    settings = {"num_samples": samples, "batch_size": batch_size, "rounds": 1}
    if "guidance" in only:
        pipes = {scale: prepared(model, Solver(GUIDED_STEPS), scale) for scale in SCALES}
        records = measure_together({str(s): as_rung(p) for s, p in pipes.items()}, **settings)
        report["guidance"] = [row_of(records[str(scale)], guidance=scale, steps=GUIDED_STEPS) for scale in SCALES]
    if "interval" in only:
        settled = [(scale, interval) for scale in (1.5, 2.0) for interval in INTERVALS]
        report["interval"] = [limited(model, *setting, samples, batch_size) for setting in settled]
    if "steps" in only:
        solvers = [Solver(steps, name) for name in ("euler", "adams_bashforth2") for steps in STEPS]
        solvers = [s for s in solvers if s != Solver(1)]  # one step of either is the same step
        records = measure_together({s.describe(): as_rung(prepared(model, s)) for s in solvers}, **settings)
        report["steps"] = [row_of(records[s.describe()], solver=s.name, steps=s.steps) for s in solvers]
        report["floor"] = next(iter(records.values())).quality.floor
    RESULTS.mkdir(exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n")
    for table in only:
        for line in report[table]:
            print({key: round(value, 3) if isinstance(value, float) else value for key, value in line.items()})


if __name__ == "__main__":
    tyro.cli(main)
