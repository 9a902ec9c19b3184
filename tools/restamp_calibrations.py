"""Bring cache calibrations of an earlier version up to this one: schedules, error bounds and calibrations of a model.

    python tools/restamp_calibrations.py data/caching/fashion-*.json --model fashion

Earlier files name their model by `models.fingerprint.fingerprint`, which looks at what lies outside the blocks, and say
neither where the run begins nor which size a sample has. Here the model is opened, must be the one that a file names,
is asked for its identity, and runs one step to show the size. What was measured is not touched.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import tyro

from diffusion_opt.caching.calibration.calibrated_run import CalibratedRun, watched
from diffusion_opt.datasets import write_sums, write_text
from diffusion_opt.models import load
from diffusion_opt.models.fingerprint import fingerprint
from diffusion_opt.subjects import Run


def restamped(stored: dict, before: str, now: CalibratedRun) -> dict:
    """The contents of a file with today's name of its model. Raises ValueError if it is of another model."""
    run = stored["run"]
    if run["model"] != before:
        raise ValueError(f"this file is of model {run['model']}, the model given is {before}")
    if "magnitude_ratios" in stored:
        stored |= {"further": []}
    return stored | {"run": run | {"model": now.model, "begin": 0, "size": list(now.size)}}


def main(files: Annotated[tuple[Path, ...], tyro.conf.Positional], model: str = "fashion") -> None:
    """Rewrite the files in place, and the checksums of their folders.

    Args:
        files: written by an earlier version.
        model: shipped name or folder of the model that they are of.
    """
    pipe = load(model)
    pipe.set_progress_bar_config(disable=True)
    run = replace(Run.for_pipeline(pipe), num_inference_steps=1)
    with watched(pipe) as watch:
        run.generate(pipe, [0])
        now = watch.run()
    before = fingerprint(pipe.transformer)
    for file in files:
        text = file.read_text()
        indent = 1 if text.startswith("{\n") else None
        write_text(file, json.dumps(restamped(json.loads(text), before, now), indent=indent) + "\n")
        print(f"{file}: model {before} is now {now.model}")
    for folder in {file.parent for file in files if (file.parent / "SHA256SUMS").is_file()}:
        write_sums(folder)


if __name__ == "__main__":
    tyro.cli(main)
