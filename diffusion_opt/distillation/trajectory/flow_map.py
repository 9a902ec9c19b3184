"""One identity, six methods: distill a teacher into a flow map.

A flow map u(x_t, t, r) is the mean velocity of the teacher's path from t down to r: one pass jumps, x_r = x_t -
(t - r) u. It is tied to itself: a jump t -> r equals a small hop t -> s followed by the jump s -> r,

    u*(x_t, t, r) = sg{ [ (t - s) v(x_t, t) + (s - r) u(x_s, s, r) ] / (t - r) },      x_s = x_t - (t - s) v(x_t, t)

with sg the stop-gradient, and u is fitted to u*. v, s and r are free, and the methods are choices of them:

    consistency distillation    v of the teacher, r = 0                  Song et al. 2023, arXiv 2303.01469
    consistency training        v = e - x of the data, r = 0             Geng et al. 2024, arXiv 2406.14548
    flow map                    v of the teacher, any r                  AnyFlow, arXiv 2605.13724
    MeanFlow                    any r, and s -> t: the limit             Geng et al. 2025, arXiv 2505.13447
    sCM                         r = 0, and s -> t, its tangent scaled    Lu & Song 2024, arXiv 2410.11081
    shortcut, progressive       v by the student's own jump t -> s, s the midpoint   Frans et al. 2024, arXiv 2410.12557

For a small hop u* is u plus the share (t - s) / (t - r) of a step; in the limit the whole step is taken, u* = v -
(t - r) du/dt along the path, with the derivative by a Jacobian-vector product or a central difference. u* of a hop is a
convex combination of two velocities and so bounded: no 1 / (t - r) weights as in losses on pictures. Two things decide
over success at small scale: enough samples with r = 0, without which one step stays untrained, and a hop that is not
too small, since a small hop teaches slowly.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_opt.flow import expand_time

Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]  # u(x, t, r) -> mean velocity of the jump t -> r


def hop_target(
    x_t: Float[Tensor, "b *s"],
    t: Float[Tensor, " b"],
    s: Float[Tensor, " b"],
    r: Float[Tensor, " b"],
    velocity: Float[Tensor, "b *s"],
    jump: Velocity,
) -> Float[Tensor, "b *s"]:
    """u* of the identity above for a hop t -> s with the given velocity, r <= s <= t and r < t, without gradient.

    Where t = r the target is the velocity itself. Raises ValueError for times out of order.
    """
    if bool((r > s).any() or (s > t).any()):
        raise ValueError("times must fall, r <= s <= t")
    with torch.no_grad():
        hop, rest, whole = (expand_time(time, x_t) for time in (t - s, s - r, t - r))
        x_s = x_t - hop * velocity
        mixed = (hop * velocity + rest * jump(x_s, s, r)) / whole.clamp(min=torch.finfo(x_t.dtype).tiny)
        return torch.where(whole > 0, mixed, velocity)


def limit_target(
    x_t: Float[Tensor, "b *s"],
    t: Float[Tensor, " b"],
    r: Float[Tensor, " b"],
    velocity: Float[Tensor, "b *s"],
    jump: Velocity,
    step: float | None = None,
    tangent: float = 1.0,
) -> Float[Tensor, "b *s"]:
    """u* = v - (t - r) du/dt, the limit s -> t, without gradient.

    The total derivative du/dt = v . grad_x u + du/dt is a Jacobian-vector product with `step` None, which the attention
    kernel must support (torch's "math" one does), else a central difference of that half-width in time. `tangent` is
    the share of it that is taken: sCM lets it rise from 0 to 1 (arXiv 2410.11081, section 4.2).
    """
    with torch.no_grad():
        derivative = _jvp(x_t, t, r, velocity, jump) if step is None else _difference(x_t, t, r, velocity, jump, step)
        return velocity - tangent * expand_time(t - r, x_t) * derivative


def _jvp(x_t: Tensor, t: Tensor, r: Tensor, velocity: Tensor, jump: Velocity) -> Tensor:
    tangents = (velocity, torch.ones_like(t), torch.zeros_like(r))
    return torch.func.jvp(jump, (x_t, t, r), tangents)[1]


def _difference(x_t: Tensor, t: Tensor, r: Tensor, velocity: Tensor, jump: Velocity, step: float) -> Tensor:
    """(u(t + h) - u(t - h)) / 2h along the straight line; one-sided where t + h > 1 or t - h < r."""
    after, before = (t + step).clamp(max=1.0), torch.maximum(t - step, r)
    u_after = jump(x_t + expand_time(after - t, x_t) * velocity, after, r)
    u_before = jump(x_t - expand_time(t - before, x_t) * velocity, before, r)
    width = expand_time(after - before, x_t)
    return torch.where(width > 0, (u_after - u_before) / width.clamp(min=torch.finfo(x_t.dtype).tiny), 0.0)


def own_guidance(
    velocity: Float[Tensor, "b *s"],
    conditional: Float[Tensor, "b *s"],
    unconditional: Float[Tensor, "b *s"],
    scale: Float[Tensor, " b"],
    mixing: float = 0.0,
) -> Float[Tensor, "b *s"]:
    """Guidance without a teacher: the data's velocity made guided by the student's own (arXiv 2505.13447, eq. 19).

    w v + k u(t, t | c) + (1 - w - k) u(t, t | no condition), with k = `mixing` and w = (1 - k) `scale`. A student that
    has learned it is guided itself, so its own part adds up to w / (1 - k) = `scale`, whatever k is (the paper's w').
    At scale 1 and no mixing it is v.
    """
    w = expand_time((1 - mixing) * scale, velocity)
    return w * velocity + mixing * conditional + (1 - w - mixing) * unconditional


def ratio_times(t: Float[Tensor, " b"], doublings: int) -> Float[Tensor, " b"]:
    """Where a hop from t ends: ECT's factor, s = t max(0, 1 - n(t) / 2^(doublings + 1)) (arXiv 2406.14548).

    n(t) = 1 + 8 sigmoid(-sigma), sigma = t / (1 - t). At first s = 0 for most t, which is plain denoising; then each
    doubling halves the hop. The paper multiplies sigma by that factor and not t: from t = 0.9 its first hop ends at
    sigma = 4.5, t = 0.82, ours at t = 0.45, since on our line a hop is a share of the way and not of the noise.
    """
    sigma = t / (1 - t).clamp(min=torch.finfo(t.dtype).tiny)
    return t * (1 - (1 + 8 * torch.sigmoid(-sigma)) / 2 ** (doublings + 1)).clamp(min=0)


def normalized_tangent(
    prediction: Float[Tensor, "b *s"], target: Float[Tensor, "b *s"], c: float = 0.1
) -> Float[Tensor, "b *s"]:
    """sCM's target: the step from prediction to target scaled to at most one root mean square, g / (|g| + c).

    It bounds the step that a wild derivative can ask for (arXiv 2410.11081, equation 10); without gradient.
    """
    with torch.no_grad():
        step = target - prediction
        size = step.flatten(1).square().mean(1).sqrt()
        return prediction + step / expand_time(size + c, step)
