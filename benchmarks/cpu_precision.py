"""Which low precision is really faster on this CPU, and from which width: `benchmarks/results/cpu_precision.json`.

    python benchmarks/cpu_precision.py                           one thread, then all cores; minutes
    python benchmarks/cpu_precision.py --compile                 also torch.compile of the whole model (slow)

Every way that torch has to multiply in fewer bits replaces a float32 `nn.Linear`, alone at widths of 128 … 1024 and in
all block linears of a shipped model. The candidates of a width, and those of the model, take turns in one process; a
figure is the median of its rounds, a speed-up the ratio of two of them. The error is the relative L2 distance to the
float32 result, of the layer on normal inputs and of the model's finished latents.

`pays from` is the smallest width from which a candidate is faster by the margin at every width measured. What comes out
depends on the instructions of the processor (VNNI, AMX) above all, so the machine, its instructions and its load stand
in the file. torchao takes part if it is installed; this package does not need it. A candidate that this CPU or build
refuses is listed with the reason.
"""

import copy
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from diffusion_opt.evaluation import interleaved, machine
from diffusion_opt.models import load
from diffusion_opt.quantization import DynamicInt8Linear, choose
from diffusion_opt.quantization.faster.int8_cpu import activation_grid, kernel_here, weight_scales

RESULTS = Path(__file__).parent / "results"
WIDTHS = (64, 128, 192, 256, 384, 512, 768, 1024)
MARGIN = 1.1  # what counts as faster
REFUSALS = (ValueError, RuntimeError, NotImplementedError, ImportError)


@dataclass(frozen=True, slots=True)
class Row:
    """One candidate at one width (None: the model) with so many threads of torch."""

    threads: int
    width: int | None
    candidate: str
    ms: float
    iqr_ms: float
    speedup: float  # over float32 in the same turns
    error: float  # relative L2 distance to float32


class Calibrated(nn.Module):
    """The vnni kernel with a fixed activation grid, that of the first input: what finding the range costs."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.layer, self.grid = DynamicInt8Linear(linear, "vnni"), None

    def forward(self, x: Tensor) -> Tensor:
        self.grid = self.grid or activation_grid(x, 8)
        return self.layer.product(x, *self.grid)


class Cast(nn.Module):
    """Weights held and multiplied in half precision, float32 outside."""

    def __init__(self, dtype: torch.dtype, linear: nn.Linear) -> None:
        super().__init__()
        self.layer = copy.deepcopy(linear).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.to(self.layer.weight.dtype)).float()


class IntProduct(nn.Module):
    """`torch._int_mm` with one activation scale per token."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.scales, self.bias = weight_scales(linear.weight), linear.bias
        self.weight = (linear.weight.detach() / self.scales[:, None]).round().to(torch.int8).t()

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        scale = rows.abs().amax(1, keepdim=True).clamp(min=1e-30) / 127
        out = torch._int_mm((rows / scale).round_().to(torch.int8), self.weight).float().mul_(scale).mul_(self.scales)
        out = out if self.bias is None else out.add_(self.bias)
        return out.view(*x.shape[:-1], -1)


class WeightOnly(nn.Module):
    """`torch._weight_int8pack_mm`: INT8 weights, activations as they are."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.scales, self.bias = weight_scales(linear.weight), linear.bias
        self.weight = (linear.weight.detach() / self.scales[:, None]).round().to(torch.int8)

    def forward(self, x: Tensor) -> Tensor:
        out = torch._weight_int8pack_mm(x.reshape(-1, x.shape[-1]), self.weight, self.scales)
        return (out if self.bias is None else out + self.bias).view(*x.shape[:-1], -1)


class HalfWeights(nn.Module):
    """fbgemm's product of float32 activations with float16 weights."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.packed = torch.ops.quantized.linear_prepack_fp16(linear.weight.detach(), linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.quantized.linear_dynamic_fp16(x, self.packed)


