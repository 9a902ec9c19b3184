"""Every shipped model under several judges: the fashion classifier, the independent network, and plain statistics.

    python benchmarks/judges.py        all of them; what was measured before with the same weights stays
    python benchmarks/judges.py fashion-1step runs/mine/pipeline --samples 500

The teacher is measured as it comes, and once more as it is best used: 12 second-order steps with guidance from t = 0.3
to 0.9. Noise and classes of all are the same, and of a seed that no training and no choice of settings used. Results
stand in `benchmarks/results/judges.json`, by model, each with the fingerprint of its weights. `--seed` and `--samples`
are for choosing settings: they print and store nothing.
"""

import json
from pathlib import Path
from typing import Annotated

import torch
import tyro
from diffusers import DiffusionPipeline
from torch import Tensor
from tqdm import tqdm

from diffusion_opt import load
from diffusion_opt.caching import GuidanceCache
from diffusion_opt.datasets import write_json
from diffusion_opt.evaluation import machine
from diffusion_opt.evaluation.judges import at_teacher_quality, judged
from diffusion_opt.evaluation.judges.judge import Number
from diffusion_opt.models import SHIPPED
from diffusion_opt.models.fingerprint import identity
from diffusion_opt.recipes import Recipe, Solver
from diffusion_opt.subjects import denoisers

RESULTS = Path(__file__).parent / "results" / "judges.json"
JUDGES = ("fashion", "imagenet", "statistics")
BEST = "12 second-order steps, guidance from 0.3 to 0.9"
SEED, SAMPLES = 77_000_000, 1000


def pictures(pipe: DiffusionPipeline, num: int, seed: int, batch_size: int = 100) -> Tensor:
    """`num` pictures (n, 1, s, s) in [-1, 1], classes 0, 1, … in turn, a generator for each batch."""
    made = []
    for start in tqdm(range(0, num, batch_size), unit="batch", leave=False):
        labels = [index % pipe.class_embedder.num_classes for index in range(start, min(start + batch_size, num))]
        generator = torch.Generator().manual_seed(seed + start)
        made.append(pipe(prompt=labels, generator=generator, output_type="pt").images * 2 - 1)
    return torch.cat(made)


def opened(name: str) -> DiffusionPipeline:
    """A model by shipped name or folder, or the teacher with the recipe of its best use."""
    teacher, _, how = name.partition(": ")
    pipe = load(teacher)
    if how:
        Recipe((Solver(12), GuidanceCache(every=1, interval=(0.3, 0.9)))).apply(pipe)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def line(name: str, found: dict[str, Number]) -> str:
    """One line of a table."""
    fashion, imagenet = found["fashion.distance"], found["imagenet.distance"]
    return (
        f"{name:52} fashion {fashion.value:5.2f} (real {fashion.real:.2f}) recall {found['fashion.recall'].value:.3f}  "
        f"imagenet {imagenet.value:6.1f} (real {imagenet.real:.1f}) recall {found['imagenet.recall'].value:.3f}  "
        f"high frequencies {found['statistics.high_frequency'].value:.3f}  "
        f"total variation {found['statistics.total_variation'].value:.3f}"
    )


def main(
    models: Annotated[tuple[str, ...], tyro.conf.Positional] = (),
    samples: int = SAMPLES,
    seed: int = SEED,
) -> None:
    """Measure models and print them side by side.

    Args:
        models: shipped names or folders; default: all shipped models, and the teacher at its best.
        samples: pictures of each.
        seed: of the noise.
    """
    stored = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"models": {}}
    keep = (samples, seed) == (SAMPLES, SEED)
    for name in models or (*SHIPPED, f"fashion: {BEST}"):
        pipe = opened(name)
        weights = identity(denoisers(pipe)).describe()
        known = stored["models"].get(name)
        if known is None or known["weights"] != weights or not keep:
            real = "fashion-micro" if pipe.vae.config.sample_size == 16 else "fashion"
            found = judged(JUDGES, pictures(pipe, samples, seed), torch.arange(samples) % 10, real=real)
            known = {"weights": weights, "numbers": {key: number.to_dict() for key, number in found.items()}}
            if keep and not Path(name).is_dir():
                stored["models"][name] = known
                stored |= {"samples": samples, "seed": seed, "machine": machine()}
                write_json(RESULTS, stored)
        numbers = {key: Number(**number) for key, number in known["numbers"].items()}
        print(line(name, numbers), flush=True)
        teacher = stored["models"].get("fashion")
        if keep and teacher and name != "fashion" and "micro" not in name:
            print(at_teacher_quality(numbers, {key: Number(**n) for key, n in teacher["numbers"].items()}), flush=True)


if __name__ == "__main__":
    with torch.no_grad():
        tyro.cli(main)
