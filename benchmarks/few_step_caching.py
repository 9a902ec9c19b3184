"""What caching still gives at 8, 4, 2 and 1 steps: `benchmarks/results/few_step_caching.json`.

    python benchmarks/few_step_caching.py

The teacher at 8 steps with two-pass guidance, and students that were really distilled: `fashion-4step` at its 4 steps
and at 2, `fashion-1step` at its 1. For each: the same model with fewer steps (the baseline), the best single step to
skip by reuse and by forecast (every choice is tried and the best is shown: kinder than any rule can be), TeaCache at
three thresholds, the guidance cache where there is a guidance pass, and the region cache on a stream of pictures.
Errors are relative L2 in [-1, 1] against the same model with all its passes; for fewer steps that is the price of
leaving the step out. MACs are exact, relative to that run; of a stream, those of the frames after the first. A run
without a step or pass to leave out has no row: that is the result there.
"""

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import tyro
from region_cache import SCENES, moving_patch, opened, relative
from torch import Tensor

from diffusion_opt.caching import PREDICTORS, FixedSchedule, GuidanceCache, TeaCache
from diffusion_opt.caching.region import StreamingRegionCache, stream
from diffusion_opt.evaluation import count, machine
from diffusion_opt.models import TinyFlux2Pipeline
from diffusion_opt.recipes.recipe import Technique

PATH = Path(__file__).parent / "results" / "few_step_caching.json"
MODELS = (("fashion", 8), ("fashion-4step", 4), ("fashion-4step", 2), ("fashion-1step", 1))
THRESHOLDS = (0.1, 0.3, 0.6)
PER_CLASS = 4
STREAM_SCENE, STRENGTH = "canvas, patch of 2 x 2 tokens", 0.5


def sample(pipe: TinyFlux2Pipeline, steps: int) -> Tensor:
    """Four pictures of each class."""
    prompts = [str(label) for label in range(10) for _ in range(PER_CLASS)]
    generator = torch.Generator().manual_seed(0)
    return pipe(prompts, steps, generator=generator, output_type="pt").images


def with_technique(pipe: TinyFlux2Pipeline, technique: Technique, steps: int) -> tuple[Tensor, int]:
    """Pictures and MACs."""
    technique.apply(pipe)
    images = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # "skipped none": it stands in the table
        macs = count(lambda: images.append(sample(pipe, steps))).macs
    technique.remove(pipe)
    return images[0], macs


def candidates(pipe: TinyFlux2Pipeline, steps: int) -> Iterator[tuple[str, list[Technique]]]:
    """Techniques by kind; of each kind the best counts."""
    skips = [tuple(i != skipped for i in range(steps)) for skipped in range(1, steps)]
    for predictor in ("reuse", "forecast"):
        least = PREDICTORS[predictor].num_anchors
        fitting = [FixedSchedule(mask, predictor) for mask in skips if mask.index(False) >= least]
        if fitting:
            yield f"best single step skipped, {predictor}", fitting
    for threshold in THRESHOLDS if steps > 1 else ():
        yield f"TeaCache {threshold}, reuse", [TeaCache(threshold, "reuse")]
    if pipe.do_classifier_free_guidance and steps > 1:
        yield "guidance at every 2nd step, reuse", [GuidanceCache(2, "reuse")]
        yield "guidance at every 2nd step, forecast", [GuidanceCache(2, "forecast")]


def generation(model: str, steps: int) -> list[dict[str, Any]]:
    """One generation: fewer steps, step caches, guidance cache."""
    pipe = opened(model)
    exact, rows = sample(pipe, steps), []
    dense_macs = count(lambda: sample(pipe, steps)).macs
    if steps > 1:
        fewer, macs = sample(pipe, steps - 1), count(lambda: sample(pipe, steps - 1)).macs
        rows.append({"technique": "one step fewer", "error": relative([fewer], [exact]), "macs": macs / dense_macs})
    for kind, techniques in candidates(pipe, steps):
        tried = (with_technique(pipe, technique, steps) for technique in techniques)
        error, macs, technique = min(
            (relative([images], [exact]), macs, technique.describe())
            for (images, macs), technique in zip(tried, techniques, strict=True)
        )
        rows.append({"technique": kind, "setting": technique, "error": error, "macs": macs / dense_macs})
    return [{"model": model, "steps": steps, **row} for row in rows]


def streaming(model: str, steps: int) -> dict[str, Any]:
    """A stream of pictures in which a patch moves; as many network evaluations per frame as the run has steps."""
    pipe = opened(model)
    background, top, size = SCENES[STREAM_SCENE]
    images, prompts = background()
    frames = moving_patch(images, top, size)
    run = {"prompt": prompts, "steps": steps, "strength": STRENGTH}

    def frames_and_macs() -> tuple[list[Tensor], int]:
        source, out, macs = stream(pipe, frames, **run), [], 0
        for i in range(len(frames)):
            spent = count(lambda: out.append(next(source))).macs
            macs += spent if i else 0
        return out, macs

    exact, dense_macs = frames_and_macs()
    cache = StreamingRegionCache(ring=1, probe=0.0)
    cache.apply(pipe)
    cached, macs = frames_and_macs()
    return {
        "model": model,
        "steps": steps,
        "technique": "region cache, ring 1",
        "setting": f"{STREAM_SCENE}, strength {STRENGTH}",
        "error": relative(cached[1:], exact[1:]),
        "error_of_repeating": relative(exact[:-1], exact[1:]),
        "macs": macs / dense_macs,
    }


@torch.no_grad()
def main() -> None:
    """Measure and store."""
    rows = []
    for model, steps in MODELS:
        rows += [*generation(model, steps), streaming(model, steps)]
        for row in [row for row in rows if (row["model"], row["steps"]) == (model, steps)]:
            print(
                {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}, flush=True
            )
    PATH.parent.mkdir(exist_ok=True)
    PATH.write_text(json.dumps({"machine": machine(), "samples": 10 * PER_CLASS, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    tyro.cli(main)