class ReducedProduct(nn.Module):
    """Float32 tensors that oneDNN may multiply in bfloat16."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.layer = linear

    def forward(self, x: Tensor) -> Tensor:
        with bfloat16_products():
            return F.linear(x, self.layer.weight, self.layer.bias)


@contextmanager
def bfloat16_products() -> Iterator[None]:
    before = torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before


def torchao_linear(config: str, linear: nn.Linear) -> nn.Module:
    """The layer quantized by torchao. Raises ImportError if that is not installed."""
    if find_spec("torchao") is None:
        raise ImportError("torchao is not installed")
    from torchao import quantization

    holder = nn.Sequential(copy.deepcopy(linear))
    quantization.quantize_(holder, getattr(quantization, config)())
    return holder[0]


CANDIDATES: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "float32": lambda linear: linear,
    "dynamic INT8, vnni": partial(DynamicInt8Linear, kernel="vnni"),
    "dynamic INT8, portable": partial(DynamicInt8Linear, kernel="portable"),
    "INT8 with a calibrated scale": Calibrated,
    "INT8 by _int_mm": IntProduct,
    "INT8 weights only": WeightOnly,
    "bfloat16": partial(Cast, torch.bfloat16),
    "float16": partial(Cast, torch.float16),
    "float32, bfloat16 products": ReducedProduct,
    "float16 weights only": HalfWeights,
    "torchao INT8 dynamic": partial(torchao_linear, "Int8DynamicActivationInt8WeightConfig"),
    "torchao INT8 weights only": partial(torchao_linear, "Int8WeightOnlyConfig"),
}


def relative_error(output: Tensor, exact: Tensor) -> float:
    return float((output.float() - exact).norm() / exact.norm())


def admitted(
    builders: dict[str, Callable[[], Callable[[], Tensor]]],
) -> tuple[dict[str, Callable[[], Tensor]], dict[str, float], dict[str, str]]:
    """Calls of the candidates that run here, their errors against the first one, and the reasons of the others."""
    calls, errors, left_out = {}, {}, {}
    exact = None
    for name, build in builders.items():
        try:
            call = build()
            output = call()
        except REFUSALS as error:
            left_out[name] = str(error).strip().splitlines()[0]
            continue
        exact = output if exact is None else exact
        calls[name], errors[name] = call, relative_error(output, exact)
    return calls, errors, left_out


def timed_rows(width: int | None, builders: dict, rounds: int) -> tuple[list[Row], dict[str, str]]:
    """All candidates in turns; the first is float32."""
    calls, errors, left_out = admitted(builders)
    timings = interleaved(calls, rounds, warmup=2)
    base = timings["float32"].median_s
    rows = []
    for name, timing in timings.items():
        seconds = timing.median_s
        figures = (seconds * 1e3, timing.iqr_s * 1e3, base / seconds, errors[name])
        rows.append(Row(torch.get_num_threads(), width, name, *figures))
    return rows, left_out


def single_layer(width: int, tokens: int, rounds: int) -> tuple[list[Row], dict[str, str]]:
    """A square linear with bias on normal inputs (tokens, width)."""
    generator = torch.Generator().manual_seed(width)
    linear, x = nn.Linear(width, width), torch.randn(tokens, width, generator=generator)
    nn.init.normal_(linear.weight, std=width**-0.5, generator=generator)
    return timed_rows(width, {name: partial(_layer, make, linear, x) for name, make in CANDIDATES.items()}, rounds)


def _layer(make: Callable[[nn.Linear], nn.Module], linear: nn.Linear, x: Tensor) -> Callable[[], Tensor]:
    layer = make(linear)
    return lambda: layer(x)


def hopeless(rows: list[Row]) -> dict[str, str]:
    """Candidates many times slower than float32 at every width: the model need not wait for them."""
    best = {row.candidate: 0.0 for row in rows}
    for row in rows:
        best[row.candidate] = max(best[row.candidate], row.speedup)
    return {name: f"at best {speedup:.2f} of float32's speed alone" for name, speedup in best.items() if speedup < 0.2}


def whole_model(
    name: str, batch: int, rounds: int, compile: bool, without: dict[str, str]
) -> tuple[list[Row], dict[str, str]]:
    """Generation of a batch with all block linears replaced, and with the whole transformer in bfloat16."""
    builders = {each: partial(_model, name, batch, make) for each, make in CANDIDATES.items() if each not in without}
    builders["the whole model in bfloat16"] = partial(_model, name, batch, None)
    if compile:
        fast = "dynamic INT8, " + kernel_here()[0]
        for candidate in ("float32", fast):
            builders[f"{candidate}, compiled"] = partial(_model, name, batch, CANDIDATES[candidate], compile=True)
    rows, left_out = timed_rows(None, builders, rounds)
    return rows, {**{f"{each}, in the model": reason for each, reason in without.items()}, **left_out}


def _model(name: str, batch: int, make: Callable | None, compile: bool = False) -> Callable[[], Tensor]:
    pipe = load(name)
    pipe.set_progress_bar_config(disable=True)
    if make is None:
        pipe.transformer.to(torch.bfloat16)
        pipe.class_embedder.to(torch.bfloat16)
    else:
        for choice in choose(pipe.transformer):
            if choice.quantized:
                pipe.transformer.set_submodule(choice.name, make(choice.layer))
    if compile:
        pipe.transformer.compile()
    return partial(_latents, pipe, batch)


def _latents(pipe: DiffusionPipeline, batch: int) -> Tensor:
    prompts = [str(i % pipe.class_embedder.num_classes) for i in range(batch)]
    return pipe(prompts, generator=torch.Generator().manual_seed(0), output_type="latent").images


def pays_from(rows: list[Row], threads: int) -> dict[str, int | None]:
    """For each candidate the smallest width from which on it is always faster by the margin; None: no such width."""
    found: dict[str, int | None] = {}
    for name in dict.fromkeys(row.candidate for row in rows if row.width):
        mine = [row for row in rows if (row.candidate, row.threads) == (name, threads) and row.width]
        found[name] = None
        for row in sorted(mine, key=lambda row: -row.width):
            if row.speedup < MARGIN:
                break
            found[name] = row.width
    return found


def shown(rows: list[Row], threads: int) -> str:
    """Speed-ups by candidate and width, and the error of the model, for a terminal."""
    mine = {(row.candidate, row.width): row for row in rows if row.threads == threads}
    widths = [*sorted({width for _, width in mine if width}), None]
    head = "".join(f"{width or 'model':>8}" for width in widths)
    lines = [f"speed-up over float32, {threads} thread(s)", f"{'':30}{head}{'error':>9}{'pays from':>11}"]
    starts = pays_from(rows, threads)
    for name in dict.fromkeys(candidate for candidate, _ in mine):
        cells = "".join(f"{mine[name, w].speedup:8.2f}" if (name, w) in mine else f"{'':8}" for w in widths)
        error = f"{mine[name, None].error:9.4f}" if (name, None) in mine else f"{'':9}"
        lines.append(f"{name:30}{cells}{error}{starts.get(name) or 'never':>11}")
    return "\n".join(lines)


@torch.inference_mode()
def main(
    model: str = "fashion-1step",
    batch: int = 50,
    tokens: int = 490,
    widths: tuple[int, ...] = WIDTHS,
    threads: tuple[int, ...] = (),
    rounds: int = 15,
    compile: bool = False,
    out: Path = RESULTS / "cpu_precision.json",
) -> None:
    """Measure, print and store.

    Args:
        model: shipped name, or a folder with a pipeline of ours.
        batch: images a call of the model.
        tokens: rows of a single layer's input; 490 are ten images.
        widths: of the single layers.
        threads: of torch, one table each; default: one, and all cores.
        rounds: turns of each candidate.
        compile: also the compiled model; the first calls take minutes.
        out: JSON file.
    """
    rows, left_out = [], {}
    load_before = os.getloadavg()[0]
    used = threads or tuple(dict.fromkeys((1, machine()["cores"])))
    for number in used:
        torch.set_num_threads(number)
        made = [single_layer(width, tokens, rounds) for width in widths]
        slow = hopeless([row for fresh, _ in made for row in fresh])
        made.append(whole_model(model, batch, rounds, compile, slow))
        for fresh, refused in made:
            rows += fresh
            left_out |= refused
        print(shown(rows, number), flush=True)
    for name, reason in left_out.items():
        print(f"left out: {name}: {reason}")
    kernel, why = kernel_here()
    stored = {
        "machine": machine(),
        "kernel": f"{kernel}: {why}",
        "other_load": {"before": round(load_before, 2), "after": round(os.getloadavg()[0], 2)},
        "protocol": {"model": model, "batch": batch, "tokens": tokens, "rounds": rounds, "margin": MARGIN},
        "rows": [asdict(row) for row in rows],
        "pays_from": {str(number): pays_from(rows, number) for number in used},
        "left_out": left_out,
    }
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(stored, indent=1) + "\n")


if __name__ == "__main__":
    tyro.cli(main)
