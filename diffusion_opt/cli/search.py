"""`diffusion-opt search`: the fastest recipe within a loss, for any pipeline and the user's prompts.

    diffusion-opt search fashion                                  the fastest within 5 % of the teacher
    diffusion-opt search DIR --prompts prompts.txt --cost time --tolerance 0.1 --out runs/mine

Run it again with the same settings and it goes on where it stopped.
"""

import shlex
import sys
from pathlib import Path
from typing import Literal

from diffusion_opt.cli.options import ASKED, OPENING, RUNS, Asked, MaybeText, Model, Opening, Texts, writable
from diffusion_opt.names import SHIPPED, check_name


def search(
    model: Model,
    asked: Asked = ASKED,
    opening: Opening = OPENING,
    cost: Literal["macs", "time"] = "macs",
    tolerance: float = 0.05,
    judge: MaybeText = None,
    verdict: MaybeText = None,
    real: MaybeText = None,
    students: Texts = (),
    trials: int = 60,
    samples: int = 16,
    survivors: int = 6,
    verdict_samples: int = 200,
    beside: tuple[Path, ...] = (),
    out: Path = RUNS / "search",
) -> None:
    """Search the joint space of recipes that this pipeline takes; survivors are judged by another judge on new noise.

    Writes search.json, front.png, pick.json (the answer, for `apply --recipe`) and a recipe for each survivor.

    Args:
        model: shipped name, folder or hub name.
        cost: what to make small: exact arithmetic, the same on every machine, or time on this one.
        tolerance: how much worse than the teacher a recipe may be, as a share.
        judge: the number that the search looks at. Default: fashion.distance of a shipped model, else paired.pixel.
        verdict: another judge's number, for what was found. Default: imagenet.distance, else paired.perceptual.
        real: real pictures for judges that need them: a folder, or a shipped name.
        students: students that may take the network's place. Default: those shipped with a shipped model.
        trials: recipes that are looked at; those of an earlier run in --out count.
        samples: samples of a trial.
        survivors: recipes of the front that are measured in full.
        verdict_samples: samples of each survivor.
        beside: recipes (JSON files) to measure with the survivors, unsearched.
        out: folder of the study and of what it found.
    """
    opening.check(model)
    asked.check(model)
    for path in beside:
        if not path.is_file():
            raise ValueError(f"--beside {path} is not there")
    for student in students:
        check_name(student)
    writable(out)
    from rich.console import Console

    from diffusion_opt.recipes import Recipe
    from diffusion_opt.recipes.search import Budget, Objective, report
    from diffusion_opt.recipes.search import search as find

    if not students and model in SHIPPED:
        students = tuple(one.name for one in SHIPPED.values() if one.teacher == model and one.quantized_from is None)
    budget = Budget(trials, samples, survivors, verdict_samples, seed=asked.seed)
    pipe = opening.open(model)
    objective = Objective.for_pipeline(
        pipe, cost=cost, tolerance=tolerance, judge=judge, verdict=verdict, real=real, students=students
    )
    found = find(
        pipe, objective, budget, run=asked.run(pipe), folder=out,
        beside={path.stem: Recipe.load(path) for path in beside},
    )  # fmt: skip
    report.write(found, out, f"diffusion-opt {shlex.join(sys.argv[1:])}")
    console = Console()
    console.print(report.table(found))
    for line in report.words(found):
        console.print(line, highlight=False, markup=False)
    print(f"put it on and save it: diffusion-opt apply {model} --recipe {out / 'pick.json'} --out {out / 'pipeline'}")
