"""Triton's interpreter with its bfloat16 and float8 arithmetic put right, for the length of a `with` block.

numpy has neither type, so the interpreter (Triton 3.7) keeps such numbers as raw bits in unsigned integers, and
computes with the bits: a product of two bfloat16 tiles multiplies their bit patterns, a cast to bfloat16 truncates, a
cast to float8 loses the carry of the mantissa. Nothing is reported; results are wrong by a little or by a factor of a
billion. A kernel that is right on a GPU would fail its test, and worse, one whose error hides in the noise would pass.

`repaired()` makes the interpreter do what the hardware does:

    casts        round to nearest, ties to even, by torch; float8 saturates at its largest number (448 for e4m3, 57344
                 for e5m2) as `cvt.rn.satfinite` does, where torch's own cast gives NaN or infinity
    arithmetic   on these types in float32, rounded once at the end; so are reductions and scans
    dot          operands widened to float32, which is exact; sums in the accumulator's type
    FP4          products of packed codes with block scales, which the interpreter does not have
    NaN          `maximum` and `minimum` return the other number, as `max.f32` does, unless NaN is asked for by name
    speed        reductions by the maximum that keeps NaN go through numpy and not element by element; Triton patches
                 its language anew at every call of `tl.sum` or `tl.max`, here once for each block; and
                 it computes each integer twice to catch overflows, as compiled kernels do in debug mode only

Everything is restored at the end of the block. A test asserts that the unrepaired interpreter is still wrong; the day
it fails this file can go. Limits that stay: one thread, no inline PTX, no libdevice, no atomics on bfloat16.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime import interpreter as triton_interpreter
from triton.runtime.interpreter import (
    InterpretedFunction,
    InterpreterBuilder,
    ReduceOps,
    ReduceScanOpInterface,
    TensorHandle,
    interpreter_builder,
)
from triton.runtime.jit import JITFunction

from diffusion_opt.kernels.quantizers.rounding import at_least

TORCH_TYPES = {
    "fp8e4nv": torch.float8_e4m3fn,
    "fp8e5": torch.float8_e5m2,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}
KEPT_AS_BITS = ("bf16", "fp8e4nv", "fp8e5")
BITS = {
    8: (np.uint8, torch.uint8),
    16: (np.uint16, torch.uint16),
    32: (np.uint32, torch.uint32),
    64: (np.uint64, torch.uint64),
}


def is_kept_as_bits(handle: TensorHandle) -> bool:
    """Whether numpy holds this value as the bits of a type it does not have."""
    return handle.dtype.scalar.name in KEPT_AS_BITS


def convert(bits: np.ndarray, source: tl.dtype, target: tl.dtype) -> np.ndarray:
    """Cast between float types as the hardware does, from bits (or numpy's own floats) to bits (unsigned integers)."""
    source_numpy, _ = BITS[source.primitive_bitwidth]
    target_numpy, target_torch = BITS[target.primitive_bitwidth]
    values = torch.from_numpy(np.ascontiguousarray(bits).view(source_numpy)).view(TORCH_TYPES[source.name])
    wanted = TORCH_TYPES[target.name]
    if target.name.startswith("fp8"):
        largest = torch.finfo(wanted).max
        values = values.to(torch.float32).clamp(-largest, largest)
    return values.to(wanted).view(target_torch).numpy().view(target_numpy).reshape(bits.shape)


def widened(handle: TensorHandle) -> TensorHandle:
    """The same numbers in float32 if they are kept as bits, else the handle itself."""
    if not is_kept_as_bits(handle):
        return handle
    return TensorHandle(convert(handle.data, handle.dtype.scalar, tl.float32).view(np.float32), tl.float32)


def narrowed(handle: TensorHandle, target: tl.dtype) -> TensorHandle:
    """A float32 result rounded to `target`; comparisons give truth values, which stay."""
    if handle.data.dtype == np.bool_:
        return TensorHandle(handle.data, tl.int1)
    return TensorHandle(convert(handle.data.astype(np.float32), tl.float32, target), target)


def repaired_cast(original: Callable) -> Callable:
    """Casts between float types through torch; truncation (asked for by name) stays Triton's."""

    def cast(bits: np.ndarray, source: tl.dtype, target: tl.dtype, rounding: Any) -> np.ndarray:
        if rounding == ir.ROUNDING_MODE.RTZ or not {source.name, target.name} <= TORCH_TYPES.keys():
            return original(bits, source, target, rounding)
        return convert(bits, source, target)

    return cast


def repaired_conversion(original: Callable) -> Callable:
    """Casts that Triton sends past its float conversion: integers and float64 to and from a type kept as bits."""

    def cast_impl(self: InterpreterBuilder, source: TensorHandle, target: tl.dtype) -> TensorHandle:
        if target.scalar.name in KEPT_AS_BITS and not is_kept_as_bits(source):
            return narrowed(source, target.scalar)
        return original(self, widened(source), target)

    return cast_impl


def repaired_arithmetic(original: Callable) -> Callable:
    """Elementwise operations on types kept as bits: in float32, rounded once."""

    def compute(self: InterpreterBuilder, *arguments: Any) -> TensorHandle:
        kinds = [a.dtype.scalar for a in arguments if isinstance(a, TensorHandle) and is_kept_as_bits(a)]
        if not kinds:
            return original(self, *arguments)
        return narrowed(
            original(self, *[widened(a) if isinstance(a, TensorHandle) else a for a in arguments]), kinds[0]
        )

    return compute


def repaired_dot(original: Callable) -> Callable:
    """Products of types kept as bits, widened to float32 without loss; the accumulator's type stays."""

    def create_dot(self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, *rest: Any) -> TensorHandle:
        return original(self, widened(a), widened(b), *rest)

    return create_dot


def repaired_reduction(original: Callable) -> Callable:
    """Sums, maxima and scans over types kept as bits: in float32, rounded once."""

    def apply(self: ReduceScanOpInterface, operand: Any) -> Any:
        if isinstance(operand, tuple) or not is_kept_as_bits(operand.handle):
            return original(self, operand)
        kind, wide = operand.dtype, widened(operand.handle)
        result = original(self, self.to_tensor(wide.data, tl.float32))
        shaped = tl.block_type(kind, list(result.shape)) if result.type.is_block() else kind
        return tl.core.tensor(narrowed(result.handle, kind), shaped)

    return apply


def by_numpy(function: Callable) -> Callable:
    """An operation of two numbers that numpy has."""

    def repaired(_: Callable) -> Callable:
        return lambda self, left, right: self.binary_op(left, right, function)

    return repaired


E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=np.float32)


