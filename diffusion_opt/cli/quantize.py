"""`diffusion-opt quantize`: fewer bits for a model, measured on its own trajectories, packed, and saved.

    diffusion-opt quantize fashion-4step --format nvfp4 --out runs/nvfp4             post-training quantization
    diffusion-opt quantize fashion-4step --format nvfp4 --qat-minutes 5 --out DIR    and trained to its float self
    diffusion-opt quantize fashion-4step --format nvfp4 mxfp8 --bits 6 --out DIR     the best mixture of that size
    diffusion-opt quantize fashion-1step --format dynamic_int8 --out DIR             really faster, on a CPU
    diffusion-opt quantize FOLDER --format fp8 --prompts prompts.txt --steps 28 --height 1024 --width 1024 --out DIR

`diffusion_opt.load(DIR)` opens what it writes, in another process and with the same output.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from diffusion_opt.cli.options import (
    ASKED,
    OPENING,
    RUNS,
    Asked,
    MaybeFloat,
    Model,
    Opening,
    Texts,
    writable,
)

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from rich.table import Table

    from diffusion_opt.quantization import PTQ, LayerChoice, QuantizationReport
    from diffusion_opt.quantization.mixed.sensitivity import Probe
    from diffusion_opt.subjects import Run

FormatName = Literal[
    "dynamic_int8",
    "int8",
    "int8_per_token",
    "int8_smoothquant",
    "fp8",
    "mxfp8",
    "int4_weight_only",
    "w4a8",
    "w4a4",
    "nvfp4",
    "nvfp4_svdquant",
]
MaybeAttention = Annotated[
    Literal["int8", "fp8", "nvfp4"] | None, tyro.conf.arg(metavar="{int8,fp8,nvfp4}", help_behavior_hint="")
]
REAL = "dynamic_int8"  # the one with a kernel of its own; all others are simulated, then packed
UNSEEN = 10_000  # how far the seed of the measured noise lies from that of the calibrated


def quantize(
    model: Model,
    out: Path,
    asked: Asked = ASKED,
    opening: Opening = OPENING,
    format: tuple[FormatName, ...] = ("int8",),
    bits: MaybeFloat = None,
    calibrate: int = 40,
    qat_minutes: MaybeFloat = None,
    attention: MaybeAttention = None,
    skip: Texts = (),
    first_blocks: int = 0,
    last_blocks: int = 0,
    samples: int = 20,
) -> None:
    """Quantize the linear layers of a model's blocks, report what it costs and saves, and write the packed model.

    Formats: int8, fp8 and mxfp8 have 8 bits per weight, w4a8, w4a4, nvfp4 and nvfp4_svdquant 4.5. The inputs of the
    layers are rounded too, except with int4_weight_only. int8_smoothquant and nvfp4_svdquant move outliers to where
    they can be held, usually for a smaller error. Of all these, a CPU gets smaller weights and no speed.
    dynamic_int8 is really faster on a CPU and needs no calibration.

    Embedders, modulation and the output layer stay in float: they are small, and their error reaches everything. The
    table gives the reason for each layer that is kept. The error is that of the velocity, relative to the float
    model's, at points of trajectories that calibration has not seen.

    Too large an error? Take a better format, keep the layers it says are worst (--skip), mix formats (--bits), or let
    the model get used to its roundings (--qat-minutes), in this order.

    Args:
        model: shipped name, folder or hub name.
        out: new folder for the packed model.
        format: one format for all layers, or several to mix with --bits.
        bits: average bits per weight, scales included; layers get the formats with the least error of that size.
        calibrate: samples that fix the ranges of inputs.
        qat_minutes: train so long through the rounding, to the velocity of the float model; needs no data.
        attention: also compute attention with q, k, v and its weights in this format; the folder remembers it.
        skip: regular expressions; layers whose whole name matches stay in float.
        first_blocks: blocks at the start of the stack that stay in float.
        last_blocks: blocks at its end that do.
        samples: generations behind the reported error.
    """
    _check(format, bits, calibrate, qat_minutes, samples)
    opening.check(model)
    asked.check(model)
    writable(out)
    if any(out.iterdir()):
        raise ValueError(f"{out} is not empty: name a new folder with --out")
    pipe = opening.open(model)
    run, seed = asked.run(pipe), asked.seed
    import torch
    from rich.console import Console

    from diffusion_opt.quantization import PTQ, quantization_report
    from diffusion_opt.quantization.mixed.sensitivity import record_probe
    from diffusion_opt.quantization.packed.storage import save_quantized

    choices = _choices(pipe, format, skip, first_blocks, last_blocks)
    _check_two(pipe, bits, qat_minutes)
    probes = {
        name: record_probe(pipe, samples, torch.Generator().manual_seed(seed + UNSEEN), run=run, network=name)
        for name in choices
    }
    errors: dict[str, float] = {}
    if format == (REAL,):
        formats = _real(pipe, choices, attention)
    else:
        formats = _formats(pipe, choices, format, bits, seed, run)
        technique = PTQ(layers=_shared(formats), run=run, samples=calibrate, progress=True)
        training = None if qat_minutes is None else (qat_minutes, seed, RUNS / "quantize" / out.name)
        errors |= _apply(pipe, technique, attention, training, run, probes)
    errors["as saved"] = _error(pipe, probes)
    save_quantized(pipe, out)
    console = Console()
    reasons = {network: {choice.name: choice.reason for choice in own} for network, own in choices.items()}
    console.print(table(quantization_report(pipe), _flat(formats), _flat(reasons)))
    for stage, error in errors.items():
        console.print(f"relative error of the velocity, {stage}: {error:.4f}", highlight=False)
    console.print(f"written to {out}: open it with diffusion_opt.load({str(out)!r})", highlight=False)


def table(report: "QuantizationReport", formats: Mapping[str, str], reasons: Mapping[str, str]) -> "Table":
    """Each linear layer: its format or why it is kept, and its bytes now and in float32."""
    from rich.table import Table

    shown = Table(title="linear layers")
    for name in ("layer", "format"):
        shown.add_column(name, overflow="fold")  # --skip needs names in full, however narrow the terminal
    for name in ("bytes", "float32"):
        shown.add_column(name, justify="right", no_wrap=True)
    for layer in report.layers:
        kept = reasons.get(layer.name) or "left in float by the mixture"
        what = formats[layer.name] if layer.kind != "float" else f"float: {kept}"
        shown.add_row(layer.name, what, f"{layer.weight_bytes:,}", f"{layer.float32_bytes:,}")
    ratio = report.float32_bytes / report.weight_bytes
    shown.add_section()
    shown.add_row(
        f"{len(report.quantized)} of {len(report.layers)} quantized",
        f"{ratio:.2f} times smaller",
        f"{report.weight_bytes:,}",
        f"{report.float32_bytes:,}",
    )
    return shown


def _check(format: tuple[str, ...], bits: float | None, calibrate: int, minutes: float | None, samples: int) -> None:
    """Refuse wishes that contradict each other, before anything is loaded."""
    if not format or (len(format) > 1) != (bits is not None):
        raise ValueError(f"--bits mixes two or more formats, got --format {' '.join(format)} and --bits {bits}")
    if REAL in format and (len(format) > 1 or minutes is not None):
        raise ValueError(f"{REAL} is a kernel and stands alone: leave out other formats and --qat-minutes")
    if calibrate < 1 or samples < 1:
        raise ValueError(f"--calibrate and --samples must be 1 or more, got {calibrate} and {samples}")
    if minutes is not None and minutes <= 0:
        raise ValueError(f"--qat-minutes must be above 0, got {minutes}")


def _choices(
    pipe: "DiffusionPipeline", format: tuple[str, ...], skip: tuple[str, ...], first_blocks: int, last_blocks: int
) -> "dict[str, list[LayerChoice]]":
    """The policy's word on each layer of each denoiser. Raises ValueError if nothing of one is left to quantize."""
    from diffusion_opt.quantization import choose
    from diffusion_opt.quantization.faster.int8_cpu import MIN_WIDTH, kernel_here
    from diffusion_opt.subjects import denoisers

    min_width = MIN_WIDTH[kernel_here()[0]] if format == (REAL,) else 0
    choices = {
        name: choose(network, min_width, skip, first_blocks, last_blocks) for name, network in denoisers(pipe).items()
    }
    for own in choices.values():
        if not any(choice.quantized for choice in own):
            reasons = "; ".join(dict.fromkeys(choice.reason for choice in own))
            raise ValueError(f"nothing is left to quantize: {reasons}")
    return choices


