"""What this package survives: `benchmarks/results/reliability.json`, printed by `diffusion-opt doctor --drill`.

    python benchmarks/reliability.py                         every section
    python benchmarks/reliability.py --only training         one of them; the others' rows stay
    python benchmarks/reliability.py --kills 20 --others 5   fewer tries

A section is a function that gives rows (`evaluation.drill.Outcome`): what was disturbed, how, how often, and what came
of it. The target of "wrong" is 0. Times do not matter here, so the machine may be busy.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import tyro

from diffusion_opt.caching import drill as states
from diffusion_opt.datasets import read_json, write_json
from diffusion_opt.evaluation import machine
from diffusion_opt.evaluation.drill import Outcome, table
from diffusion_opt.training import drill

RESULTS = Path(__file__).parent / "results" / "reliability.json"


@dataclass(frozen=True, slots=True)
class Settings:
    """What to run."""

    only: tuple[str, ...] = ()  # sections; none: all
    kills: int = 200  # of a training run
    others: int = 25  # tries of each other fault
    states: int = 240  # disturbances between two generations under a cache
    out: Path = RESULTS


def caches(settings: Settings) -> list[Outcome]:
    """Disturbances over the tiny full pipelines of the tests."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from tiny_pipelines import tiny_pipeline, tiny_run

    kinds = ("flux2-klein", "sd3", "wan", "ltx", "ltx2-cfg", "flux2-dev")
    subjects = {kind: states.Subject(partial(tiny_pipeline, kind), tiny_run(kind)) for kind in kinds}
    return states.drill(subjects, settings.states, compiled=True)


SECTIONS: dict[str, Callable[[Settings], list[Outcome]]] = {
    "training": lambda settings: drill.in_a_process(settings.kills, settings.others),
    "caches": caches,
}


def main(settings: Settings) -> None:
    """Run the sections and replace their rows in the results."""
    if unknown := set(settings.only) - SECTIONS.keys():
        raise ValueError(f"--only takes some of {', '.join(SECTIONS)}, got {sorted(unknown)[0]!r}")
    stored: dict[str, Any] = read_json(settings.out, "delete it") if settings.out.is_file() else {"sections": {}}
    for name in settings.only or SECTIONS:
        rows = SECTIONS[name](settings)
        print(table(rows))
        stored["sections"][name] = [row.as_dict() for row in rows]
        write_json(settings.out, {"machine": machine(), "sections": stored["sections"]}, indent=1)


if __name__ == "__main__":
    main(tyro.cli(Settings))
