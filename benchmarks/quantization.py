"""Fewer bits, before and after training with them: `benchmarks/results/quantization.json`.

    python benchmarks/quantization.py                                 everything, hours
    python benchmarks/quantization.py --only nvfp4 attention-nvfp4    some formats
    python benchmarks/quantization.py --report                        write and print what is there

Each cell is a model, a format, and "ptq" or "qat": post-training quantization as it is, or `quantization_aware` with a
fixed budget of CPU time. All cells make the same images: batch i draws its noise from one seed, whatever computes it. A
cell is judged by FD (fashion features) with precision, recall and class agreement, by the velocity error at held-out
points of the float network's own generations, and by the distance of its images from the float network's. The change of
FD against the float network is paired: both are resampled together, so that most of the noise of a finite sample, which
the two share, drops out of the interval.

Sizes are those of packed weights, scales included: of the quantized layers alone, and of the whole network with all the
rest in half precision, as the repository ships it.

"nvfp4-everywhere" gives the layers that the policy keeps (embedders, modulation, output) 4-bit weights as well, without
rounding their inputs: they are a quarter of this small network, though a small part of a large one.

`rates` are short trainings at several learning rates, for the rule that the rate follows the error. Cells are kept in
`runs/quantization/` as they are made; call it again and it goes on where it stopped.
"""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffusion_opt.evaluation import embed, load_features, load_reference, machine, quality
from diffusion_opt.evaluation.distances import bootstrap_counts, bootstrap_frechet
from diffusion_opt.models import TinyFlux2Pipeline, load
from diffusion_opt.quantization import PTQ, choose
from diffusion_opt.quantization.attention.low_precision import LowPrecisionAttention
from diffusion_opt.quantization.mixed.trajectory_points import trajectory_points, velocity_error
from diffusion_opt.quantization.qat import QAT, Quantization, SelfDistillation, quantization_aware
from diffusion_opt.recipes import Solver
from diffusion_opt.training import TrainConfig, train

RESULTS = Path(__file__).parent / "results" / "quantization.json"
KEPT = Path(__file__).parent.parent / "runs" / "quantization"
LINEARS = (
    "nvfp4", "int8", "fp8", "nvfp4_svdquant", "w4a4", "int4_weight_only", "w4a8", "mxfp8", "int8_smoothquant",
)  # fmt: skip
ATTENTIONS = ("nvfp4", "int8", "fp8")
EVERYWHERE = "nvfp4-everywhere"
BATCH, RESAMPLES, HELD_OUT, SEED = 125, 200, 32, 40_000
RATES = (5e-4, 2e-3, 8e-3)  # base rates tried, and formats of small and large error to try them on
RATE_FORMATS = ("int8", "nvfp4", "w4a4")
RATE_RUN = replace(QAT, minutes=None, clock="wall", steps=40)


@dataclass(frozen=True)
class Bench:
    """A model, how it is sampled, and how long it may be trained."""

    model: str
    samples: int
    train: TrainConfig
    solver: Solver | None = None  # None: the model's own scheduler and steps

    def pipe(self) -> TinyFlux2Pipeline:
        pipe = load(self.model)
        pipe.set_progress_bar_config(disable=True)
        return pipe if self.solver is None else self.solver.apply(pipe)

    @property
    def labels(self) -> Tensor:
        return torch.arange(self.samples) % 10


BENCHES = {
    "fashion-4step": Bench("fashion-4step", 2000, QAT),
    "fashion": Bench("fashion", 500, QAT, Solver(12)),
}
TEACHER_LINEARS = ("nvfp4", "nvfp4_svdquant", "int8", "fp8")


def technique_of(name: str, transformer: nn.Module) -> Quantization:
    """A format for the linears that the policy chooses, "attention-" and a format for attention, or EVERYWHERE."""
    if name.startswith("attention-"):
        return LowPrecisionAttention(name.removeprefix("attention-"))
    if name != EVERYWHERE:
        return PTQ(name)
    chosen = {choice.name: "nvfp4" if choice.quantized else "int4_weight_only" for choice in choose(transformer)}
    return PTQ(layers=chosen)


