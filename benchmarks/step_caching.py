"""Step caches against everything else at equal cost: `benchmarks/results/step_caching.json`.

    python benchmarks/step_caching.py                                  everything
    python benchmarks/step_caching.py --only "fewer Euler steps" "searched, forecast" --quality-samples 0

The shipped teacher at its own 50 steps and guidance, at budgets of 20, 15, 10 and 7 full steps: exact arithmetic and
errors of every policy (`diffusion_opt.caching.comparison.compare`), and for the plain runs, the searched schedules and
the teacher FD (fashion features) on more samples and times taken in turns. Lines and FD are kept as they are made in
`runs/step_caching-<model>.json`; call it again and it goes on where it stopped. A kept file of another protocol is
refused.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich.console import Console

from diffusion_opt.caching.comparison.compare import Comparison, Line, conclude, lines, timed_name, timings
from diffusion_opt.caching.comparison.contest import Contest, Setting
from diffusion_opt.caching.schedules.search import SearchSettings
from diffusion_opt.evaluation import quality
from diffusion_opt.models import load

RESULTS = Path(__file__).parent / "results"
KEPT = Path(__file__).parent.parent / "runs"
MAIN = ("fewer steps", "searched")  # groups that are timed and judged by FD


@dataclass
class Kept:
    """What is made already, under one protocol; saved after each addition."""

    path: Path
    protocol: dict[str, Any]
    lines: dict[tuple[str, int], Line] = field(default_factory=dict)
    quality: dict[str, dict[str, float]] = field(default_factory=dict)

    def read(self) -> None:
        """Raises ValueError if what lies there was made under another protocol."""
        if not self.path.is_file():
            return
        stored = json.loads(self.path.read_text())
        if stored["protocol"] != self.protocol:
            raise ValueError(f"{self.path} was made with {stored['protocol']}, this is {self.protocol}: move it away")
        found = [Line(**line) for line in stored["lines"]]
        self.lines = {(line.policy, line.budget): line for line in found}
        self.quality = stored["quality"]

    def write(self) -> None:
        self.path.parent.mkdir(exist_ok=True)
        stored = [asdict(line) for line in self.lines.values()]
        self.path.write_text(json.dumps({"protocol": self.protocol, "lines": stored, "quality": self.quality}))


def judged(contest: Contest, setting: Setting, number: int) -> dict[str, float]:
    """FD of a setting with its interval, on `number` samples."""
    latents = contest.outputs(setting, number)
    images = contest.pipe.vae.decode(latents, return_dict=False)[0]
    labels = contest.pipe.class_embedder.labels(
        [contest.run.prompts[i % len(contest.run.prompts)] for i in range(number)]
    )
    found = quality(images, labels)
    return {"distance": found.distance, "low": found.distance_low, "high": found.distance_high, "floor": found.floor}


def wanted(contest: Contest, made: list[tuple[Line, Setting | None]]) -> Iterator[tuple[str, Setting]]:
    """Names and settings to judge by FD: the teacher, and its searched schedules."""
    yield "full", contest.full("euler")
    for line, setting in made:
        if setting is not None and line.policy == "searched, forecast":
            yield timed_name(line), setting


def report(comparison: Comparison, kept: Kept) -> None:
    """Print the table, FD and the targets."""
    console = Console()
    console.print(comparison.table())
    for name, found in kept.quality.items():
        change = found["distance"] / kept.quality["full"]["distance"] - 1
        print(f"FD {found['distance']:.3f} [{found['low']:.3f}, {found['high']:.3f}] {change:+.1%}  {name}")
    for name, (macs, seconds) in comparison.time_ratios().items():
        print(f"arithmetic {macs:.3f}, time {seconds:.3f} of the teacher's: {seconds / macs - 1:+.0%}  {name}")
    for budget in comparison.budgets:
        for judge in ("euler", "adams_bashforth2", "ode"):
            others, ours = (comparison.best(budget, judge, mine) for mine in (False, True))
            print(
                f"{budget:3} steps, {judge}: {ours.errors[judge]:.4f} {ours.policy} | "
                f"{others.errors[judge]:.4f} {others.policy}"
            )


@torch.no_grad()
def main(
    model: Annotated[str, tyro.conf.Positional] = "fashion",
    samples: int = 40,
    budgets: tuple[int, ...] = (20, 15, 10, 7),
    only: tuple[str, ...] = (),
    trials: int = 40,
    amplify_every: int = 5,
    fine_steps: int = 200,
    quality_samples: int = 500,
    rounds: int = 5,
    seed: int = 30_000,
    batch_size: int = 8,
) -> None:
    """Measure and store.

    Args:
        model: shipped name or folder.
        samples: held-out noises behind each error.
        budgets: full steps.
        only: policies to run; default: all.
        trials: runs of the climb for each schedule.
        amplify_every: how densely the growth of errors is measured for dynamic programming; 0: not at all.
        fine_steps: of the finely solved path.
        quality_samples: images behind each FD; 0: none.
        rounds: turns of timing; 0: none.
        seed: of the held-out noises.
        batch_size: images a call, also in the timing.
    """
    pipe = load(model)
    pipe.set_progress_bar_config(disable=True)
    contest = Contest(pipe, num_samples=samples, seed=seed, batch_size=batch_size, fine_steps=fine_steps)
    search = SearchSettings(trials=trials, amplify_every=amplify_every)
    protocol = {
        "model": Path(model).name,
        "samples": samples,
        "fine_steps": fine_steps,
        "quality_samples": quality_samples,
        "seed": seed,
        "search": asdict(search),
    }
    kept = Kept(KEPT / f"step_caching-{Path(model).name}.json", protocol)
    kept.read()
    made = []
    for line, setting in lines(contest, budgets, search, only or None, kept.lines):
        made.append((line, setting))
        kept.lines[line.policy, line.budget] = line
        kept.write()
        print(line.budget, line.policy, line.reason or f"{line.spent:.2f} {line.errors}", flush=True)
    for name, setting in wanted(contest, made) if quality_samples else ():
        if name not in kept.quality:
            kept.quality[name] = judged(contest, setting, quality_samples)
            kept.write()
            print(f"FD {kept.quality[name]['distance']:.3f} {name}", flush=True)
    settings = {timed_name(line): setting for line, setting in made if setting is not None and line.group in MAIN}
    seconds = timings(contest, settings, rounds) if rounds else {}
    comparison = conclude(contest, [line for line, _ in made], seconds)
    stored = {"protocol": protocol, "comparison": asdict(comparison), "quality": kept.quality}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "step_caching.json").write_text(json.dumps(stored, indent=1) + "\n")
    report(comparison, kept)


if __name__ == "__main__":
    tyro.cli(main)
