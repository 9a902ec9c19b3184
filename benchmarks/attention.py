"""Every attention kernel against the ones there are, at the shapes of FLUX.2, LTX-2 and Wan, on a CUDA GPU.

    python benchmarks/attention.py --out benchmarks/results/attention-h200.json

Each contender gets the same bfloat16 q, k, v and is timed as a user would call it: quantization, smoothing and layout
changes count. The contenders take turns, round after round, and a figure is the median of its rounds. Beside the
speed stands the accuracy against float64 on the first heads and queries (cosine and relative L1, sum|o - r| / sum|r|),
because a kernel that computes something else has no speed. TFLOPS count the work asked for: 4 b h lq lk d for dense
attention, times the density of tiles or the share of active tokens. `of_peak` divides by what a large bfloat16 matrix
product reaches on the same machine in the same run, so 8-bit kernels may exceed 1.

K carries a bias per channel, as trained models do; without one, smoothing would look useless (SageAttention, Zhang et
al. 2024, arXiv 2410.02367, section 4.2). Contenders whose library or hardware is missing are listed with the reason.
"""

import importlib
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffusion_opt.evaluation import machine
from diffusion_opt.kernels.attention import CachedRegion, attention, explain
from diffusion_opt.kernels.attention.dense import oracle as reference
from diffusion_opt.kernels.attention.region import Region
from diffusion_opt.kernels.attention.sparse import BlockMask

Call = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Shape:
    """Self-attention of a model: (batch 1, heads, tokens, head dimension)."""

    name: str
    heads: int
    tokens: int
    head_dim: int = 128

    def flops(self, density: float = 1.0) -> float:
        """FLOP of the scores and of their product with the values."""
        return 4 * self.heads * self.tokens**2 * self.head_dim * density


SHAPES = (  # heads and widths from the models' configs; tokens from resolution, frames and patch size
    Shape("FLUX.2 1024 x 1024 + 512 text", 48, 4608),
    Shape("FLUX.2 2048 x 2048 + 512 text", 48, 16896),
    Shape("LTX-2 768 x 512 x 121", 32, 6144),
    Shape("LTX-2 1216 x 704 x 121", 32, 13376),
    Shape("LTX-2 audio", 32, 512, 64),
    Shape("Wan 1.3B 832 x 480 x 81", 12, 32760),
    Shape("Wan 14B 832 x 480 x 81", 40, 32760),
)
BACKENDS = {
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
}
PRECISIONS = ("dense", "int8", "int8-fp8", "fp8", "nvfp4")
DENSITIES = (0.5, 0.2)
SHARES = (0.2, 0.1)  # of tokens that are active, for region attention
BLOCK = 64  # tokens of a tile of the sparse masks
PEAK_SIZE = 8192
LIBRARIES = {
    "SageAttention": ("sageattention", "sageattn"),
    "FlashAttention-3": ("flash_attn_interface", "flash_attn_func"),
}
CHECKED_HEADS, CHECKED_QUERIES = 2, 256  # what the float64 reference computes


@dataclass(frozen=True, slots=True)
class Row:
    """One contender at one shape."""

    shape: str
    contender: str
    ms: float
    tflops: float
    of_peak: float  # of a large bfloat16 matrix product
    density: float
    cosine: float
    relative_l1: float
    runs: str = ""  # for our own: which kernel, and why


@dataclass(frozen=True, slots=True)
class Contender:
    """A way to compute attention, or the part of it that `density` says."""

    name: str
    call: Call
    density: float = 1.0  # share of the work of dense attention
    mask: BlockMask | None = None  # the tiles that are computed, if not all
    explained: Callable[[Tensor, Tensor, Tensor], str] | None = None  # only ours

    @property
    def refusals(self) -> tuple[type[Exception], ...]:
        """What it raises where this hardware, shape or build cannot; from ours anything but ValueError is a defect."""
        return (ValueError,) if self.explained else (ValueError, RuntimeError, NotImplementedError)


