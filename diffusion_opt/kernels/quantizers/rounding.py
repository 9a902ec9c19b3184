"""Rounding inside Triton kernels, spelled out: the same bits as `formats.py`, on every architecture.

No conversion instruction is used for NVFP4: e4m3 does not exist before sm_89, e2m1 not before sm_100, and the
interpreter has neither. The tools are the bits of a float32 and one constant:

    step(a)       the distance of neighboring numbers around a, a power of two read off the exponent of a
    nearest(y)    (y + 1.5 * 2^23) - 1.5 * 2^23: float32 has no fractions there, so the addition rounds to an integer,
                  ties to even

so that a number is rounded to nearest(a / step) * step; products with powers of two are exact. INT8 needs none of it:
add half, truncate. Triton's own tools are no help: `libdevice.rint` is not there when interpreting.

NaN stays NaN. `tl.max` and `tl.maximum` compile to `max.f32`, which returns the other number: the scale of a group with
a NaN in it would be that of the rest, and the NaN would become code 0. `largest`, `at_least` and `at_most` compile to
`max.NaN.f32` and `min.NaN.f32`, so the scale is NaN, and with it all that is computed from the group, as in PyTorch.
The compile gate looks for these instructions.
"""

import triton
import triton.language as tl

from diffusion_opt.kernels.quantizers import formats

E4M3_MAX = tl.constexpr(formats.E4M3_MAX)
E4M3_MIN = tl.constexpr(formats.E4M3_MIN)
E2M1_MAX = tl.constexpr(formats.E2M1_MAX)
NVFP4_MAX = tl.constexpr(formats.NVFP4_MAX)
NVFP4_BLOCK = tl.constexpr(formats.NVFP4_BLOCK)
NO_FRACTIONS = tl.constexpr(1.5 * 2.0**23)


@triton.jit
def at_least(x, y):
    """The larger of two numbers, NaN if one is."""
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def at_most(x, y):
    """The smaller of two numbers, NaN if one is."""
    return tl.minimum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def largest(x, AXIS: tl.constexpr):
    """The largest number along an axis, NaN if there is one."""
    return tl.reduce(x, AXIS, at_least)


@triton.jit
def clamped(x, TOP: tl.constexpr):
    """x within -TOP … TOP; NaN stays."""
    return at_most(at_least(x, -TOP), TOP)


@triton.jit
def nearest(y):
    """The nearest integer, ties to even, of a float32 below 2^22 in magnitude."""
    return (y + NO_FRACTIONS) - NO_FRACTIONS


@triton.jit
def round_int8(z):
    """The nearest integer, ties away from zero, of z in -127.5 … 127.5 (exclusive), as int8; of NaN, 0."""
    return (z + tl.where(z < 0, -0.5, 0.5)).to(tl.int8)


@triton.jit
def round_positive_e4m3(a):
    """The nearest e4m3 number of a float32 a >= 0, at most 448, as a float32."""
    a = at_most(a, E4M3_MAX)
    exponent = tl.maximum((a.to(tl.int32, bitcast=True) >> 23) - 127, -6)  # below 2^-6 the steps stay 2^-9
    step = ((exponent + 124) << 23).to(tl.float32, bitcast=True)  # 2^(exponent - 3)
    inverse = ((130 - exponent) << 23).to(tl.float32, bitcast=True)
    return nearest(a * inverse) * step


@triton.jit
def round_e2m1(z):
    """The nearest of 0, 0.5, 1, 1.5, 2, 3, 4, 6 with the sign of z, ties to the even mantissa, as a float32."""
    size = at_most(tl.abs(z), E2M1_MAX)
    step = tl.where(size < 2.0, 0.5, tl.where(size < 4.0, 1.0, 2.0))
    inverse = tl.where(size < 2.0, 2.0, tl.where(size < 4.0, 1.0, 0.5))
    rounded = nearest(size * inverse) * step
    return tl.where(z < 0, -rounded, rounded)


@triton.jit
def nonzero(scale):
    """The scale, 1 where it is 0: there all numbers are 0 and any scale is right."""
    return tl.where(scale == 0.0, 1.0, scale)
