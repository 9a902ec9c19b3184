"""bfloat16 and float8 in the interpreter equal torch bit for bit; the repair is needed, and undone.

The first tests pin down what is wrong with Triton's own interpreter. When one of them fails, Triton has repaired it and
that part of `diffusion_opt/kernels/interpreter.py` can go.
"""

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from diffusion_opt.kernels import runtime

pytestmark = pytest.mark.interpreted

FLOATS = {"bf16": torch.bfloat16, "e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2, "fp16": torch.float16}
SIZE = 1024


@triton.jit
def cast_kernel(source, target, n: tl.constexpr):
    i = tl.arange(0, n)
    tl.store(target + i, tl.load(source + i).to(target.dtype.element_ty))


@triton.jit
def arithmetic_kernel(x, y, total, product, larger, n: tl.constexpr):
    i = tl.arange(0, n)
    a, b = tl.load(x + i), tl.load(y + i)
    tl.store(total + i, a + b)
    tl.store(product + i, a * b)
    tl.store(larger + i, tl.where(a > b, a, b))


@triton.jit
def reduction_kernel(x, total, largest, running, n: tl.constexpr):
    i = tl.arange(0, n)
    a = tl.load(x + i)
    tl.store(total, tl.sum(a, 0))
    tl.store(largest, tl.max(a, 0))
    tl.store(running + i, tl.cumsum(a, 0))


@triton.jit
def product_kernel(x, y, out, n: tl.constexpr):
    i = tl.arange(0, n)
    square = i[:, None] * n + i[None, :]
    tl.store(out + square, tl.dot(tl.load(x + square), tl.load(y + square)))


@triton.jit
def doubled(a):
    return a + a


@triton.jit
def calling_kernel(x, out, n: tl.constexpr):
    i = tl.arange(0, n)
    tl.store(out + i, doubled(tl.load(x + i)) + tl.zeros([n], tl.float32))


def numbers(dtype: torch.dtype = torch.float32, spread: float = 8.0) -> Tensor:
    """Normal numbers over many binades, with ties, zeros and both signs among them."""
    values = torch.randn(SIZE) * torch.exp2(torch.randn(SIZE) * spread)
    values[:8] = torch.tensor([0.0, -0.0, 1.0, 1.00390625, 1.01171875, -1.0625, 1.1875, 17.0])
    return values.to(dtype)


def bits(x: Tensor) -> Tensor:
    return x.view(torch.uint8 if x.element_size() == 1 else torch.uint16)


def saturated(x: Tensor, dtype: torch.dtype) -> Tensor:
    """torch's cast, with float8 clamped first as the hardware does."""
    return x.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype) if dtype.itemsize == 1 else x.to(dtype)


@pytest.mark.parametrize("dtype", [FLOATS["bf16"], FLOATS["e4m3"], FLOATS["e5m2"]], ids=["bf16", "e4m3", "e5m2"])
def test_unrepaired_casts_are_still_wrong(dtype):
    x, out = numbers(), torch.empty(SIZE, dtype=dtype)
    InterpretedFunction(cast_kernel.fn)[(1,)](x, out, SIZE)
    assert not torch.equal(bits(out), bits(saturated(x, dtype)))


def test_unrepaired_bfloat16_arithmetic_is_still_wrong():
    x, y = numbers(torch.bfloat16, spread=1), numbers(torch.bfloat16, spread=1)
    total, product, larger = torch.empty_like(x), torch.empty_like(x), torch.empty_like(x)
    InterpretedFunction(arithmetic_kernel.fn)[(1,)](x, y, total, product, larger, SIZE)
    assert not torch.equal(total, x + y) and not torch.equal(product, x * y)


def test_unrepaired_bfloat16_dot_is_still_wrong():
    x, y, out = torch.randn(16, 16).bfloat16(), torch.randn(16, 16).bfloat16(), torch.empty(16, 16)
    InterpretedFunction(product_kernel.fn)[(1,)](x, y, out, 16)
    assert not torch.allclose(out, x.float() @ y.float(), rtol=1e-2)


@pytest.mark.parametrize("name", FLOATS)
def test_casts_from_float32_round_to_nearest_even_and_saturate(name):
    x, out = numbers(), torch.empty(SIZE, dtype=FLOATS[name])
    runtime.run(cast_kernel, (1,), x, out, SIZE)
    torch.testing.assert_close(bits(out), bits(saturated(x, FLOATS[name])), rtol=0, atol=0)


