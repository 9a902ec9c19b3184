"""How much data a student needs, how specific, and what it forgets: `benchmarks/results/distillation_data.json`.

    python benchmarks/data_study.py                    all rows that the results lack

The question of anyone with a trained model and few pictures. Teacher, budget and measures are those of
`distillation_methods.py`, with less CPU time each. Methods differ in what they want of images: stored paths and
distribution matching want none; to the flow map they are places, since the teacher says what is right there;
consistency training and a GAN head learn what the images show. They get from 100 to 60,000 images (a smaller number is
a part of a larger one), of all classes; or those of three classes only, once shoes and once tops.

All students are asked for all ten classes. Beside the figures of `distillation_methods.py` a row has, for each class,
FD to the real images of that class, the share of those that its samples cover, and class agreement; and the means over
classes that were in the images (`seen`) and those that were not (`unseen`): what it forgot.
"""

import json
from pathlib import Path
from typing import Any

import torch
import tyro
from distillation_methods import GUIDANCE, RUNS, TEACHER, Row, figures, make, served
from jaxtyping import Float, Int
from torch import Tensor

from diffusion_opt.datasets import FASHION_CLASSES
from diffusion_opt.distillation.methods import METHODS
from diffusion_opt.evaluation import (
    embed,
    frechet_distance,
    load_features,
    load_reference,
    machine,
    moments,
    precision_recall,
    quality,
)
from diffusion_opt.models import TinyFlux2Pipeline, load
from diffusion_opt.recipes import Solver

PATH = Path(__file__).parent / "results" / "distillation_data.json"
FEATURES = "fashion-micro"
SHOES = ("sandal", "sneaker", "ankle boot")
TOPS = ("pullover", "coat", "shirt")
STUDIED = (  # method, steps, start, numbers of images
    ("consistency_training", 1, None, (100, 1_000, 10_000, 60_000)),
    ("flow_map", 4, None, (100, 1_000, 60_000)),
    ("dmd2_gan", 1, "ode", (100, 60_000)),
)


def rows() -> list[Row]:
    """Data-free methods first, then each studied one with more and more images, then with some classes."""
    made = [Row("ode", "ode", 1, group="none"), Row("dmd2", "dmd2", 1, "ode", group="none")]
    for method, steps, start, numbers in STUDIED:
        for number in numbers:
            made.append(Row(f"{method}, {number} images", method, steps, start, "number", num_images=number))
        for name, classes in (("shoes", SHOES), ("tops", TOPS)):
            made.append(Row(f"{method}, {name} only", method, steps, start, "classes", classes=classes))
    return made


def sampled(pipe: TinyFlux2Pipeline, steps: int, samples: int, batch_size: int) -> Float[Tensor, "n 1 s s"]:
    """Balanced samples in [-1, 1], the same noise for all; classes repeat 0, 1, …, 9."""
    pipe.set_progress_bar_config(disable=True)
    labels = torch.arange(samples) % 10
    return torch.cat(
        [
            pipe(part.tolist(), steps, generator=torch.Generator().manual_seed(i), output_type="pt").images * 2 - 1
            for i, part in enumerate(labels.split(batch_size))
        ]
    )


def by_class(images: Float[Tensor, "n 1 s s"], labels: Int[Tensor, " n"]) -> dict[str, dict[str, float]]:
    """FD, recall and class agreement within each class, against its stored real test images."""
    features, logits = embed(load_features(FEATURES), images)
    real, found = load_reference(FEATURES).examples.float(), {}
    for label, name in enumerate(FASHION_CLASSES):
        mine, theirs = features[labels == label], real[label::10]
        found[name] = {
            "distance": frechet_distance(*moments(mine), *moments(theirs)).item(),
            "recall": precision_recall(theirs[: len(mine)], mine)[1],
            "class_agreement": (logits[labels == label].argmax(1) == label).double().mean().item(),
        }
    return found


def mean_over(found: dict[str, dict[str, float]], classes: tuple[str, ...]) -> dict[str, float]:
    """The means of `by_class` over some classes."""
    return {key: sum(found[name][key] for name in classes) / len(classes) for key in next(iter(found.values()))}


def measured(pipe: TinyFlux2Pipeline, steps: int, seen: tuple[str, ...], samples: int, batch: int) -> dict[str, Any]:
    """All figures of a student at a step count."""
    images, labels = sampled(pipe, steps, samples, batch), torch.arange(samples) % 10
    found = by_class(images, labels)
    line = figures(quality(images, labels)) | {"classes": found, "seen": mean_over(found, seen)}
    unseen = tuple(name for name in FASHION_CLASSES if name not in seen)
    return line | ({"unseen": mean_over(found, unseen)} if unseen else {})


def measure(row: Row, budget: float, samples: int, batch: int) -> dict[str, Any]:
    """Make the student of a row and measure it."""
    folder = RUNS / f"data-{budget:g}s" / row.name.replace(", ", "-").replace(" ", "-")
    spent, seen = make(row, budget, folder), row.classes or FASHION_CLASSES
    pipe, method = load(folder / "pipeline"), METHODS[row.method]
    steps = {str(n): measured(p, n, seen, samples, batch) for n, p in served(pipe, folder) if n != 2}
    return {
        "name": row.name,
        "group": row.group,
        "method": row.method,
        "images_used": method.images,
        "num_images": 0 if method.images == "none" else row.num_images,
        "trained_classes": list(seen),
        **spent,
        "steps": steps,
    }


def main(
    budget: float = 30,
    samples: int = 2000,
    batch_size: int = 200,
    only: tuple[str, ...] = (),
    results: Path = PATH,
) -> None:
    """Make and measure what the results lack.

    Args:
        budget: CPU seconds of one thread for a student.
        samples: images behind each figure.
        batch_size: images a call when sampling.
        only: beginnings of the names of the rows to make; none: all.
        results: the file to fill.
    """
    torch.set_num_threads(1)
    report = json.loads(results.read_text()) if results.is_file() else {"rows": []}
    settings = {"teacher": TEACHER, "guidance": GUIDANCE, "budget_s": budget, "samples": samples}
    if report["rows"] and any(report[name] != value for name, value in settings.items()):
        raise SystemExit(f"{results} holds rows of another protocol than {settings}; move it away to start anew")
    report |= settings | {"machine": machine()}

    def add(line: dict[str, Any]) -> None:
        report["rows"].append(line)
        results.write_text(json.dumps(report, indent=2) + "\n")
        print(line["name"], {n: round(found["distance"], 2) for n, found in line["steps"].items()}, flush=True)

    known = {line["name"] for line in report["rows"]}
    if "teacher" not in known:
        pipe = Solver(16).apply(load(TEACHER))
        pipe.register_to_config(default_guidance=GUIDANCE)
        found = measured(pipe, 16, FASHION_CLASSES, samples, batch_size)
        add({"name": "teacher", "group": "teacher", "steps": {"16": found}})
    for row in rows():
        if row.name not in known and (not only or row.name.startswith(only)):
            add(measure(row, budget, samples, batch_size))


if __name__ == "__main__":
    tyro.cli(main)