def _check_two(pipe: "DiffusionPipeline", bits: float | None, qat_minutes: float | None) -> None:
    """Raise ValueError for a mixture, or training, of a pipeline with two networks: both look at one network alone."""
    from diffusion_opt.subjects import denoisers

    networks = denoisers(pipe)
    for flag, value in (("--bits", bits), ("--qat-minutes", qat_minutes)):
        if value is not None and len(networks) > 1:
            raise ValueError(
                f"{flag} serves pipelines with one denoising network, {type(pipe).__name__} has {', '.join(networks)}: "
                "take one --format, and keep the worst layers with --skip"
            )


def _shared(formats: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """The format of each layer by its name, the same in all networks, as `PTQ(layers=…)` takes them."""
    first, *others = formats.values()
    if any(other != first for other in others):
        raise ValueError(f"the networks {', '.join(formats)} differ in which layers can be quantized: use PTQ(format)")
    return dict(first)


def _flat(named: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """By the names of the report: those of the layers, behind that of their network where there are several."""
    return {
        f"{network}.{name}" if len(named) > 1 else name: value
        for network, own in named.items()
        for name, value in own.items()
    }


def _real(
    pipe: "DiffusionPipeline", choices: "Mapping[str, list[LayerChoice]]", attention: str | None
) -> dict[str, dict[str, str]]:
    """Put the CPU's INT8 kernel on, and attention if asked to; name the layers."""
    from diffusion_opt.quantization import DynamicInt8
    from diffusion_opt.quantization.attention.low_precision import LowPrecisionAttention

    formats = {name: {choice.name: REAL for choice in own if choice.quantized} for name, own in choices.items()}
    _shared(formats)
    first = next(iter(choices.values()))
    kept = tuple(re.escape(choice.name) for choice in first if not choice.quantized)
    DynamicInt8(min_width=0, skip=kept, reversible=False).apply(pipe)
    if attention is not None:
        LowPrecisionAttention(attention).apply(pipe)
    return formats


def _formats(
    pipe: "DiffusionPipeline",
    choices: "Mapping[str, list[LayerChoice]]",
    format: tuple[str, ...],
    bits: float | None,
    seed: int,
    run: "Run",
) -> dict[str, dict[str, str]]:
    """By network: one format for every layer, or the best mixture of this size; prints what each layer minds."""
    names = {network: [choice.name for choice in own if choice.quantized] for network, own in choices.items()}
    if bits is None:
        return {network: dict.fromkeys(own, format[0]) for network, own in names.items()}
    import torch

    from diffusion_opt.quantization.mixed.allocation import allocate
    from diffusion_opt.quantization.mixed.sensitivity import record_probe, sensitivity

    probe = record_probe(pipe, 10, torch.Generator().manual_seed(seed), run=run)
    [(network, chosen)] = names.items()
    found = sensitivity(pipe, probe, format, groups={name: (name,) for name in chosen}, progress=True)
    allocation = allocate(found, bits_per_weight=bits)
    print(found, allocation, sep="\n", flush=True)
    return {network: allocation.layers}


def _apply(
    pipe: "DiffusionPipeline",
    technique: "PTQ",
    attention: str | None,
    training: tuple[float, int, Path] | None,
    run: "Run",
    probes: "Mapping[str, Probe]",
) -> dict[str, float]:
    """Quantize, train if asked to (minutes, seed, folder), and pack. Returns the error before training, if any."""
    from diffusion_opt.quantization.attention.low_precision import LowPrecisionAttention
    from diffusion_opt.quantization.packed.packing import pack
    from diffusion_opt.quantization.qat import QAT, apply_all, quantization_aware

    techniques = [technique] if attention is None else [technique, LowPrecisionAttention(attention)]
    apply_all(pipe, techniques)
    errors = {}
    if training is not None:
        minutes, seed, folder = training
        errors["before training"] = _error(pipe, probes)
        for one in reversed(techniques):
            one.remove(pipe)
        quantization_aware(pipe, techniques, replace(QAT, minutes=minutes, seed=seed), folder, run=run)
    pack(pipe)
    return errors


def _error(pipe: "DiffusionPipeline", probes: "Mapping[str, Probe]") -> float:
    """Root mean square over the times of all networks' probes."""
    from diffusion_opt.quantization.mixed.sensitivity import errors_by_time
    from diffusion_opt.subjects import denoisers

    networks = denoisers(pipe)
    errors = [error for name, probe in probes.items() for error in errors_by_time(networks[name], probe)]
    return math.sqrt(sum(error**2 for error in errors) / len(errors))
