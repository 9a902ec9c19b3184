"""Train the small classifiers in whose features image quality is measured, and compute their reference statistics.

    python benchmarks/train_features.py                      # both networks, a few minutes on one core
    python benchmarks/train_features.py --names fashion-micro --epochs 2 --out runs/features

Writes `<out>/<name>/` (config, weights, reference, SHA-256 sums) and `<results>` (accuracy, floors, cost, machine).
Seeded, one thread by default: the same machine and versions give the same weights.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from diffusion_opt.datasets import ImageData, load_fashion_mnist, write_sums
from diffusion_opt.evaluation.features import FEATURES_BY_SIZE, FashionFeatures, FeatureConfig, embed, save_features
from diffusion_opt.evaluation.machine import machine
from diffusion_opt.evaluation.reference import floor_distance, make_reference, save_references

ROOT = Path(__file__).resolve().parents[1]
FLOOR_COUNTS = (1000, 2000, 5000, 10_000)


@dataclass(frozen=True, slots=True)
class Settings:
    """How the classifiers are trained."""

    names: tuple[str, ...] = tuple(FEATURES_BY_SIZE.values())
    epochs: int = 8
    batch_size: int = 128
    peak_learning_rate: float = 4e-3  # one-cycle schedule, AdamW
    weight_decay: float = 0.05
    noise: float = 0.1  # largest deviation of the noise added to an image, in units of [-1, 1]
    max_shift: int = 2  # pixels at 28x28, half of it at 16x16
    seed: int = 0
    threads: int = 1
    out: Path = ROOT / "data" / "features"
    results: Path = ROOT / "benchmarks" / "results" / "features.json"


def augment(images: Tensor, shift: int, noise: float, generator: torch.Generator) -> Tensor:
    """Move each image by up to `shift` pixels and add noise of a random strength; no mirroring (shoes point left)."""
    size, count = images.shape[-1], len(images)
    padded = F.pad(images, (shift,) * 4, value=-1.0)
    rows, columns = torch.randint(2 * shift + 1, (2, count, 1), generator=generator) + torch.arange(size)
    moved = padded[torch.arange(count)[:, None, None], 0, rows[:, :, None], columns[:, None, :]][:, None]
    strength = noise * torch.rand(count, 1, 1, 1, generator=generator)
    return moved + strength * torch.randn(moved.shape, generator=generator)


def train(name: str, data: ImageData, settings: Settings) -> FashionFeatures:
    """Train one classifier on `data`."""
    size = data.images.shape[-1]
    torch.manual_seed(settings.seed)
    generator = torch.Generator().manual_seed(settings.seed)
    network = FashionFeatures(FeatureConfig(name, size)).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=settings.weight_decay)
    steps = len(data) // settings.batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.peak_learning_rate, epochs=settings.epochs, steps_per_epoch=steps
    )
    shift = settings.max_shift if size == 28 else settings.max_shift // 2
    progress = tqdm(total=settings.epochs * steps, desc=f"train {name}", unit="step", mininterval=2.0)
    for _ in range(settings.epochs):
        order = torch.randperm(len(data), generator=generator)
        for indices in order.split(settings.batch_size)[:steps]:
            images = augment(data.images[indices], shift, settings.noise, generator)
            logits = network.classify(network(images.contiguous(memory_format=torch.channels_last)))
            loss = F.cross_entropy(logits, data.labels[indices], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            progress.update()
        progress.set_postfix(loss=f"{loss.item():.3f}")
    progress.close()
    return network.to(memory_format=torch.contiguous_format).eval().requires_grad_(False)


def accuracy(network: FashionFeatures, data: ImageData) -> float:
    """Share of images whose class the network gets right."""
    _, logits = embed(network, data.images)
    return (logits.argmax(1) == data.labels).double().mean().item()


def make(name: str, size: int, settings: Settings) -> dict:
    """Train one network, write its folder, and return what was measured."""
    splits = {split: load_fashion_mnist(split, size=size) for split in ("test", "train")}
    start = time.process_time()
    network = train(name, splits["train"], settings)
    cpu_s = time.process_time() - start
    save_features(network, settings.out / name)
    test, train_set = (make_reference(network, data, split) for split, data in splits.items())
    save_references([test, train_set], settings.out / name)
    write_sums(settings.out / name)
    return {
        "name": name,
        "image_size": size,
        "num_parameters": sum(p.numel() for p in network.parameters()),
        "num_features": network.num_features,
        "test_accuracy": accuracy(network, splits["test"]),
        "train_accuracy": accuracy(network, splits["train"]),
        "floor": {str(count): floor_distance(test, train_set, count) for count in FLOOR_COUNTS},
        "training_cpu_s": round(cpu_s, 1),
    }


def main(settings: Settings) -> None:
    torch.set_num_threads(settings.threads)
    sizes = {name: size for size, name in FEATURES_BY_SIZE.items()}
    if unknown := set(settings.names) - set(sizes):
        raise SystemExit(f"unknown network {sorted(unknown)[0]!r}; choose from {sorted(sizes)}")
    networks = [make(name, sizes[name], settings) for name in settings.names]
    recipe = {key: getattr(settings, key) for key in Settings.__slots__ if key not in ("names", "out", "results")}
    report = {"networks": networks, "settings": recipe, "machine": machine()}
    settings.results.parent.mkdir(parents=True, exist_ok=True)
    settings.results.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(networks, indent=2))


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