def unpacked(codes: np.ndarray, scales: TensorHandle) -> np.ndarray:
    """The numbers of packed FP4 codes (rows, half) and the scales of blocks of them, float32."""
    pairs = np.stack([codes & 15, codes >> 4], axis=-1).reshape(len(codes), -1)
    by_code = np.repeat(widened(scales).data, pairs.shape[1] // scales.data.shape[1], axis=1)
    return E2M1[pairs] * by_code


def scaled_product(
    self: InterpreterBuilder, left: TensorHandle, left_scales: TensorHandle, left_format: Any, right: TensorHandle,
    right_scales: TensorHandle, right_format: Any, fast_math: bool, left_packed: bool, right_packed: bool,
    total: TensorHandle,
) -> TensorHandle:  # fmt: skip
    """`tl.dot_scaled` of e2m1 codes packed along what is summed over, which Triton's interpreter lacks."""
    numbers = unpacked(left.data, left_scales) @ unpacked(right.data.T, right_scales).T
    return TensorHandle(total.data + numbers, tl.float32)


def repaired_maximum(original: Callable) -> Callable:
    """The reduction by `rounding.at_least` is numpy's maximum, which keeps NaN; that by `tl.max` passes NaN over."""

    def apply_impl(self: ReduceOps, operands: tuple) -> Any:
        if self.combine_fn is at_least:
            return self.min_max(operands[0], val_reduce_op=np.max)
        if self.combine_fn is tl.standard._elementwise_max:  # numpy's nanmax warns where there is nothing but NaN
            return self.min_max(operands[0], val_reduce_op=np.fmax.reduce)
        return original(self, operands)

    return apply_impl


REPAIRS = (
    (triton_interpreter, "_convert_float", repaired_cast),
    (InterpreterBuilder, "cast_impl", repaired_conversion),
    (InterpreterBuilder, "binary_op", repaired_arithmetic),
    (InterpreterBuilder, "ternary_op", repaired_arithmetic),
    (InterpreterBuilder, "unary_op", repaired_arithmetic),
    (InterpreterBuilder, "create_fma", repaired_arithmetic),
    (InterpreterBuilder, "create_dot", repaired_dot),
    (ReduceScanOpInterface, "apply", repaired_reduction),
    (InterpreterBuilder, "create_maxnumf", by_numpy(np.fmax)),
    (InterpreterBuilder, "create_minnumf", by_numpy(np.fmin)),
    (ReduceOps, "apply_impl", repaired_maximum),
)


@contextmanager
def language_patched_once() -> Iterator[None]:
    """Let Triton patch its language once for each module of kernels instead of at every nested call, and undo it."""
    scopes: dict[int, Any] = {}
    patch_language, no_changes = triton_interpreter._patch_lang, triton_interpreter._LangPatchScope

    def patch_once(function: Callable) -> Any:
        if id(function.__globals__) not in scopes:
            scopes[id(function.__globals__)] = patch_language(function)
        return no_changes()  # what the caller restores when a kernel ends: nothing yet

    with patch.object(triton_interpreter, "_patch_lang", patch_once):
        try:
            yield
        finally:
            for scope in reversed(scopes.values()):
                scope.restore()


def interpretable(kernel: JITFunction | InterpretedFunction) -> InterpretedFunction:
    """A kernel for the interpreter, whether or not TRITON_INTERPRET was set when it was decorated."""
    return kernel if isinstance(kernel, InterpretedFunction) else InterpretedFunction(kernel.fn)


def call_interpreted(self: JITFunction, *arguments: Any, **constants: Any) -> Any:
    """What a kernel calls is interpreted as well; compiled functions refuse to be called from Python."""
    return interpretable(self)(*arguments, **constants)


@contextmanager
def repaired() -> Iterator[None]:
    """Repair Triton's interpreter inside this block, and leave it as it was found."""
    with ExitStack() as stack, np.errstate(all="ignore"):  # infinities and NaN are silent on a GPU too
        for owner, name, repair in REPAIRS:
            stack.enter_context(patch.object(owner, name, repair(getattr(owner, name))))
        stack.enter_context(patch.object(InterpreterBuilder, "create_dot_scaled", scaled_product, create=True))
        stack.enter_context(language_patched_once())
        stack.enter_context(patch.object(JITFunction, "__call__", call_interpreted))
        options = replace(interpreter_builder.options, sanitize_overflow=False)
        stack.enter_context(patch.object(interpreter_builder, "options", options))
        yield
