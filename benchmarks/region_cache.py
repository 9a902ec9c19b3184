"""What the region cache computes, saves and costs: `benchmarks/results/region_cache.json`.

    python benchmarks/region_cache.py

Cost: exact MACs and time of one pass over a share of 1,024 tokens (hidden size 256, random weights), beside the model
(active + text) / all. Memory: slots of real models. Streaming: a dark patch that moves by one token a frame, over ten
garments at their own size (7 x 7 tokens) and over four garments on a canvas (14 x 14 tokens, with positions that the
weights have not seen); error against the same frame computed in full, and what showing the frame before again would
err. Edit: a region made anew, error inside it. Generation: tokens that moved most against a step cache, at equal work.
All errors are relative L2 of the pictures in [-1, 1], the mean over frames.
"""

import json
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor

from diffusion_opt.caching import FixedInterval
from diffusion_opt.caching.region import (
    MODEL_SIZES,
    EditRegionCache,
    GenerationRegionCache,
    StreamingRegionCache,
    edit,
    region_report,
    set_region,
    slot_bytes,
    slot_table,
    stream,
)
from diffusion_opt.datasets import load_fashion_mnist
from diffusion_opt.evaluation import count, interleaved, machine
from diffusion_opt.models import TinyFlux2Config, TinyFlux2Pipeline, build_pipeline, load, position_ids

PATH = Path(__file__).parent / "results" / "region_cache.json"
SIDE = 32  # tokens a side where cost is measured
SHARES = (1.0, 0.5, 0.25, 0.125)
FRAMES = 4
RUNS = (  # model, steps of a frame, strength
    ("fashion", 8, 0.5),
    ("fashion", 4, 0.5),
    ("fashion", 2, 0.5),
    ("fashion", 1, 0.5),
    ("fashion-4step", 3, 0.75),  # the times it was trained at
    ("fashion-4step", 2, 0.5),
    ("fashion-4step", 1, 0.25),
    ("fashion-1step", 1, 0.5),  # trained at time 1 alone: its pictures keep noise
)


RINGS = {f"ring {ring}": StreamingRegionCache(ring=ring, probe=0.0) for ring in (0, 1, 2)}
VARIANTS = {
    "ring 1, full every 3 frames": StreamingRegionCache(refresh_every=3, probe=0.0),
    "ring 1, probe 10 %, alarm 0.1": StreamingRegionCache(probe=0.1, alarm=0.1),
    "ring 1, bf16 slots": StreamingRegionCache(probe=0.0, precision="bf16"),
    "ring 1, fp8 slots": StreamingRegionCache(probe=0.0, precision="fp8"),
}


def opened(model: str) -> TinyFlux2Pipeline:
    pipe = load(model)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def relative(images: Iterable[Tensor], exact: Iterable[Tensor]) -> float:
    """Mean over frames of the relative L2, in [-1, 1]."""
    errors = [float(2 * (a - b).norm() / (2 * b - 1).norm()) for a, b in zip(images, exact, strict=True)]
    return sum(errors) / len(errors)


def garments(labels: Iterable[int], number: int = 0) -> Tensor:
    data = load_fashion_mnist("test")
    return torch.stack([data.images[data.labels == label][number] for label in labels])


def own_size() -> tuple[Tensor, list[str]]:
    """Ten garments and their prompts."""
    return garments(range(10)), [str(label) for label in range(10)]


def on_canvas() -> tuple[Tensor, list[str]]:
    """Two canvases of four garments, without a prompt."""
    canvases = []
    for number, labels in enumerate(((0, 7, 8, 5), (2, 9, 1, 3))):
        a, b, c, d = garments(labels, number)
        canvases.append(torch.cat([torch.cat([a, b], dim=2), torch.cat([c, d], dim=2)], dim=1))
    return torch.stack(canvases), ["", ""]


def moving_patch(background: Tensor, top: int, size: int) -> list[Tensor]:
    """A dark square that moves right by a token a frame."""
    frames = [background.clone() for _ in range(FRAMES)]
    for i, frame in enumerate(frames):
        frame[:, :, top : top + size, 4 + 4 * i : 4 + 4 * i + size] = -0.9
    return frames


SCENES = {
    "own size, patch of 1 token": (own_size, 12, 4),
    "canvas, patch of 1 token": (on_canvas, 8, 4),
    "canvas, patch of 2 x 2 tokens": (on_canvas, 8, 8),
    "canvas, patch of 4 x 4 tokens": (on_canvas, 8, 16),
}


def streamed(
    pipe: TinyFlux2Pipeline, frames: list[Tensor], cache: StreamingRegionCache, **run: Any
) -> tuple[list[Tensor], float]:
    """Images, and the mean share of tokens computed after the first frame."""
    cache.apply(pipe)
    images, work = [], []
    for image in stream(pipe, frames, **run):
        images.append(image)
        work.append(region_report(pipe).work)
    cache.remove(pipe)
    return images, sum(work[1:]) / (len(work) - 1)


