"""One run on a GPU that answers what no compiler can: are the kernels right there, and how fast is each.

    python benchmarks/kernels.py --out benchmarks/results/kernels-h200.json       # 8 minutes at most on an H200
    python benchmarks/kernels.py --dry                                             # tiny shapes, on a CPU, in seconds

Three parts, each row on its own, so that one failing kernel does not end the run:

    correct     every kernel on the device against its PyTorch oracle on the CPU: relative error, and what is allowed
    attention   plain against specialized warps, 8 bits, FP4, sparse at three densities, a region at four shares of
                active tokens; beside torch's SDPA by cuDNN and by flash attention; forward and backward
    linear      W8A8 products against `torch._int_mm`, `torch._scaled_mm` and bfloat16

`attention.py` has the shapes of models and the libraries of others; this script has one shape of each and all of ours.
Contenders take turns; a figure is the median of its rounds. A row that could not run says why. `--minutes` ends the
timing early: what was measured until then is written. In the dry mode the kernels are replaced by their PyTorch oracles
and the figures mean nothing; it exists so that the script is tested where there is no GPU.
"""

import json
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from time import monotonic, perf_counter
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffusion_opt.evaluation import machine
from diffusion_opt.kernels.attention import CachedRegion, attention
from diffusion_opt.kernels.attention.region import Region
from diffusion_opt.kernels.attention.sparse import BlockMask
from diffusion_opt.kernels.fused.modulate import gated_modulate
from diffusion_opt.kernels.fused.qk_norm_rope import qk_norm_rope
from diffusion_opt.kernels.gemm import quantize_rows, quantized_linear

PRECISIONS = ("dense", "int8", "int8-fp8", "fp8", "nvfp4")
DENSITIES = (0.5, 0.25, 0.1)
SHARES = (0.5, 0.25, 0.1, 0.05)  # of tokens that are active
ALLOWED = {"dense": 1e-2, "int8": 2e-2, "int8-fp8": 3e-2, "fp8": 3e-2, "nvfp4": 3e-2}  # from the oracle, relative
BACKENDS = {"SDPA cuDNN": SDPBackend.CUDNN_ATTENTION, "SDPA flash": SDPBackend.FLASH_ATTENTION}


@dataclass(frozen=True, slots=True)
class Sizes:
    """What is computed: attention (b, heads, tokens, head_dim), and a linear layer of rows x features to outputs."""

    heads: int
    tokens: int
    head_dim: int
    rows: int
    features: int
    outputs: int
    block: int  # side of the tiles of a sparse mask


FULL = Sizes(24, 16384, 128, 16384, 6144, 6144, 128)
TINY = Sizes(2, 96, 16, 24, 32, 48, 16)


@dataclass(frozen=True, slots=True)
class Timed:
    """One contender."""

    name: str
    call: Callable[[], object]
    flops: float  # of the work asked for
    times_ms: list[float] = field(default_factory=list)


def heads(sizes: Sizes, device: str, tokens: int | None = None) -> list[Tensor]:
    """Normal q, k, v in bfloat16; k has a bias per channel, as trained models do."""
    generator = torch.Generator().manual_seed(0)
    shape = (1, sizes.heads, tokens or sizes.tokens, sizes.head_dim)
    q, k, v = (torch.randn(shape, generator=generator) for _ in range(3))
    k += 2 * torch.randn(1, sizes.heads, 1, sizes.head_dim, generator=generator)
    return [x.to(device, torch.bfloat16) for x in (q, k, v)]