def inputs(shape: Shape, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Normal q, k, v; k with a bias per channel of twice its deviation."""
    generator = torch.Generator(device).manual_seed(0)
    size = (1, shape.heads, shape.tokens, shape.head_dim)
    q, k, v = (torch.randn(size, generator=generator, device=device) for _ in range(3))
    bias = 2 * torch.randn(1, shape.heads, 1, shape.head_dim, generator=generator, device=device)
    return q.to(dtype), (k + bias).to(dtype), v.to(dtype)


def random_mask(tokens: int, density: float, device: str) -> BlockMask:
    """The same share of tiles in each row, the diagonal among them."""
    blocks = -(-tokens // BLOCK)
    score = torch.rand(blocks, blocks, generator=torch.Generator().manual_seed(0)).fill_diagonal_(2)
    kept = score.argsort(1, descending=True)[:, : max(1, round(density * blocks))]
    table = torch.zeros(blocks, blocks, dtype=torch.bool).scatter(1, kept, True)
    return BlockMask.from_dense(table[None, None].to(device), BLOCK, BLOCK)


def contenders(shape: Shape, device: str) -> tuple[list[Contender], dict[str, str]]:
    """Ours, torch's and the libraries'; and those that cannot be tried, with the reason."""
    found = [ours(name, precision=name) for name in PRECISIONS]
    for density in DENSITIES:
        mask = random_mask(shape.tokens, density, device)
        found.append(ours(f"sparse {density:g}", mask.density, mask, sparsity=mask))
    for share in SHARES:
        active = torch.arange(round(share * shape.tokens), device=device)
        region = Region.from_index(active[None], shape.tokens)
        calls = partial(regional, attention, region), partial(regional, explain, region)
        found.append(Contender(f"diffopt region {share:g}", calls[0], share, explained=calls[1]))
    found += [Contender(name, partial(sdpa, backend)) for name, backend in BACKENDS.items()]
    missing = {}
    for name, (module, function) in LIBRARIES.items():
        try:
            call = getattr(importlib.import_module(module), function)
        except ImportError as error:
            missing[name] = str(error)
        else:
            found.append(Contender(name, partial(foreign, call)))
    return found, missing


def ours(name: str, density: float = 1.0, mask: BlockMask | None = None, **options: Any) -> Contender:
    call, explained = partial(attention, **options), partial(explain, **options)
    return Contender(f"diffopt {name}", call, density, mask, explained)


def regional(run: Callable, region: Region, q: Tensor, k: Tensor, v: Tensor) -> Any:
    """The first tokens are active; k and v serve as caches that already hold everything."""
    active = slice(0, region.index.shape[1])
    return run(q[:, :, active], k[:, :, active], v[:, :, active], sparsity=CachedRegion(region, k, v))


def sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v)


def foreign(call: Callable, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """SageAttention and FlashAttention-3: (b, tokens, heads, d) there; some releases also return the lse."""
    layout = {"tensor_layout": "NHD"} if call.__name__ == "sageattn" else {}
    out = call(*(x.transpose(1, 2).contiguous() for x in (q, k, v)), **layout)
    return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)


def accuracy(out: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask | None) -> tuple[float, float]:
    """Cosine and relative L1 against float64 on the first heads and queries."""
    some, rows = slice(0, CHECKED_HEADS), slice(0, min(CHECKED_QUERIES, out.shape[2]))
    tiles = None
    if mask is not None:
        tiles = mask.elements(q.shape[2], k.shape[2])[:, some, rows]
    want, _ = reference.attention(q[:, some, rows].double(), k[:, some].double(), v[:, some].double(), tiles)
    got = out[:, some, rows].double()
    cosine = F.cosine_similarity(got.flatten(), want.flatten(), dim=0)
    return float(cosine), float((got - want).abs().sum() / want.abs().sum())


def timed_ms(call: Callable[[], object], device: str) -> float:
    """Milliseconds of one call, by the GPU's own clock where there is one."""
    if device != "cuda":
        began = perf_counter()
        call()
        return (perf_counter() - began) * 1e3
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def measured_peak(device: str, size: int = PEAK_SIZE, rounds: int = 20) -> float:
    """TFLOPS that a square bfloat16 matrix product reaches here."""
    a = torch.randn(size, size, device=device).bfloat16()
    times = [timed_ms(lambda: a @ a, device) for _ in range(rounds + 3)][3:]
    return 2 * size**3 / statistics.median(times) / 1e9


def measure(
    shape: Shape, device: str, dtype: torch.dtype, peak: float, rounds: int
) -> tuple[list[Row], dict[str, str]]:
    """All contenders at a shape, in turns. A contender that refuses is left out, with its reason."""
    q, k, v = inputs(shape, device, dtype)
    entered, left_out = contenders(shape, device)
    errors, times = {}, {}
    for one in entered:
        try:
            errors[one.name] = accuracy(one.call(q, k, v), q, k, v, one.mask)
        except one.refusals as error:
            left_out[one.name] = str(error).strip().splitlines()[0]
    running = [one for one in entered if one.name in errors]
    for _ in range(rounds):
        for one in running:
            times.setdefault(one.name, []).append(timed_ms(partial(one.call, q, k, v), device))
    rows = []
    for one in running:
        ms = statistics.median(times[one.name])
        tflops = shape.flops(one.density) / ms / 1e9
        runs = one.explained(q, k, v) if one.explained else ""
        rows.append(Row(shape.name, one.name, ms, tflops, tflops / peak, one.density, *errors[one.name], runs))
    return rows, left_out


def shown(rows: list[Row]) -> str:
    """The table for a terminal."""
    head = f"{'contender':22}{'ms':>9}{'TFLOPS':>9}{'of peak':>9}{'cosine':>10}{'rel. L1':>10}"
    lines = []
    for row in rows:
        if not lines or row.shape != lines[-1][0]:
            lines.append((row.shape, f"\n{row.shape}\n{head}"))
        figures = f"{row.ms:9.3f}{row.tflops:9.1f}{row.of_peak:9.2f}{row.cosine:10.5f}{row.relative_l1:10.4f}"
        lines.append((row.shape, f"{row.contender:22}{figures}"))
    return "\n".join(text for _, text in lines)


def main(out: Path | None = None, rounds: int = 20, only: str = "") -> None:
    """Measure all contenders at all shapes and print the table.

    Args:
        out: JSON file for the figures and the machine.
        rounds: timed calls of each contender.
        only: shapes whose name contains this.
    """
    if not torch.cuda.is_available():
        print(
            "no CUDA device: kernel speed cannot be measured here. `diffusion-opt kernels report` needs none: it "
            "compiles every kernel for five GPU generations and shows registers, opcodes and a static roofline.",
            file=sys.stderr,
        )
        raise SystemExit(2)
    peak = measured_peak("cuda")
    rows, left_out = [], {}
    for shape in [shape for shape in SHAPES if only in shape.name]:
        fresh, missing = measure(shape, "cuda", torch.bfloat16, peak, rounds)
        print(shown(fresh), flush=True)
        rows += fresh
        left_out[shape.name] = missing
    for shape_name, reasons in left_out.items():
        for name, reason in reasons.items():
            print(f"left out at {shape_name}: {name}: {reason}")
    if out is not None:
        report = {"machine": machine(), "peak_tflops_bf16_matmul": peak, "rounds": rounds}
        out.write_text(
            json.dumps({**report, "rows": [asdict(row) for row in rows], "left_out": left_out}, indent=1) + "\n"
        )


if __name__ == "__main__":
    tyro.cli(main)
