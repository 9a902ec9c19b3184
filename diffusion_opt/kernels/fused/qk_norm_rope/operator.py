"""QK-norm, rotary embedding and quantization of queries or keys as operators of torch: one pass over memory.

    q = qk_norm_rope(q, norm.weight, flux2_rotation(cos, sin))                   differentiable
    k, mean = qk_norm_rope_with_mean(k, norm.weight, rotation)                   for `quantize_tokens(k, …, mean)`
    codes, mean = qk_norm_rope_quantized(q, norm.weight, rotation, "int8", QUERY_GROUPS["block"])

diffusers runs these as a dozen elementwise operations over q and k of every block, each through memory. x is (b, h, l,
d) with any strides: `to_q(x).unflatten(2, (heads, -1)).transpose(1, 2)` is read in place. A weight of d numbers
normalizes each head (FLUX.2), one of h d numbers all heads together (Wan, LTX-2). `rotation` is None for cross
attention. What is computed, and how diffusers' tables of angles become a `Rotation`, is in `oracle.py`.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_opt.kernels import runtime
from diffusion_opt.kernels.fused.qk_norm_rope import oracle as reference
from diffusion_opt.kernels.fused.qk_norm_rope.oracle import Rotation
from diffusion_opt.kernels.quantizers import oracle as quantize
from diffusion_opt.kernels.quantizers.operator import CODE_TYPES, check_mean
from diffusion_opt.kernels.quantizers.oracle import EightBit, Quantized, ScaleGroups

EPS = 1e-6  # of FLUX.2, Wan and LTX-2


def qk_norm_rope(
    x: Float[Tensor, "b h l d"], weight: Float[Tensor, " w"], rotation: Rotation | None = None, eps: float = EPS
) -> Float[Tensor, "b h l d"]:
    """Normalized and rotated, with type and strides of x.

    Raises ValueError for a weight of neither d nor h d numbers, tables that do not fit, an odd d, or eps <= 0.
    """
    _check(x, weight, rotation, eps)
    return norm_rope_op(x, weight, *_tables(rotation), eps, False)[0]


def qk_norm_rope_with_mean(
    x: Float[Tensor, "b h l d"], weight: Float[Tensor, " w"], rotation: Rotation | None = None, eps: float = EPS
) -> tuple[Float[Tensor, "b h l d"], Float[Tensor, "b h d"]]:
    """`qk_norm_rope`, and the mean of the result over tokens: what smoothing takes off keys (float32, no gradient)."""
    _check(x, weight, rotation, eps)
    y, mean = norm_rope_op(x, weight, *_tables(rotation), eps, True)
    return y, mean.detach()


def qk_norm_rope_quantized(
    x: Float[Tensor, "b h l d"],
    weight: Float[Tensor, " w"],
    rotation: Rotation | None,
    to: EightBit,
    groups: ScaleGroups,
    mean: Float[Tensor, "b h d"] | None = None,
    eps: float = EPS,
) -> tuple[Quantized, Float[Tensor, "b h d"]]:
    """8-bit codes of the normalized and rotated x, less `mean`, and its own mean over tokens (float32).

    Keys need a mean before it is known; that of the denoising step before is as good, since softmax does not see it.
    Raises what `qk_norm_rope` raises. No gradient.
    """
    _check(x, weight, rotation, eps)
    if to not in CODE_TYPES:
        raise ValueError(f"codes are {' or '.join(CODE_TYPES)}, got {to!r}")
    if mean is not None:
        check_mean(mean, x, ())
    sharing = (groups.window, groups.groups, groups.run)
    codes, scales, own_mean = norm_rope_quantized_op(x, weight, *_tables(rotation), eps, mean, to, *sharing)
    return Quantized(codes, scales), own_mean


def _check(x: Tensor, weight: Tensor, rotation: Rotation | None, eps: float) -> None:
    b, h, length, d = x.shape
    if len(weight) not in (d, h * d):
        raise ValueError(f"a weight has {d} numbers (each head) or {h * d} (all heads together), got {len(weight)}")
    if d % 2:
        raise ValueError(f"channels are handled in pairs, so a head has an even number of them, got {d}")
    if eps <= 0:
        raise ValueError(f"eps must be positive, got {eps:g}: a token of zeros would be divided by 0")
    for table in () if rotation is None else rotation[:2]:
        if table.shape[2:] != (length, d // 2) or table.shape[0] not in (1, b) or table.shape[1] not in (1, h):
            raise ValueError(
                f"x of shape {tuple(x.shape)} needs angles of shape (1 or {b}, 1 or {h}, {length}, {d // 2}), "
                f"got {tuple(table.shape)}"
            )


def _tables(rotation: Rotation | None) -> tuple[Tensor | None, Tensor | None, str]:
    return (None, None, "") if rotation is None else tuple(rotation)


def _rotation(cos: Tensor | None, sin: Tensor | None, pairs: str) -> Rotation | None:
    return None if cos is None else Rotation(cos, sin, pairs)


@torch.library.custom_op("diffusion_opt::qk_norm_rope", mutates_args=())
def norm_rope_op(
    x: Tensor, weight: Tensor, cos: Tensor | None, sin: Tensor | None, pairs: str, eps: float, with_mean: bool
) -> tuple[Tensor, Tensor]:
    """The result and its mean over tokens, empty unless asked for; `pairs` is that of the rotation."""
    rotation, y = _rotation(cos, sin, pairs), torch.empty_like(x)
    if runtime.mode(x) == "reference":
        exact = reference.norm_rope(x, weight, rotation, eps)
        return y.copy_(exact), exact.mean(2).float() if with_mean else x.new_empty(0, dtype=torch.float32)
    from diffusion_opt.kernels.fused.qk_norm_rope.kernel import launch_norm_rope  # Triton exists on Linux only

    return y, launch_norm_rope(x, weight.contiguous(), rotation, eps, y, with_mean)


@norm_rope_op.register_fake
def _(
    x: Tensor, weight: Tensor, cos: Tensor | None, sin: Tensor | None, pairs: str, eps: float, with_mean: bool
) -> tuple[Tensor, Tensor]:
    mean_shape = (*x.shape[:2], x.shape[3]) if with_mean else (0,)
    return torch.empty_like(x), x.new_empty(mean_shape, dtype=torch.float32)


def _save_for_backward(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple) -> None:
    x, weight, cos, sin, ctx.pairs, ctx.eps, _ = inputs
    ctx.save_for_backward(x, weight, cos, sin)


def _gradients(ctx: torch.autograd.function.FunctionCtx, grad: Tensor, _grad_mean: Tensor | None) -> tuple:
    x, weight, cos, sin = ctx.saved_tensors
    rotation = _rotation(cos, sin, ctx.pairs)
    grad_x, grad_weight = reference.norm_rope_backward(grad, x, weight, rotation, ctx.eps)
    return grad_x.to(x.dtype), grad_weight.to(weight.dtype), None, None, None, None, None


norm_rope_op.register_autograd(_gradients, setup_context=_save_for_backward)


@torch.library.custom_op("diffusion_opt::qk_norm_rope_quantized", mutates_args=())
def norm_rope_quantized_op(
    x: Tensor, weight: Tensor, cos: Tensor | None, sin: Tensor | None, pairs: str, eps: float, mean: Tensor | None,
    to: str, window: int, groups: int, run: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Codes, scales, and the mean over tokens of what was quantized, before `mean` was taken off."""
    rotation, sharing = _rotation(cos, sin, pairs), ScaleGroups(window, groups, run)
    if runtime.mode(x) == "reference":
        exact = reference.norm_rope(x.float(), weight.float(), rotation, eps)
        codes, scales = quantize.quantize_tokens(exact, to, sharing, mean)
        return codes.contiguous(), scales, quantize.smoothing_mean(exact)
    from diffusion_opt.kernels.fused.qk_norm_rope.kernel import launch_norm_rope

    codes = x.new_empty(x.shape, dtype=CODE_TYPES[to])
    scales = x.new_empty(*x.shape[:2], sharing.num_scales(x.shape[2]), dtype=torch.float32)
    own = launch_norm_rope(x, weight.contiguous(), rotation, eps, codes, True, sharing, scales, mean)
    return codes, scales, own


@norm_rope_quantized_op.register_fake
def _(
    x: Tensor, weight: Tensor, cos: Tensor | None, sin: Tensor | None, pairs: str, eps: float, mean: Tensor | None,
    to: str, window: int, groups: int, run: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    b, h, length, d = x.shape
    num_scales, floats = ScaleGroups(window, groups, run).num_scales(length), {"dtype": torch.float32}
    codes = x.new_empty(x.shape, dtype=CODE_TYPES[to])
    return codes, x.new_empty(b, h, num_scales, **floats), x.new_empty(b, h, d, **floats)