def tiles(tokens: int, block: int, density: float, device: str) -> BlockMask:
    """The same share of tiles in each row, the diagonal among them."""
    count = -(-tokens // block)
    score = torch.rand(count, count, generator=torch.Generator().manual_seed(0)).fill_diagonal_(2)
    kept = score.argsort(1, descending=True)[:, : max(1, round(density * count))]
    table = torch.zeros(count, count, dtype=torch.bool).scatter(1, kept, True)
    return BlockMask.from_dense(table[None, None].to(device), block, block)


def region_of(tokens: int, share: float, device: str) -> Region:
    active = torch.arange(max(1, round(share * tokens)), device=device)
    return Region.from_index(active[None], tokens)


def regional(region: Region, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The first tokens are active; k and v serve as caches that already hold everything."""
    active = slice(0, region.index.shape[1])
    return attention(q[:, :, active], k[:, :, active], v[:, :, active], sparsity=CachedRegion(region, k, v))


def sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v)


def with_gradient(run: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """Forward and backward."""
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    return torch.autograd.grad(run(*inputs).float().sum(), inputs)


def checks(sizes: Sizes, device: str) -> Iterator[tuple[str, float, Callable[[str], Any]]]:
    """Name, allowed relative error, and what to compute on a device, small: the CPU's answer is the oracle's."""
    tokens = min(sizes.tokens, 333)

    def inputs(where: str) -> list[Tensor]:
        return heads(sizes, where, tokens)

    for precision in PRECISIONS:
        yield precision, ALLOWED[precision], lambda w, p=precision: attention(*inputs(w), precision=p)
    yield "dense, bool mask", 1e-2, lambda w: attention(*inputs(w), torch.arange(tokens, device=w) % 3 > 0)
    yield "dense gradient", 2e-2, lambda w: with_gradient(attention, *inputs(w))
    yield "nvfp4 gradient", 5e-2, lambda w: with_gradient(partial(attention, precision="nvfp4"), *inputs(w))
    mask = partial(tiles, tokens, sizes.block, 0.5)
    yield "sparse", 1e-2, lambda w: attention(*inputs(w), sparsity=mask(w))
    yield "sparse gradient", 2e-2, lambda w: with_gradient(partial(attention, sparsity=mask(w)), *inputs(w))
    yield "region", 1e-2, lambda w: regional(region_of(tokens, 0.25, w), *inputs(w))
    for dtype in (torch.int8, torch.float8_e4m3fn):
        yield f"linear {dtype}", 1e-2, lambda w, d=dtype: linear(sizes, w, d, rows=64)()
    row = torch.randn(1, 40, 64, generator=torch.Generator().manual_seed(1))
    yield "gated modulate", 1e-2, lambda w: gated_modulate(*[row.to(w, torch.bfloat16)] * 2, *[row[:, :1].to(w)] * 3)
    yield "norm and rope", 1e-2, lambda w: qk_norm_rope(inputs(w)[0], torch.ones(sizes.head_dim, device=w))


def linear(sizes: Sizes, device: str, dtype: torch.dtype, rows: int | None = None) -> Callable[[], Tensor]:
    """A W8A8 layer with inputs quantized before."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(1, rows or sizes.rows, sizes.features, generator=generator)
    weight = torch.randn(sizes.outputs, sizes.features, generator=generator)
    x, weight = (quantize_rows(tensor.to(device, torch.bfloat16), dtype) for tensor in (x, weight))
    return lambda: quantized_linear(x, weight, None, torch.bfloat16)


def compare(sizes: Sizes, device: str) -> list[dict[str, Any]]:
    """Each check: relative error against the CPU, whether it is allowed, or why it could not run."""
    rows = []
    for name, allowed, compute in checks(sizes, device):
        try:
            got, want = (flat(compute(where)) for where in (device, "cpu"))
        except (ValueError, RuntimeError, NotImplementedError) as error:
            rows.append({"check": name, "right": False, "why": str(error).strip().splitlines()[0]})
            continue
        error = float((got - want).norm() / want.norm())
        rows.append({"check": name, "right": error <= allowed, "relative_error": error, "allowed": allowed})
    return rows


def flat(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    """All numbers of a result in one row, float64 on the CPU."""
    parts = (result,) if isinstance(result, Tensor) else result
    return torch.cat([part.detach().double().cpu().flatten() for part in parts])


def attention_contenders(sizes: Sizes, device: str) -> list[Timed]:
    """Ours in every form, and torch's."""
    q, k, v = heads(sizes, device)
    work = 4 * sizes.heads * sizes.tokens**2 * sizes.head_dim
    found = [Timed(f"diffopt {name}", partial(attention, q, k, v, precision=name), work) for name in PRECISIONS]
    found += plain_and_specialized(q, k, v, work)
    for density in DENSITIES:
        mask = tiles(sizes.tokens, sizes.block, density, device)
        call = partial(attention, q, k, v, sparsity=mask)
        found.append(Timed(f"diffopt sparse {density:g}", call, work * mask.density))
    for share in SHARES:
        region = region_of(sizes.tokens, share, device)
        found.append(Timed(f"diffopt region {share:g}", partial(regional, region, q, k, v), work * share))
    found.append(Timed("diffopt dense with gradient", partial(with_gradient, attention, q, k, v), 3.5 * work))
    for name, backend in BACKENDS.items():
        run = partial(sdpa, backend)
        found.append(Timed(name, partial(run, q, k, v), work))
        found.append(Timed(f"{name} with gradient", partial(with_gradient, run, q, k, v), 3.5 * work))
    return found


def plain_and_specialized(q: Tensor, k: Tensor, v: Tensor, work: float) -> list[Timed]:
    """The two forward kernels by name, past the launch table's choice between them. Nothing where there is no GPU."""
    if not q.is_cuda:
        return []
    from diffusion_opt.kernels import runtime
    from diffusion_opt.kernels.attention.dense import forward, specialized
    from diffusion_opt.kernels.launch import LAUNCH, chosen

    scale = q.shape[-1] ** -0.5
    found = [Timed("diffopt dense, plain", lambda: forward.forward(q, k, v, None, scale), work)]
    arch = runtime.architecture(q.device)
    if arch in LAUNCH[specialized.ROW]:
        choice = chosen(specialized.ROW, q.shape[-1])[arch]
        call = partial(specialized.forward, q, k, v, scale, choice)
        found.append(Timed("diffopt dense, specialized", call, work))
    return found


def linear_contenders(sizes: Sizes, device: str) -> list[Timed]:
    """W8A8 of ours, torch's bare 8-bit products, and bfloat16."""
    work = 2 * sizes.rows * sizes.features * sizes.outputs
    x = torch.randn(sizes.rows, sizes.features, device=device).bfloat16()
    weight = torch.randn(sizes.outputs, sizes.features, device=device).bfloat16()
    eight = [tensor.clamp(-4, 4).to(torch.float8_e4m3fn) for tensor in (x, weight)]
    whole = [(tensor * 30).clamp(-127, 127).to(torch.int8) for tensor in (x, weight)]
    one = torch.ones((), device=device)
    return [
        Timed("diffopt linear int8", linear(sizes, device, torch.int8), work),
        Timed("diffopt linear fp8", linear(sizes, device, torch.float8_e4m3fn), work),
        Timed("torch._int_mm", lambda: torch._int_mm(whole[0], whole[1].t()), work),
        Timed(
            "torch._scaled_mm",
            lambda: torch._scaled_mm(eight[0], eight[1].t(), one, one, out_dtype=torch.bfloat16),
            work,
        ),
        Timed("bfloat16", lambda: x @ weight.t(), work),
    ]


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


def measure(contenders: list[Timed], device: str, rounds: int, until: float) -> list[dict[str, Any]]:
    """Contenders in turns until the rounds are full or the time is over; one that cannot run says why."""
    reasons: dict[str, str] = {}
    for one in contenders:
        try:
            one.call()  # compiles
            timed_ms(one.call, device)
        except (ValueError, RuntimeError, NotImplementedError) as error:
            reasons[one.name] = str(error).strip().splitlines()[0]
    for _ in range(rounds):
        for one in contenders:
            if one.name not in reasons and (not one.times_ms or monotonic() < until):
                one.times_ms.append(timed_ms(one.call, device))
    rows = []
    for one in contenders:
        if one.name in reasons:
            rows.append({"contender": one.name, "why": reasons[one.name]})
            continue
        ms = statistics.median(one.times_ms)
        rows.append({"contender": one.name, "ms": ms, "tflops": one.flops / ms / 1e9, "rounds": len(one.times_ms)})
    return rows


def shown(part: str, rows: list[dict[str, Any]]) -> str:
    """Rows for a terminal."""
    lines = [part]
    for row in rows:
        numbers = {key: value for key, value in row.items() if key not in ("check", "contender")}
        text = "  ".join(
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in numbers.items()
        )
        lines.append(f"  {row.get('check') or row['contender']:30}{text}")
    return "\n".join(lines)


def main(out: Path | None = None, rounds: int = 20, minutes: float = 7.0, dry: bool = False) -> None:
    """Check and time every kernel. Exit status 1 if one of them is wrong, 2 without a GPU.

    Args:
        out: JSON file for the figures and the machine.
        rounds: timed calls of each contender.
        minutes: no timing begins after this.
        dry: tiny shapes on the CPU, to test the script.
    """
    if not dry and not torch.cuda.is_available():
        print("no CUDA device: kernels cannot be timed here; --dry tests the script on a CPU", file=sys.stderr)
        raise SystemExit(2)
    device, sizes = ("cpu", TINY) if dry else ("cuda", FULL)
    until = monotonic() + 60 * minutes
    report: dict[str, Any] = {"machine": machine(), "dry": dry, "sizes": asdict(sizes)}
    parts: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "correct": lambda: compare(sizes, device),
        "attention": lambda: measure(attention_contenders(sizes, device), device, rounds, until),
        "linear": lambda: measure(linear_contenders(sizes, device), device, rounds, until),
    }
    for part, run in parts.items():
        report[part] = run()
        print(shown(part, report[part]), flush=True)
        if out is not None:  # after each part, so that an interrupted run leaves what it has
            out.write_text(json.dumps(report, indent=1) + "\n")
    if not all(row["right"] for row in report["correct"]):
        raise SystemExit(1)


if __name__ == "__main__":
    tyro.cli(main)
