"""The closed-form teacher: the exact velocity, score, density and samples of a mixture of Gaussians.

If the data are a mixture of Gaussians N(mu_k, s_k^2) with weights w_k and diagonal s_k, so is x_t = (1 - t) x + t e
at every time, and nothing about it needs learning. With V_k = (1 - t)^2 s_k^2 + t^2 and y_k = x_t - (1 - t) mu_k:

    density    p_t(x_t) = sum_k w_k N(y_k; 0, V_k),      responsibilities  g_k = w_k N(y_k; 0, V_k) / p_t(x_t)
    score      grad log p_t = - sum_k g_k y_k / V_k
    velocity   v = E[e - x | x_t] = sum_k g_k { -mu_k + [t - (1 - t) s_k^2] / V_k * y_k }

Nothing divides by t or 1 - t, so both ends are exact: v = -x_t at t = 0 (the noise is unknown and has mean 0), and
v = x_t - E[x] at t = 1. Away from t = 1 it is v = -(x_t + t grad log p_t) / (1 - t), since E[e | x_t] is
-t grad log p_t (Tweedie's formula; Efron 2011, "Tweedie's formula and selection bias").

A lone Gaussian has its flow map in closed form as well: y / sqrt(V) is constant along the flow, so the mean velocity
of the jump from t to r is, free of a division by t - r,

    u = -mu + [(t + r) - (2 - t - r) s^2] / [sqrt(V_t) (sqrt(V_t) + sqrt(V_r))] * y.

Every sampler, loss and cache is tested against this truth in milliseconds. All sums run in float64 with logsumexp.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffusion_opt.flow.path import expand_time
from diffusion_opt.flow.velocity import ClassCondition


@dataclass(frozen=True, slots=True, eq=False)
class GaussianMixtureVelocity:
    """A mixture of k Gaussians with diagonal covariance over data of any shape *s, as a VelocityModel.

    `classes` gives each component a class label in 0 … num_classes - 1; a ClassCondition then picks the components
    of its class, and its null label (num_classes) picks all. Weights, means and stds are kept in float64.
    Raises ValueError on shapes that disagree, non-positive weights or stds, weights that do not sum to 1, and
    class labels that leave a class without a component.
    """

    weights: Float[Tensor, " k"]  # positive, sum 1
    means: Float[Tensor, "k *s"]
    stds: Float[Tensor, "k *s"]  # positive, one for each component and coordinate
    classes: Int[Tensor, " k"] | None = None  # None: no classes, num_classes is 0

    def __post_init__(self) -> None:
        _check_parameters(self.weights, self.means, self.stds)
        if self.classes is not None:
            _check_classes(self.classes, len(self.weights))
        for name in ("weights", "means", "stds"):
            object.__setattr__(self, name, getattr(self, name).to(torch.float64))

    @classmethod
    def ring(
        cls, num_modes: int = 8, radius: float = 1.0, std: float = 0.1, num_classes: int | None = None
    ) -> "GaussianMixtureVelocity":
        """Equal round modes on a circle in the plane; with classes, mode i belongs to class i % num_classes.

        Raises ValueError unless num_modes >= 1, std > 0 and 1 <= num_classes <= num_modes.
        """
        if num_modes < 1:
            raise ValueError(f"num_modes must be at least 1, got {num_modes}")
        if num_classes is not None and not 1 <= num_classes <= num_modes:
            raise ValueError(f"num_classes must lie in 1 … {num_modes} (num_modes), got {num_classes}")
        index = torch.arange(num_modes)
        angle = 2 * math.pi * index.double() / num_modes
        means = radius * torch.stack([angle.cos(), angle.sin()], dim=1)
        weights = torch.full((num_modes,), 1 / num_modes, dtype=torch.float64)
        classes = None if num_classes is None else index % num_classes
        return cls(weights, means, torch.full_like(means, std), classes)

    @property
    def num_classes(self) -> int:
        """How many classes the components carry; 0 without classes."""
        return 0 if self.classes is None else int(self.classes.max()) + 1

    def __call__(
        self,
        x_t: Float[Tensor, "b *s"],
        t: Float[Tensor, " b"],
        condition: ClassCondition | None = None,
        r: Float[Tensor, " b"] | None = None,
    ) -> Float[Tensor, "b *s"]:
        """The exact velocity E[e - x | x_t], in the dtype of x_t; with `r`, the mean velocity of the jump t -> r.

        Raises ValueError on a bad shape, time or class, or for `r` where more than one component is left.
        """
        self._check_points(x_t)
        if r is not None:
            return self._mean_velocity(x_t, t, r, condition)
        y, variance, log_joint = self._components(x_t, t, condition)
        t = _column(t, x_t)
        means, stds = self.means.to(x_t.device), self.stds.to(x_t.device)
        velocity = (t - (1 - t) * stds**2) / variance * y - means
        return _mix(log_joint.softmax(1), velocity).to(x_t.dtype)

    def score(
        self, x_t: Float[Tensor, "b *s"], t: Float[Tensor, " b"] | float, condition: ClassCondition | None = None
    ) -> Float[Tensor, "b *s"]:
        """The exact score, the gradient in x_t of log p_t(x_t). Errors as in a call."""
        self._check_points(x_t)
        y, variance, log_joint = self._components(x_t, t, condition)
        return _mix(log_joint.softmax(1), -y / variance).to(x_t.dtype)

    def log_density(
        self, x: Float[Tensor, "b *s"], t: Float[Tensor, " b"] | float = 0.0, condition: ClassCondition | None = None
    ) -> Float[Tensor, " b"]:
        """The exact log p_t(x) in nats, of the data at t = 0 and of standard noise at t = 1. Errors as in a call."""
        self._check_points(x)
        return self._components(x, t, condition)[2].logsumexp(1).to(x.dtype)

    def sample(
        self, num: int, generator: torch.Generator, condition: ClassCondition | None = None
    ) -> Float[Tensor, "num *s"]:
        """Draw `num` exact data samples on the generator's device (float32); `condition` has one label for each.

        Raises ValueError on a condition of another length or of other classes.
        """
        device = generator.device
        weights = self._log_weights(num, condition, device).exp()
        component = torch.multinomial(weights, 1, generator=generator).squeeze(1)
        noise = torch.randn((num, *self.means.shape[1:]), generator=generator, dtype=torch.float64, device=device)
        return (self.means.to(device)[component] + self.stds.to(device)[component] * noise).float()

    def _check_points(self, x_t: Tensor) -> None:
        if x_t.ndim == 0 or x_t.shape[1:] != self.means.shape[1:]:
            wanted = ", ".join(str(n) for n in ("batch", *self.means.shape[1:]))
            raise ValueError(f"points must have the mixture's shape ({wanted}), got shape {tuple(x_t.shape)}")

    def _log_weights(self, num: int, condition: ClassCondition | None, device: torch.device) -> Float[Tensor, "b k"]:
        """Log weights of the components each condition leaves, normalized over them; -inf for the others."""
        log_weights = self.weights.to(device).log().expand(num, -1)
        if condition is None:
            return log_weights.log_softmax(1)
        if condition.num_classes != self.num_classes:
            raise ValueError(
                f"the mixture has {self.num_classes} classes, the condition was made for {condition.num_classes}; "
                f"use ClassCondition(labels, num_classes={self.num_classes})"
            )
        if len(condition) != num:
            raise ValueError(f"the condition must have one label per sample, {num}, got {len(condition)}")
        labels = condition.labels.to(device)[:, None]
        keep = labels == self.num_classes
        if self.classes is not None:
            keep = keep | (labels == self.classes.to(device))
        return log_weights.masked_fill(~keep, -math.inf).log_softmax(1)

    def _components(
        self, x_t: Float[Tensor, "b *s"], t: Float[Tensor, " b"] | float, condition: ClassCondition | None
    ) -> tuple[Float[Tensor, "b k *s"], Float[Tensor, "b k *s"], Float[Tensor, "b k"]]:
        """Per component: y_k = x_t - (1 - t) mu_k, its variance V_k, and log w_k + log N(y_k; 0, V_k)."""
        log_weights = self._log_weights(len(x_t), condition, x_t.device)
        t = _column(t, x_t)
        y = x_t.to(torch.float64)[:, None] - (1 - t) * self.means.to(x_t.device)
        variance = (1 - t) ** 2 * self.stds.to(x_t.device) ** 2 + t**2
        log_normal = -0.5 * (y**2 / variance + variance.log() + math.log(2 * math.pi))
        return y, variance, log_weights + log_normal.reshape(*log_weights.shape, -1).sum(2)

    def _mean_velocity(
        self,
        x_t: Float[Tensor, "b *s"],
        t: Float[Tensor, " b"],
        r: Float[Tensor, " b"],
        condition: ClassCondition | None,
    ) -> Float[Tensor, "b *s"]:
        """The exact flow map of a lone Gaussian, as the mean velocity u with x_r = x_t - (t - r) u."""
        log_weights = self._log_weights(len(x_t), condition, x_t.device)
        left = int(log_weights.isfinite().sum(1).max()) if len(x_t) else 1
        if left > 1:
            raise ValueError(
                f"a two-time velocity (r) is known in closed form for a lone Gaussian only, but {left} components "
                "are left; give a condition whose class has one component, or solve the flow with a sampler"
            )
        component = log_weights.argmax(1)
        mean, std = (p.to(x_t.device)[component] for p in (self.means, self.stds))
        t, r = (_column(time, x_t).squeeze(1) for time in (t, r))
        std_t, std_r = (((1 - time) ** 2 * std**2 + time**2).sqrt() for time in (t, r))
        slope = ((t + r) - (2 - t - r) * std**2) / (std_t * (std_t + std_r))
        return (slope * (x_t.to(torch.float64) - (1 - t) * mean) - mean).to(x_t.dtype)


def _column(t: Tensor | float, x_t: Float[Tensor, "b *s"]) -> Float[Tensor, "b 1 *ones"]:
    """Checked times in float64 that broadcast against (b, k, *s)."""
    if not isinstance(t, Tensor):
        t = torch.full((len(x_t),), float(t), dtype=torch.float64, device=x_t.device)
    if t.numel() and not bool(((t >= 0) & (t <= 1)).all()):
        raise ValueError(f"times must lie in [0, 1], got {t.min().item():g} … {t.max().item():g}")
    return expand_time(t.to(torch.float64), x_t)[:, None]


def _mix(responsibilities: Float[Tensor, "b k"], values: Float[Tensor, "b k *s"]) -> Float[Tensor, "b *s"]:
    return torch.einsum("bk,bk...->b...", responsibilities, values)


def _check_parameters(weights: Tensor, means: Tensor, stds: Tensor) -> None:
    if weights.ndim != 1 or len(weights) == 0:
        raise ValueError(f"weights must have shape (k,) with k >= 1, got shape {tuple(weights.shape)}")
    if means.ndim < 2 or len(means) != len(weights):
        raise ValueError(
            f"means must have shape ({len(weights)}, …), one point for each weight, got shape {tuple(means.shape)}"
        )
    if stds.shape != means.shape:
        raise ValueError(
            f"stds must have the shape of means, {tuple(means.shape)}, got {tuple(stds.shape)}; "
            "use torch.full_like(means, std) for round components"
        )
    if not bool(((stds > 0) & stds.isfinite()).all()):
        raise ValueError(f"stds must be positive and finite, got {stds.min().item():g} … {stds.max().item():g}")
    if not bool(means.isfinite().all()):
        raise ValueError(f"means must be finite, got {means.min().item():g} … {means.max().item():g}")
    total = weights.sum().item()
    if not bool((weights > 0).all()) or abs(total - 1) > 1e-5:
        raise ValueError(
            f"weights must be positive and sum to 1, got a smallest of {weights.min().item():g} and a sum of {total:g}"
            "; divide them by their sum"
        )


def _check_classes(classes: Tensor, num_components: int) -> None:
    if classes.shape != (num_components,):
        raise ValueError(
            f"classes must have one label per component, shape ({num_components},), got {tuple(classes.shape)}"
        )
    found = classes.unique().tolist()
    if found != list(range(len(found))):
        raise ValueError(f"classes must use every label from 0 to the largest, got the labels {found}")