def cost(batch: int) -> list[dict[str, float]]:
    """MACs and time of a pass over a share of the tokens, relative to the dense pass."""
    pipe = build_pipeline(TinyFlux2Config(image_size=4 * SIDE, num_heads=4))
    given = {
        "hidden_states": torch.randn(batch, SIDE * SIDE, 16, generator=torch.Generator().manual_seed(0)),
        "encoder_hidden_states": torch.zeros(batch, 1, 64),
        "timestep": torch.full((batch,), 0.5),
        "img_ids": position_ids(SIDE, SIDE, torch.device("cpu")),
        "txt_ids": torch.zeros(1, 4),
    }

    def dense() -> None:
        pipe.transformer(**given)

    def named(other: TinyFlux2Pipeline) -> None:
        with other.transformer.cache_context("cond"):  # one after the other, not the passes of one step
            other.transformer(**given)

    cached = {share: build_pipeline(TinyFlux2Config(image_size=4 * SIDE, num_heads=4)) for share in SHARES}
    for share, other in cached.items():
        StreamingRegionCache(ring=0, probe=0.0).apply(other)
        mask = torch.zeros(SIDE * SIDE, dtype=torch.bool)
        mask[: round(share * SIDE * SIDE)] = True
        set_region(other, mask)
        named(other)
    calls = {str(share): partial(named, other) for share, other in cached.items()}
    timings = interleaved({"dense": dense, **calls}, rounds=15, progress=False)
    dense_macs = count(dense).macs
    return [
        {
            "batch": batch,
            "share": share,
            "model": (share * SIDE * SIDE + 1) / (SIDE * SIDE + 1),
            "macs": count(calls[str(share)]).macs / dense_macs,
            "time": timings[str(share)].median_s / timings["dense"].median_s,
        }
        for share in SHARES
    ]


def streaming(scene: str, variants: dict[str, StreamingRegionCache], runs: Iterable[tuple]) -> list[dict[str, Any]]:
    background, top, size = SCENES[scene]
    images, prompts = background()
    frames, rows = moving_patch(images, top, size), []
    for model, steps, strength in runs:
        pipe = opened(model)
        run = {"prompt": prompts, "steps": steps, "strength": strength}
        dense = list(stream(pipe, frames, **run))
        repeated = relative(dense[:-1], dense[1:])
        for name, cache in variants.items():
            cached, work = streamed(pipe, frames, cache, **run)
            rows.append(
                {
                    "scene": scene,
                    "model": model,
                    "steps": steps,
                    "strength": strength,
                    "variant": name,
                    "error": relative(cached[1:], dense[1:]),
                    "first_frame_equal": torch.equal(cached[0], dense[0]),
                    "error_of_repeating": repeated,
                    "work": work,
                }
            )
    return rows


def editing() -> list[dict[str, Any]]:
    """A bag's middle, a fifth of the picture, becomes that of a pullover."""
    pipe, rows = opened("fashion"), []
    image = torch.cat([garments([8], number) for number in range(8)])
    mask = torch.zeros(28, 28, dtype=torch.bool)
    mask[8:20, 8:20] = True
    for steps in (30, 8, 4):
        run = {"prompt": ["pullover"] * 8, "steps": steps}
        dense = edit(pipe, image, mask, **run)
        for every in (1, 2, 4):
            cache = EditRegionCache(ring=1, refresh_every=every)
            cache.apply(pipe)
            cached = edit(pipe, image, mask, **run)
            work = region_report(pipe).work
            cache.remove(pipe)
            error = relative([cached[:, :, mask]], [dense[:, :, mask]])
            rows.append({"steps": steps, "refresh_every": every, "error_inside": error, "work": work})
    return rows


def generation(steps: int = 30) -> list[dict[str, Any]]:
    """The lesson: tokens that moved most, against a step cache that computes whole steps, at about equal work."""
    pipe, rows = opened("fashion"), []

    def sample() -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return pipe([str(i) for i in range(10)], steps, generator=generator, output_type="pt").images

    dense = sample()
    dense_macs = count(sample).macs
    techniques = [
        *(GenerationRegionCache(share, every) for share, every in ((0.6, 6), (0.4, 6), (0.3, 6))),
        *(FixedInterval(every, predictor) for predictor in ("reuse", "forecast") for every in (2, 3)),
    ]
    for technique in techniques:
        technique.apply(pipe)
        error, macs = relative([sample()], [dense]), count(sample).macs
        technique.remove(pipe)
        rows.append({"technique": technique.describe(), "error": error, "macs": macs / dense_macs})
    return rows


def streams(variants: dict[str, StreamingRegionCache], runs: Iterable[tuple]) -> list[dict[str, Any]]:
    return [row for scene in SCENES for row in streaming(scene, variants, runs)]


TABLES: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "cost": lambda: [row for batch in (1, 4) for row in cost(batch)],
    "memory": lambda: [
        {"model": name, "precision": precision, "slot_gb": slot_bytes(size, precision) / 1e9, "source": size.source}
        for name, size in MODEL_SIZES.items()
        for precision in ("native", "fp8")
    ],
    "streaming": lambda: streams(RINGS, RUNS),
    "streaming_variants": lambda: streams(VARIANTS, [("fashion-4step", 2, 0.5)]),
    "edit": editing,
    "generation": generation,
}


@torch.no_grad()
def main(only: tuple[str, ...] = tuple(TABLES)) -> None:
    """Measure and store.

    Args:
        only: which of the tables to make anew.
    """
    print(slot_table())
    report = json.loads(PATH.read_text()) if PATH.is_file() else {}
    report["machine"] = machine()
    for table in only:
        report[table] = TABLES[table]()
        for row in report[table]:
            print({key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()})
    PATH.parent.mkdir(exist_ok=True)
    PATH.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    tyro.cli(main)