@pytest.mark.parametrize(("name", "largest"), [("e4m3", 448.0), ("e5m2", 57344.0)])
def test_float8_saturates_and_keeps_nan(name, largest):
    x = torch.full((SIZE,), float("nan"))
    x[:6] = torch.tensor([1e9, -1e9, float("inf"), -float("inf"), largest * 1.04, -largest])
    out = torch.empty(SIZE, dtype=FLOATS[name])
    runtime.run(cast_kernel, (1,), x, out, SIZE)
    assert out[:6].float().tolist() == [largest, -largest, largest, -largest, largest, -largest]
    assert out[6:].float().isnan().all()


@pytest.mark.parametrize("source", [torch.int32, torch.int8, torch.float64, torch.float16, torch.float8_e4m3fn])
def test_casts_to_bfloat16_from_every_type(source):
    x = torch.arange(SIZE).sub(512).to(source) if not source.is_floating_point else saturated(numbers(), source)
    out = torch.empty(SIZE, dtype=torch.bfloat16)
    runtime.run(cast_kernel, (1,), x, out, SIZE)
    torch.testing.assert_close(out, x.to(torch.bfloat16), rtol=0, atol=0)


@pytest.mark.parametrize("target", [torch.int32, torch.float64, torch.float32, torch.float16])
def test_casts_from_bfloat16_to_every_type(target):
    x, out = numbers(torch.bfloat16, spread=2), torch.empty(SIZE, dtype=target)
    runtime.run(cast_kernel, (1,), x, out, SIZE)
    torch.testing.assert_close(out, x.to(target), rtol=0, atol=0)


def test_bfloat16_arithmetic_rounds_once_like_torch():
    x, y = numbers(torch.bfloat16), numbers(torch.bfloat16)
    total, product, larger = torch.empty_like(x), torch.empty_like(x), torch.empty_like(x)
    runtime.run(arithmetic_kernel, (1,), x, y, total, product, larger, SIZE)
    for got, expected in ((total, x + y), (product, x * y), (larger, torch.maximum(x, y))):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_bfloat16_reductions():
    x = torch.randn(SIZE).bfloat16()
    total, largest, running = torch.empty(1).bfloat16(), torch.empty(1).bfloat16(), torch.empty(SIZE).bfloat16()
    runtime.run(reduction_kernel, (1,), x, total, largest, running, SIZE)
    torch.testing.assert_close(total[0], x.float().sum().bfloat16(), rtol=2**-7, atol=0)
    assert largest[0] == x.max()
    torch.testing.assert_close(running, x.float().cumsum(0).bfloat16(), rtol=2**-7, atol=1e-2)


@pytest.mark.parametrize("name", FLOATS)
def test_dot_is_exact_in_the_accumulator(name):
    x, y = torch.randn(16, 16).to(FLOATS[name]), torch.randn(16, 16).to(FLOATS[name])
    out = torch.empty(16, 16)
    runtime.run(product_kernel, (1,), x, y, out, 16)
    torch.testing.assert_close(out, x.float() @ y.float(), rtol=1e-5, atol=1e-5)


def test_a_kernel_may_call_other_kernels():
    """Those of Triton's own language too: `tl.zeros` is one, compiled like any other."""
    x, out = torch.randn(SIZE), torch.empty(SIZE)
    runtime.run(calling_kernel, (1,), x, out, SIZE)
    assert torch.equal(out, 2 * x)
    with pytest.raises(RuntimeError, match="outside of the scope of a kernel"):
        doubled(x)


def test_interpreted_is_a_matter_of_the_block():
    assert runtime.mode(torch.zeros(1)) == "interpret"
    token = runtime._interpreted.set(False)
    try:
        assert runtime.mode(torch.zeros(1)) == "reference"
        with runtime.interpreted():
            assert runtime.interpreting()
        assert not runtime.interpreting()
    finally:
        runtime._interpreted.reset(token)


def test_the_interpreter_is_left_as_it_was_found():
    from triton.runtime import interpreter

    from diffusion_opt.kernels.interpreter import REPAIRS

    def state() -> list[object]:
        language = [tl.core.reduce, tl.reduce, tl.load, tl.core.load, tl.tensor.__add__, tl.math.exp2, tl.range]
        return [*(getattr(owner, name) for owner, name, _ in REPAIRS), interpreter._patch_lang, *language]

    before = state()
    x = torch.randn(SIZE)
    runtime.run(reduction_kernel, (1,), x, torch.empty(1), torch.empty(1), torch.empty(SIZE), SIZE)
    assert all(now is then for now, then in zip(state(), before, strict=True))
