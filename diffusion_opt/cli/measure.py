"""`diffusion-opt measure`: speed, arithmetic, memory and quality of pipelines, in turns, in one process.

    diffusion-opt measure DIR --prompts prompts.txt --steps 28 --against fast.json
    diffusion-opt measure DIR --prompts "a cat" --against 4step-student cached.json --judges paired statistics

The first is the teacher; each --against is a recipe (JSON), which is put on a fresh copy of the model, or another
model. Times are medians of interleaved turns, so their ratio holds; a judge's number carries the judge's name.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from diffusion_opt.cli.options import (
    ASKED,
    OPENING,
    RUNS,
    Asked,
    Model,
    Opening,
    check_model,
    plugins_wanted,
    writable,
)
from diffusion_opt.names import JUDGES, SHIPPED, nearest

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from rich.table import Table

    from diffusion_opt.evaluation import Measurement, Rung
    from diffusion_opt.subjects import Run

Judges = Annotated[tuple[str, ...], tyro.conf.arg(metavar=f"{{{','.join(JUDGES)}}} [...]", help_behavior_hint="")]
Others = Annotated[tuple[str, ...], tyro.conf.arg(metavar="RECIPE|MODEL [...]", help_behavior_hint="")]


def measure(
    model: Model,
    asked: Asked = ASKED,
    opening: Opening = OPENING,
    against: Others = (),
    judges: Judges = (),
    samples: int = 8,
    rounds: int = 3,
    out: Path = RUNS / "measure",
) -> None:
    """Measure a pipeline, and recipes or other models against it: time, passes, arithmetic, memory, and quality.

    Writes measurement.json, which names machine, versions and seeds.

    Args:
        model: shipped name, folder or hub name: the teacher of the others.
        against: recipes (JSON files) to put on the model, or other models.
        judges: who looks at the pictures. Default: paired, the distance from the model's own pictures of the same
            noise, if there is something to compare, and for a shipped model fashion. Plugins bring others.
        samples: pictures that are judged; 0: none are.
        rounds: timed turns of each.
        out: folder for the JSON file.
    """
    opening.check(model)
    asked.check(model)
    for other in against:
        _check_other(other)
    if (unknown := [name for name in judges if name not in JUDGES]) and not plugins_wanted(opening.plugin):
        raise ValueError(f"no judge {unknown[0]!r}{nearest(unknown[0], JUDGES)}: there are {', '.join(JUDGES)}")
    if samples < 0 or samples == 1 or rounds < 1:
        raise ValueError(f"--samples must be 0, or 2 or more, and --rounds 1 or more, got {samples} and {rounds}")
    writable(out)
    from rich.console import Console

    from diffusion_opt.evaluation import measure_together

    rungs, run = _rungs(model, against, asked, opening)
    chosen = judges or (("fashion",) if model in SHIPPED else ("paired",) if against else ())
    device = next(next(iter(rungs.values())).transformer.parameters()).device.type
    found = measure_together(
        rungs, num_samples=samples if chosen else 0, batch_size=run.batch_size, prompts=run.prompts, rounds=rounds,
        seed=run.seed, device=device, judges=chosen,
    )  # fmt: skip
    console = Console()
    console.print(table(found))
    for line in judged(found):
        console.print(line, highlight=False, markup=False)
    path = out / "measurement.json"
    path.write_text(json.dumps({name: json.loads(one.to_json()) for name, one in found.items()}, indent=2) + "\n")
    print(f"{run.describe()}, {run.batch_size} in a call; written to {path}")


def table(found: "dict[str, Measurement]") -> "Table":
    """Time, passes, arithmetic and memory of each, and how many times faster than the first it is."""
    from rich.table import Table

    shown = Table()
    shown.add_column("pipeline", overflow="fold")
    for name in ("s/sample", "faster", "passes", "GMACs", "weights", "peak"):
        shown.add_column(name, justify="right", no_wrap=True)
    first = next(iter(found.values()))
    for name, one in found.items():
        peak = "" if one.peak_memory_bytes is None else f"{one.peak_memory_bytes / 1e6:,.0f} MB"
        shown.add_row(
            name, f"{one.ms_per_image / 1000:.3f}", f"{first.ms_per_image / one.ms_per_image:.2f}x", str(one.nfe),
            f"{one.macs / 1e9:,.2f}", f"{one.weight_bytes / 1e6:,.1f} MB", peak,
        )  # fmt: skip
    return shown


def judged(found: "dict[str, Measurement]") -> Iterator[str]:
    """What each judge says of each pipeline, a line a number."""
    for name, one in found.items():
        for title, number in one.judged.items():
            interval = "" if number.low is None else f" [{number.low:.4g}, {number.high:.4g}]"
            real = "" if number.real is None else f", real pictures {number.real:.4g}"
            yield f"{name}: {title} {number.value:.4g}{interval}{real}"


def _rungs(model: str, against: tuple[str, ...], asked: Asked, opening: Opening) -> "tuple[dict[str, Rung], Run]":
    """The model and what it is compared with, each a pipeline of its own, and the model's run."""
    from diffusion_opt.recipes import Recipe, as_rung

    pipe = opening.open(model)
    run = asked.run(pipe)
    rungs = {Path(model).name: as_rung(pipe, run)}
    for other in against:
        if _is_recipe(other):
            recipe, pipe = Recipe.load(other), opening.open(model)
            recipe.apply(pipe)
        else:
            pipe = opening.open(other)
        name = Path(other).stem if _is_recipe(other) else Path(other).name
        if name in rungs:
            raise ValueError(f"two pipelines to measure are called {name}: give them different names")
        rungs[name] = as_rung(pipe, _left_to(pipe, asked).run(pipe))
    return rungs, run


def _left_to(pipe: "DiffusionPipeline", asked: Asked) -> Asked:
    """What is asked of a pipeline with a student or a solver on it: not the teacher's steps, nor its guidance."""
    from diffusion_opt.models.call_defaults import call_defaults

    own = call_defaults(pipe)
    distilled = bool(pipe.config.get("is_distilled")) or "sigmas" in own
    solved = "Solver" in pipe.__dict__.get("_diffusion_opt_undo", {})
    steps = None if distilled or solved or "num_inference_steps" in own else asked.steps
    guidance = None if distilled or "guidance_scale" in own else asked.guidance
    return replace(asked, steps=steps, guidance=guidance)


def _check_other(other: str) -> None:
    """Raise ValueError for a recipe that is not there, or a model that cannot be one."""
    if _is_recipe(other):
        if not Path(other).is_file():
            raise ValueError(f"--against {other} is not there")
    else:
        check_model(other)


def _is_recipe(other: str) -> bool:
    return other.endswith(".json")
