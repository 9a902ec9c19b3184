"""Put a quantized pipeline into the repository, with a card that says how it was made, how small and how good it is.

    diffusion-opt quantize fashion-4step --format nvfp4 --out runs/fashion-4step-nvfp4
    python benchmarks/ship_quantized.py fashion-4step-nvfp4 runs/fashion-4step-nvfp4 "diffusion-opt quantize …"

What is not packed is rounded to half precision first, and the pipeline is measured as it is shipped, by the protocol of
`ship_model.py`, whose figure of the model it was made from stands beside it. Every other number of the card comes from
this run and is stored in `benchmarks/results/model-<name>.json`.
"""

import json
import shutil
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import tyro
from diffusers import DiffusionPipeline

from diffusion_opt import load
from diffusion_opt.evaluation import weight_bytes
from diffusion_opt.models import SHIPPED
from diffusion_opt.quantization import DynamicInt8Linear, PackedLinear, quantization_report, save_quantized
from diffusion_opt.quantization.attention.low_precision import attention_of
from diffusion_opt.recipes import measure

RESULTS = Path(__file__).parent / "results"
CARD = """# {name}

{summary}.

| | |
|---|---|
| made from | `{origin}`, by `{command}` |
| linear layers | {formats} |
| quantized weights | {packed:,} bytes instead of {floats:,} in float32: {ratio:.2f} times smaller |
| in memory | {memory:,} bytes of weights; `{origin}` in float32 has {origin_memory:,} |
| on disk | {disk:,} bytes; `{origin}` in half precision has {origin_disk:,} |
| sampling | network passes: {nfe}; steps: {sampling_steps}; guidance scale: {guidance:g} |
| {metric} | {distance:.2f} [{low:.2f}, {high:.2f}] at {samples:,} samples; `{origin}`: {origin_distance:.2f} |
| precision, recall | {precision:.3f}, {recall:.3f} |
| class agreement | {agreement:.1f} % (a shipped classifier sees the asked class) |
| license | Apache-2.0, as the repository |

Open it with `diffusion_opt.load("{name}")`.
{time}
Measured by `python benchmarks/ship_quantized.py`, stored in `benchmarks/results/model-{name}.json`.
"""
SIMULATED = "What is computed is what hardware with these formats would compute, and no faster than in float32."
REAL = "Its layers run on the INT8 kernel of the CPU; `benchmarks/cpu_precision.py` measures what that gains."


def main(
    name: Annotated[str, tyro.conf.Positional],
    folder: Annotated[Path, tyro.conf.Positional],
    command: Annotated[str, tyro.conf.Positional],
    samples: int = 2000,
    batch_size: int = 100,
    threads: int | None = None,
) -> None:
    """Measure the packed pipeline in `folder` and ship it as `name`.

    Args:
        name: one of the quantized names in diffusion_opt.models.SHIPPED.
        folder: what `diffusion-opt quantize --out` or `save_quantized` wrote.
        command: the command that made it, for the card.
        samples: images behind the quality figures.
        batch_size: images a call.
        threads: CPU threads of torch; default: torch's own choice.
    """
    model = SHIPPED.get(name)
    if model is None or model.quantized_from is None:
        raise SystemExit(f"{name!r} is not one of {', '.join(n for n, m in SHIPPED.items() if m.quantized_from)}")
    if threads is not None:
        torch.set_num_threads(threads)
    pipe = load(folder)
    with torch.no_grad():
        for parameter in pipe.transformer.parameters():
            parameter.copy_(parameter.half())
    if model.folder.exists():
        shutil.rmtree(model.folder)
    save_quantized(pipe, model.folder)
    pipe = load(name)
    pipe.set_progress_bar_config(disable=True)
    record = measure(pipe, num_samples=samples, batch_size=batch_size, rounds=1)
    origin = json.loads((RESULTS / f"model-{model.quantized_from}.json").read_text())
    layers = [layer for layer in quantization_report(pipe).layers if layer.kind != "float"]
    packed, floats = sum(layer.weight_bytes for layer in layers), sum(layer.float32_bytes for layer in layers)
    size = {"quantized_bytes": packed, "float32_bytes": floats, "disk_bytes": disk_bytes(model.folder)}
    quality = record.quality
    card = CARD.format(
        name=name,
        summary=model.summary,
        origin=model.quantized_from,
        command=command,
        formats=formats_of(pipe),
        time=REAL if "dynamic_int8" in formats_of(pipe) else SIMULATED,
        packed=packed,
        floats=floats,
        ratio=floats / packed,
        memory=weight_bytes(pipe.transformer),
        origin_memory=origin["weight_bytes"],
        disk=size["disk_bytes"],
        origin_disk=disk_bytes(SHIPPED[model.quantized_from].folder),
        nfe=record.nfe,
        sampling_steps=pipe.config.default_steps,
        guidance=pipe.config.default_guidance,
        metric=quality.metric,
        distance=quality.distance,
        low=quality.distance_low,
        high=quality.distance_high,
        samples=quality.num_samples,
        origin_distance=origin["quality"]["distance"],
        precision=quality.precision,
        recall=quality.recall,
        agreement=100 * quality.class_agreement,
    )
    (model.folder / "README.md").write_text(card)
    stored = {"quantized_from": model.quantized_from, "command": command, **size, **asdict(record)}
    (RESULTS / f"model-{name}.json").write_text(json.dumps(stored, indent=2) + "\n")
    print(card)


def formats_of(pipe: DiffusionPipeline) -> str:
    """How many layers are in which format."""
    modules = list(pipe.transformer.modules())
    counts = Counter(module.format.name for module in modules if isinstance(module, PackedLinear))
    counts["dynamic_int8"] = sum(isinstance(module, DynamicInt8Linear) for module in modules)
    attention = attention_of(pipe.transformer)
    parts = [f"{count} in {name}" for name, count in counts.items() if count]
    return ", ".join(parts if attention is None else [*parts, attention.describe()])


def disk_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


if __name__ == "__main__":
    tyro.cli(main)