def cells() -> Iterator[tuple[str, str, str]]:
    """(model, format, training), the ones with targets first."""
    first = ("nvfp4", "attention-nvfp4", "int8", "fp8", "nvfp4_svdquant", "w4a4")
    others = [EVERYWHERE, *(name for name in LINEARS if name not in first)] + [
        f"attention-{name}" for name in ATTENTIONS[1:]
    ]
    targets = [(name, "ptq") for name in first] + [(name, "qat") for name in first]
    for name, training in (*targets, *((name, training) for name in others for training in ("ptq", "qat"))):
        yield "fashion-4step", name, training
    for name in TEACHER_LINEARS:
        yield "fashion", name, "ptq"
        yield "fashion", name, "qat"


@torch.no_grad()
def sampled(pipe: TinyFlux2Pipeline, labels: Tensor) -> Tensor:
    """Images in [-1, 1]; batch i draws its noise from SEED + i."""
    batches = []
    for index, part in enumerate(labels.split(BATCH)):
        generator = torch.Generator().manual_seed(SEED + index)
        batches.append(pipe(prompt=part.tolist(), generator=generator, output_type="pt").images * 2 - 1)
    return torch.cat(batches)


def kept(path: Path, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors that are made once."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in make().items()}, path)
    return load_file(path)


def float_side(bench: Bench) -> dict[str, Tensor]:
    """Images of the float network and their features."""

    def make() -> dict[str, Tensor]:
        images = sampled(bench.pipe(), bench.labels)
        return {"images": images, "features": embed(load_features("fashion"), images)[0]}

    return kept(KEPT / bench.model / "float.safetensors", make)


def paired_change(features: Tensor, of_float: Tensor, labels: Tensor) -> tuple[float, float, float]:
    """Relative change of FD against the float network, and its 95 % interval from resamples that both share."""
    reference = load_reference("fashion")
    counts = bootstrap_counts(labels, RESAMPLES, torch.Generator().manual_seed(0))
    once = torch.ones(1, len(labels), dtype=torch.float64)
    mine, theirs = (
        bootstrap_frechet(x, torch.cat([once, counts]), reference.mean, reference.cov) for x in (features, of_float)
    )
    change = (mine - theirs) / theirs[0]
    spread = torch.quantile(change[1:] - change[1:].mean(), torch.tensor([0.025, 0.975], dtype=change.dtype))
    return float(change[0]), float(change[0] + spread[0]), float(change[0] + spread[1])


def size(pipe: TinyFlux2Pipeline, technique: Quantization) -> dict[str, float]:
    """Bits a quantized weight, and how many times smaller than float32: its layers, and the whole network."""
    network = pipe.transformer
    parameters = sum(parameter.numel() for parameter in network.parameters())
    formats = technique.formats(network) if isinstance(technique, PTQ) else {}
    layers = {name: network.get_submodule(name).weight for name in formats}
    weights = sum(weight.numel() for weight in layers.values())
    packed = sum(format.weight_bits(*layers[name].shape) for name, format in formats.items()) / 8
    whole = packed + 2 * (parameters - weights)
    row = {"float32_bytes": 4 * parameters, "weight_bytes": round(whole), "network_ratio": 4 * parameters / whole}
    if formats:
        row |= {"quantized_weights": weights, "quantized_bytes": round(packed)}
        row |= {"bits": 8 * packed / weights, "layers_ratio": 4 * weights / packed}
    return row


def judged(bench: Bench, pipe: TinyFlux2Pipeline, name: str, training: str) -> dict[str, Any]:
    """Quality of a quantized pipeline, against real images and against the float network."""
    of_float = float_side(bench)
    images = sampled(pipe, bench.labels)
    features = embed(load_features("fashion"), images)[0]
    save_file({"features": features.contiguous()}, KEPT / bench.model / f"{name}-{training}.safetensors")
    found = quality(images, bench.labels, teacher_images=of_float["images"])
    change, low, high = paired_change(features, of_float["features"], bench.labels)
    held_out = trajectory_points(bench.pipe(), HELD_OUT, torch.Generator().manual_seed(SEED - 1))
    return {
        "velocity_error": velocity_error(pipe.transformer, held_out),
        "distance": found.distance, "distance_low": found.distance_low, "distance_high": found.distance_high,
        "change": change, "change_low": low, "change_high": high,
        "kernel_distance": found.kernel_distance, "precision": found.precision, "recall": found.recall,
        "class_agreement": found.class_agreement, "floor": found.floor,
        "distance_to_float": found.teacher.distance,
        "feature_rms": found.teacher.feature_rms, "pixel_rms": found.teacher.pixel_rms,
    }  # fmt: skip


def float_row(bench: Bench) -> dict[str, Any]:
    """The float network itself, by the same protocol."""
    found = quality(float_side(bench)["images"], bench.labels)
    row = {key: value for key, value in asdict(found).items() if isinstance(value, float)}
    return {"model": bench.model, "format": "float", "training": "float"} | row


def cell(model: str, name: str, training: str) -> dict[str, Any]:
    """One cell of the table."""
    bench, start = BENCHES[model], time.process_time()
    pipe, out = bench.pipe(), KEPT / model / name
    technique = technique_of(name, pipe.transformer)
    row = {"model": model, "format": name, "training": training, "technique": technique.describe()}
    row |= size(pipe, technique)
    if training == "ptq":
        technique.apply(pipe)
    else:
        quantization_aware(pipe, technique, bench.train, out, progress=False)
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        row |= {"steps": lines[-1]["step"], "minutes": bench.train.minutes}
        row["history"] = [[line["step"], line["relative_error"]] for line in lines]
    row |= judged(bench, pipe, name, training)
    return row | {"cpu_seconds": time.process_time() - start}


def rate_run(format: str, base: float) -> dict[str, Any]:
    """A short training at one base rate."""
    bench = BENCHES["fashion-4step"]
    pipe, teacher = bench.pipe(), bench.pipe()
    held_out = trajectory_points(teacher, HELD_OUT, torch.Generator().manual_seed(SEED - 1))
    PTQ(format).apply(pipe)
    method, before = SelfDistillation(pipe.transformer, teacher), velocity_error(pipe.transformer, held_out)
    config = replace(RATE_RUN, learning_rate=base)
    result = train(method, config, KEPT / "rates" / f"{format}-{base:g}", progress=False)
    after = velocity_error(result.ema, held_out)
    rate = base * method.start_error
    return {"format": format, "base": base, "learning_rate": rate, "steps": config.steps, "error": [before, after]}


def stored(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A row that is made once."""
    if not path.is_file():
        row = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(row))
        print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items() if k != "history"}, flush=True)
    return json.loads(path.read_text())


def write() -> None:
    """Gather what was made and print the table."""
    floats = {name: stored(KEPT / name / "float.json", lambda b=bench: float_row(b)) for name, bench in BENCHES.items()
              if (KEPT / name / "float.safetensors").is_file()}  # fmt: skip
    rows = [KEPT / model / f"{name}-{training}.json" for model, name, training in cells()]
    rows = [json.loads(path.read_text()) for path in rows if path.is_file()]
    rates = [json.loads(path.read_text()) for path in sorted((KEPT / "rates").glob("*.json"))]
    protocol = {name: asdict(bench) for name, bench in BENCHES.items()}
    protocol |= {"seed": SEED, "batch_size": BATCH, "resamples": RESAMPLES, "held_out": HELD_OUT}
    report = {"machine": machine(), "protocol": protocol, "float": list(floats.values()), "rows": rows}
    report["learning_rate"] = rates
    RESULTS.write_text(json.dumps(report, indent=1) + "\n")
    for row in rows:
        base = floats[row["model"]]["distance"]
        print(
            f"{row['model']:<14} {row['format']:<17} {row['training']}  velocity error {row['velocity_error']:.4f}  "
            f"FD {row['distance']:.3f} (float {base:.3f}) {row['change']:+.1%} [{row['change_low']:+.1%}, "
            f"{row['change_high']:+.1%}]  features moved {row['feature_rms']:.3f}  smaller by "
            f"{row.get('layers_ratio', 1):.2f} (layers), {row['network_ratio']:.2f} (all)"
        )


def main(only: tuple[str, ...] = (), models: tuple[str, ...] = tuple(BENCHES), report: bool = False) -> None:
    """Measure and store.

    Args:
        only: formats to measure, as in the table; "rates" for the learning rates; default: everything.
        models: shipped models to measure.
        report: write and print what is there, measure nothing.
    """
    torch.set_num_threads(1)
    for model, name, training in cells():
        if report or model not in models or (only and name not in only):
            continue
        stored(KEPT / model / f"{name}-{training}.json", lambda c=(model, name, training): cell(*c))
    for format in RATE_FORMATS:
        for base in RATES:
            if not report and (not only or "rates" in only):
                path = KEPT / "rates" / f"{format}-{base:g}.json"
                stored(path, lambda f=format, b=base: rate_run(f, b))
    write()


if __name__ == "__main__":
    tyro.cli(main)
