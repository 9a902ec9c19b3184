"""Train the network that reads portraits for the portraits judge, and measure it on pictures it has never seen.

    python benchmarks/train_portrait_reader.py
    python benchmarks/train_portrait_reader.py --train 400 --held-out 100 --test 100 --steps 20 --out runs/reader

Draws the pictures once (`--cache`), trains on degraded renders (`degrade.py`), resumes after an interruption, and
writes `<out>` (config, half-precision weights, SHA-256 sums) and `<results>`: accuracy per attribute on exact and on
degraded renders of the test split and of held-out combinations. It trains on held-out combinations as well: the reader
is a judge, and must read what the models it judges have never been trained with.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import tyro
from torch import Tensor

from diffusion_opt.datasets import write_sums
from diffusion_opt.datasets.portraits import Portrait, pictures, sample
from diffusion_opt.evaluation.judges.portraits.degrade import PatchComponents, degrade
from diffusion_opt.evaluation.judges.portraits.reader import NAMES, Reader, look, loss, save_reader, targets
from diffusion_opt.evaluation.machine import machine
from diffusion_opt.training import Role, TrainConfig, train

ROOT = Path(__file__).resolve().parents[1]
TRAIN_SEED, TEST_SEED = 1001, 0


@dataclass(frozen=True, slots=True)
class Settings:
    """How the reader is trained."""

    train: int = 9000  # pictures of the train split
    held_out: int = 3000  # pictures with held-out combinations
    test: int = 500  # pictures of the test split, and as many of unseen held-out portraits, to measure on
    steps: int = 750
    batch_size: int = 32
    learning_rate: float = 2e-3
    seed: int = 0
    threads: int = 1
    cache: Path = ROOT / "runs" / "portraits-pictures"
    work: Path = ROOT / "runs" / "portrait-reader"  # checkpoints
    out: Path = ROOT / "data" / "features" / "portraits"
    results: Path = ROOT / "benchmarks" / "results" / "portrait_reader.json"


@dataclass
class ReadingTask:
    """The task as the training loop takes it: degraded renders and what they show."""

    pixels: Tensor = field(repr=False)
    asked: dict[str, Tensor] = field(repr=False)
    components: PatchComponents = field(repr=False)
    roles: dict[str, Role]

    def turn(self, step: int) -> str:
        return "reader"

    def losses(self, generator: torch.Generator, batch_size: int, turn: str) -> dict[str, Tensor]:
        index = torch.randint(len(self.pixels), (batch_size,), generator=generator)
        exact = self.pixels[index].float() / 127.5 - 1
        seen = degrade(exact, self.components, generator).contiguous(memory_format=torch.channels_last)
        return {"loss": loss(self.roles["reader"].network(seen), {k: v[index] for k, v in self.asked.items()})}


def accuracy(reader: Reader, seen: Tensor, portraits: list[Portrait]) -> dict[str, float]:
    """Share of right values of each attribute, of all of them, and of portraits with every attribute right."""
    reading = look(seen, reader)
    found, given_style = reading.portraits(), reading.portraits([p.style for p in portraits])
    right = {name: [] for name in NAMES}
    for portrait, free, told in zip(portraits, found, given_style, strict=True):
        right["style"].append(free.style == portrait.style)
        for name, value in portrait.attributes().items():
            right[name].append(getattr(told, name) == value)
    shares = {name: sum(hits) / len(hits) for name, hits in right.items()}
    everything = [hit for hits in right.values() for hit in hits]
    perfect = sum(a == b for a, b in zip(found, portraits, strict=True)) / len(portraits)
    return {**shares, "all": sum(everything) / len(everything), "whole_portrait": perfect}


def measure(reader: Reader, settings: Settings, components: PatchComponents, seen: set[Portrait]) -> dict:
    """Accuracy on unseen portraits, as rendered and degraded."""
    report = {}
    for split in ("test", "held_out"):
        portraits = sample(settings.test, TEST_SEED, split)
        exact = pictures(settings.test, TEST_SEED, split, settings.cache).float() / 127.5 - 1
        fresh = [row for row, portrait in enumerate(portraits) if portrait not in seen]
        generator = torch.Generator().manual_seed(1)
        degraded = torch.cat([degrade(part, components, generator) for part in exact[fresh].split(10)])
        unseen = [portraits[row] for row in fresh]
        report[split] = {
            "pictures": len(fresh),
            "exact": accuracy(reader, exact[fresh], unseen),
            "degraded": accuracy(reader, degraded, unseen),
            "16 components": accuracy(reader, components.keep(exact[fresh], [16] * len(fresh)), unseen),
        }
    return report


def main(settings: Settings) -> None:
    torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    splits = (("train", settings.train), ("held_out", settings.held_out))
    portraits = [one for split, count in splits for one in sample(count, TRAIN_SEED, split)]
    pixels = torch.cat([pictures(count, TRAIN_SEED, split, settings.cache) for split, count in splits])
    components = PatchComponents.of(pixels[:: max(1, len(pixels) // 400)].float() / 127.5 - 1)
    network = Reader().to(memory_format=torch.channels_last)
    config = TrainConfig(
        steps=settings.steps,
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        warmup_steps=50,
        ema_decay=0.98,
        seed=settings.seed,
    )
    task = ReadingTask(pixels, targets(portraits), components, {"reader": Role(network)})
    result = train(task, config, settings.work)
    if not result.finished:
        raise SystemExit(result.exit_status)
    reader = result.ema.float().to(memory_format=torch.contiguous_format).eval().requires_grad_(False)
    save_reader(reader, settings.out)
    write_sums(settings.out)
    report = {
        "parameters": sum(p.numel() for p in reader.parameters()),
        "training_images": result.images,
        "training_s": round(result.seconds, 1),  # on the clock, over all resumed parts
        "accuracy": measure(reader, settings, components, set(portraits)),
        "settings": {k: v for k, v in asdict(settings).items() if not isinstance(v, Path)},
        "machine": machine(),
    }
    settings.results.parent.mkdir(parents=True, exist_ok=True)
    settings.results.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report["accuracy"], indent=2))


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
