"""Which layers mind rounding, and what a mixture of formats is worth: `benchmarks/results/mixed_precision.json`.

    python benchmarks/mixed_precision.py                    the sensitivity of all formats, then the contests; minutes

One probe makes the table (`quantization.sensitivity`), another measures every choice: one format everywhere, the best
mixture of at most its bytes, and at some average sizes modelopt's `auto_quantize` (both of its scores) beside our
choice from the same two formats, which gets the size that modelopt ended at. modelopt counts the layers that are kept
into its effective bits, at 16 each, so its target is converted. Errors are those of the velocity, relative, root mean
square over times.
"""

import contextlib
import copy
import io
import json
import math
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import nn

from diffusion_opt.evaluation import machine
from diffusion_opt.models import load
from diffusion_opt.quantization import FORMATS, Format, choose
from diffusion_opt.quantization.mixed.allocation import allocate, compare_with_uniform
from diffusion_opt.quantization.mixed.sensitivity import (
    FLOAT,
    Probe,
    SensitivityTable,
    joint_error,
    record_probe,
    sensitivity,
)
from diffusion_opt.quantization.simulation import cpu_backend

RESULTS = Path(__file__).parent / "results"
PAIR = ("nvfp4", "mxfp8")  # what modelopt and we choose from; block formats have no ranges to calibrate
KEPT_BITS = 16  # as which modelopt counts a layer that is not quantized
Score = Literal["gradient", "kl_div"]


def wildcards(format: Format) -> dict[str, Any]:
    """modelopt's configuration of a format for any linear layer: what its search takes."""
    entries: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    for kind, numbers in (("weight", format.weight), ("input", format.input)):
        quantizer = {"quantizer_name": f"*{kind}_quantizer", "parent_class": "nn.Linear"}
        entries.append({**quantizer, "cfg": numbers.attributes(weight=kind == "weight")})
    return {"quant_cfg": entries, "algorithm": "max"}


def auto_quantized(transformer: nn.Module, probe: Probe, bits: float, score: Score) -> dict[str, str]:
    """The format that modelopt's search gives each layer, for so many bits per weight of the layers it may choose."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from modelopt.torch.quantization import auto_quantize
    cpu_backend.register()
    searched = copy.deepcopy(transformer)
    choices = choose(searched)
    free = sum(choice.layer.weight.numel() for choice in choices if choice.quantized)
    kept = sum(choice.layer.weight.numel() for choice in choices if not choice.quantized)
    batches = list(probe.values())

    def loss(output: tuple, batch: Any) -> torch.Tensor:
        return (output[0] - batch.outputs[0]).square().mean()

    def step(model: nn.Module, batch: Any) -> Any:
        output = model(**batch.arguments)
        return output if score == "gradient" else output[0]

    quiet = io.StringIO()
    with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet), torch.enable_grad():
        auto_quantize(
            searched,
            constraints={"effective_bits": (bits * free + KEPT_BITS * kept) / (free + kept)},
            quantization_formats=[wildcards(FORMATS[name]) for name in PAIR],
            data_loader=batches,
            forward_step=step,
            loss_func=loss if score == "gradient" else None,
            disabled_layers=[choice.name for choice in choices if not choice.quantized],
            num_calib_steps=len(batches),
            num_score_steps=len(batches),
            method=score,
        )
    named = {FORMATS[name].weight.num_bits: name for name in PAIR}
    quantizers = {c.name: searched.get_submodule(c.name).weight_quantizer for c in choices if c.quantized}
    return {name: named[q.num_bits] if q.is_enabled else FLOAT for name, q in quantizers.items()}


def against_modelopt(
    transformer: nn.Module, table: SensitivityTable, seen: Probe, unseen: Probe, bits: float, score: Score
) -> dict[str, Any]:
    """modelopt's choice and ours of its size, with measured errors; or modelopt's refusal."""
    try:
        theirs = auto_quantized(transformer, seen, bits, score)
    except (ValueError, RuntimeError, NotImplementedError) as error:
        return {"bits": bits, "score": score, "refused": str(error).strip().splitlines()[0]}
    size = sum(layer.weight_bits(theirs[layer.name]) for layer in table.layers)
    ours = allocate(table, max_bytes=math.ceil(size / 8), formats=PAIR)
    return {
        "bits": bits,
        "score": score,
        "modelopt": theirs,
        "modelopt_bits": size / ours.num_weights,
        "modelopt_error": joint_error(transformer, theirs, unseen),
        "ours": ours.formats,
        "ours_bits": ours.bits_per_weight,
        "ours_error": joint_error(transformer, ours.formats, unseen),
        "ours_predicted": ours.predicted_error,
    }


@torch.no_grad()
def main(
    model: str = "fashion-4step",
    formats: tuple[str, ...] = tuple(FORMATS),
    samples: int = 10,
    bits: tuple[float, ...] = (5.0, 6.0, 7.0),
    at: tuple[str, ...] = ("w4a4", "nvfp4", "nvfp4_svdquant", "fp8"),
    table: Path | None = None,
    seed: int = 0,
    threads: int = 1,
    out: Path = RESULTS / "mixed_precision.json",
) -> None:
    """Measure, print and store.

    Args:
        model: shipped name, or a folder with a pipeline of ours.
        formats: to measure each layer in.
        samples: generations behind each of the two probes.
        bits: average sizes at which modelopt's search is asked.
        at: formats whose size the mixture gets.
        table: a saved sensitivity table of this model, instead of measuring one.
        seed: of the probe that makes the table; the next one measures.
        threads: of torch.
        out: JSON file.
    """
    torch.set_num_threads(threads)
    pipe = load(model)
    seen, unseen = (record_probe(pipe, samples, torch.Generator().manual_seed(seed + i)) for i in (0, 1))
    found = sensitivity(pipe, seen, formats, progress=True) if table is None else SensitivityTable.load(table)
    print(found, flush=True)
    contests = []
    for format in at:
        contests += compare_with_uniform(pipe, found, unseen, at=(format,))
        print(contests[-1], flush=True)
    searches = []
    for size in bits:
        for score in ("gradient", "kl_div"):
            searches.append(against_modelopt(pipe.transformer, found, seen, unseen, size, score))
            print({key: value for key, value in searches[-1].items() if key not in ("modelopt", "ours")}, flush=True)
    stored = {
        "machine": machine(),
        "protocol": {"model": Path(model).name, "samples": samples, "seed": seed, "pair": PAIR},
        "sensitivity": asdict(found),
        "contests": [asdict(contest) for contest in contests],
        "auto_quantize": searches,
    }
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(stored, indent=1) + "\n")


if __name__ == "__main__":
    tyro.cli(main)
