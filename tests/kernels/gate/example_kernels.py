"""Small kernels for the tests of the compile gate: one that is fine, one that spills, two that do not compile."""

import triton
import triton.language as tl

from diffusion_opt.kernels.gate.case import CompileCase
from diffusion_opt.kernels.launch import LaunchConfig

DEPTH = 32


@triton.jit
def scores(q, k, out, keys, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DEPTH: tl.constexpr):
    """Row sums of exp2(q k^T) for q (BLOCK_M, DEPTH) and k (keys, DEPTH), tile by tile."""
    rows, columns, depth = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, DEPTH)
    queries = tl.load(q + rows[:, None] * DEPTH + depth[None, :])
    total = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, keys, BLOCK_N):
        inside = (start + columns)[None, :] < keys
        tile = tl.load(k + (start + columns)[None, :] * DEPTH + depth[:, None], mask=inside, other=0.0)
        total += tl.sum(tl.where(inside, tl.exp2(tl.dot(queries, tile)), 0.0), 1)
    tl.store(out + rows, total)


@triton.jit
def double(x, out, BLOCK_M: tl.constexpr):
    at = tl.arange(0, BLOCK_M)
    tl.store(out + at, tl.load(x + at) * 2)


def scores_case(name: str, choice: LaunchConfig, archs: tuple[int, ...], operand: str = "*bf16") -> CompileCase:
    constants = dict.fromkeys(("BLOCK_M", "BLOCK_N", "DEPTH"), "constexpr")
    return CompileCase(
        name=name,
        kernel=scores,
        signature={"q": operand, "k": operand, "out": "*fp32", "keys": "i32", **constants},
        constexprs={"DEPTH": DEPTH},
        divisible=("q", "k", "out"),
        launch=dict.fromkeys(archs, choice),
        opcodes={80: ("HMMA",), 90: ("HGMMA",), 100: ("UTCHMMA",)},
        loop_flops={"bf16": 2 * DEPTH},
        loop_exps=1,
    )


def cases() -> tuple[CompileCase, ...]:
    small = LaunchConfig(64, 32, 4, 2)
    row = {"x": "*fp32", "out": "*fp32", "BLOCK_M": "constexpr"}
    return (
        scores_case("fine", small, (80, 90, 100)),
        scores_case("spills", LaunchConfig(256, 256, 1, 1), (80,)),
        scores_case("not a power of two", LaunchConfig(48, 32, 4, 2), (80,)),
        scores_case("no such type", small, (80,), operand="*fp8e4nv"),
        CompileCase("row", double, row, {}, ("x", "out"), {90: LaunchConfig(256, 1, 4, 1)}, tiles=("BLOCK_M",)),
    )
